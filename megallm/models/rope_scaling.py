"""RoPE scaling (linear, NTK, YaRN, Llama 3, LongRoPE): the numbers each way needs, and their check.
No torch; the maths is `ops.rope`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megallm.base.errors import UsageError

# Kind -> the fields that it needs, and those that it may have.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("rope_factor",),
    "ntk": ("rope_factor",),
    "dynamic": ("rope_factor", "rope_positions"),
    "llama3": ("rope_factor", "rope_low_factor", "rope_high_factor", "rope_positions"),
    "yarn": ("rope_factor", "rope_positions"),
    "longrope": ("rope_factor", "rope_positions", "rope_short_factors", "rope_long_factors"),
}
ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "yarn": (
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_attention_factor",
        "rope_mscale",
        "rope_mscale_all_dim",
        "rope_truncate",
    ),
    "longrope": ("rope_attention_factor",),
}
ROPE_NUMBERS = tuple(
    dict.fromkeys(
        name
        for table in (ROPE_SCALINGS, ROPE_OPTIONS)
        for names in table.values()
        for name in names
    )
)


@dataclass(frozen=True)
class RopeScaling:
    """How a rotary embedding was stretched to a longer context, as `ops.rope.Scaling` reads it."""

    kind: str
    factor: float
    low_factor: float | None = None
    high_factor: float | None = None
    positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    @staticmethod
    def of(values: Mapping[str, Any]) -> RopeScaling | None:
        """Returns the RoPE scaling from the fields of a resolved model; None for the plain rotary
        embedding.
        """
        if values["rope_scaling"] is None:
            return None
        given = {name: values[name] for name in ROPE_NUMBERS if values[name] is not None}
        return RopeScaling(
            values["rope_scaling"],
            **{name.removeprefix("rope_"): value for name, value in given.items()},
        )


def check_rope(values: Mapping[str, Any]) -> None:
    """Check that a scaled rotary embedding has exactly the numbers that its kind reads; raises
    UsageError.
    """
    kind = values.get("rope_scaling")
    if kind is not None and kind not in ROPE_SCALINGS:
        raise UsageError(
            f"model.rope_scaling is '{kind}'; it must be one of {', '.join(ROPE_SCALINGS)}, or "
            "null."
        )
    needed, allowed = ROPE_SCALINGS.get(kind, ()), ROPE_OPTIONS.get(kind, ())
    for name in ROPE_NUMBERS:
        given = values.get(name) is not None
        if name not in allowed and given != (name in needed):
            must = "needs" if name in needed else "has no"
            raise UsageError(f"model.rope_scaling {kind or 'null'} {must} model.{name}.")
        numbers = values.get(name) if name.endswith("factors") else (values.get(name),)
        if given and name != "rope_truncate" and min(numbers, default=1) <= 0:
            raise UsageError(f"model.{name} is {values[name]}; it must be greater than 0.")
    for low, high in (
        ("rope_low_factor", "rope_high_factor"),
        ("rope_beta_slow", "rope_beta_fast"),
    ):
        given = [values.get(name) for name in (low, high)]
        if None not in given and given[0] >= given[1]:
            raise UsageError(f"model.{low} {given[0]} must be less than model.{high} {given[1]}.")
    if kind == "ntk" and values["rope_factor"] < 1:
        raise UsageError(
            f"model.rope_factor is {values['rope_factor']}; model.rope_scaling ntk needs at least "
            "1."
        )
    _check_waves(kind, values)


def rotated(values: Mapping[str, Any]) -> int:
    """Returns how many features of a head are rotated, of the fields of a model."""
    if values["mla"].on:
        return values["mla"].rope_head_size
    fraction = values.get("rope_fraction")
    return values["head_size"] if fraction is None else int(values["head_size"] * fraction)


def _check_waves(kind: str | None, values: Mapping[str, Any]) -> None:
    """There are waves to scaling, and slow ones among them."""
    fraction = values.get("rope_fraction")
    if fraction is not None and not (0 < fraction <= 1 and rotated(values) > 0):
        raise UsageError(
            f"model.rope_fraction is {fraction}; it must be greater than 0, at most 1, and rotate "
            f"2 features at least of the {values['head_size']} of a head."
        )
    for name in ("rope_short_factors", "rope_long_factors"):
        if kind == "longrope" and len(values[name]) != rotated(values) // 2:
            raise UsageError(
                f"model.{name} has {len(values[name])} numbers; a head has {rotated(values) // 2} "
                "waves, each with one."
            )
    if kind is not None and values["positions"] != "rope":
        raise UsageError(
            f"model.rope_scaling {kind} stretches rotary positions, but model.positions is "
            f"{values['positions']}: leave it out."
        )
    if kind in ("ntk", "dynamic") and rotated(values) == 2:
        raise UsageError(
            f"model.rope_scaling {kind} keeps the fastest wave and stretches the slowest, but a "
            "head has 2 rotated features and so a single wave: give it at least 4, or take "
            "model.rope_scaling linear."
        )
    if kind == "yarn" and values["rope_theta"] <= 1:
        raise UsageError(
            f"model.rope_theta is {values['rope_theta']}; model.rope_scaling yarn needs more than "
            "1, or no wave is slower than another."
        )

