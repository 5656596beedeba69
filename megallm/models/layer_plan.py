"""What each layer of a model is: window, rotary embedding, norms, experts. Pure.

Layers differ where `model.layer_pattern` says so: a word of letters, repeated over the layers, such
as `wwwf` for three layers with the sliding window and one that sees all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megallm.base.errors import UsageError

# Letter -> (has the window, has rotary positions).
LETTERS = {"f": (False, True), "w": (True, True), "n": (False, False), "m": (True, False)}


@dataclass(frozen=True)
class LayerPlan:
    """One layer: the `window` of its attention (None: all), whether it has rotary positions, and
    those of `model.window_rope_theta`, whether a norm stands before attention, and its experts.
    """

    window: int | None
    rope: bool
    window_rope: bool
    attention_norm: bool
    experts: bool


def letter_of(pattern: str | None, window: int | None, layer: int) -> str:
    """Returns the letter of a layer."""
    pattern = pattern or ("f" if window is None else "w")
    return pattern[layer % len(pattern)]


def letters_of(pattern: str | None, window: int | None, layers: int) -> str:
    """Returns a letter for each layer."""
    return "".join(letter_of(pattern, window, layer) for layer in range(layers))


def pattern_of(letters: Sequence[str]) -> str | None:
    """Returns the shortest word that gives these letters when it is repeated; None for one that
    needs none (`f` or `w` alone).
    """
    word = "".join(letters)
    period = next(p for p in range(1, len(word) + 1) if (word[:p] * len(word))[: len(word)] == word)
    return None if word[:period] in ("f", "w") else word[:period]


def check_pattern(values: Mapping[str, Any]) -> None:
    """Check that a pattern, a window and rotary positions go together; raises UsageError."""
    pattern, window = values.get("layer_pattern"), values.get("sliding_window")
    if pattern is not None and (not pattern or set(pattern) - set(LETTERS)):
        raise UsageError(
            f"model.layer_pattern is '{pattern}'; it must be a word of the letters f (sees all), w "
            "(sliding window), n and m (the same without rotary positions), such as wwwf."
        )
    windowed = any(LETTERS[letter][0] for letter in pattern or "")
    if windowed and window is None:
        raise UsageError(
            f"model.layer_pattern '{pattern}' has layers with a window: give model.sliding_window."
        )
    if pattern is not None and window is not None and not windowed:
        raise UsageError(
            f"model.sliding_window is {window}, but no layer of model.layer_pattern '{pattern}' "
            "has it: leave it out, or write w for layers that do."
        )
    turned = values.get("window_rope_theta") is not None
    rotary = values["positions"] == "rope"
    if not rotary and (turned or any(not LETTERS[letter][1] for letter in pattern or "")):
        raise UsageError(
            f"model.positions is {values['positions']}: rotary positions of some layers "
            "(model.layer_pattern, model.window_rope_theta) need model.positions rope."
        )
