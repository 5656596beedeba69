"""Stretched rotary positions equal those of transformers; each number that a kind reads matters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig
from megallm.models.rope_scaling import ROPE_NUMBERS, ROPE_OPTIONS, ROPE_SCALINGS, RopeScaling
from megallm.ops.rope import rope_tables, score_factor, table_factor

utilities = pytest.importorskip("transformers.modeling_rope_utils", reason="stretches are compared with transformers")

SIZE, THETA = 64, 10000.0
# Our numbers, then theirs.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"kind": "llama3", "factor": 8.0, "low_factor": 1.0, "high_factor": 4.0, "positions": 8192},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "positions": 4096},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "deepseek-v3": (
        {"kind": "yarn", "factor": 40.0, "positions": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    ),
    "gpt-oss": (
        {"kind": "yarn", "factor": 32.0, "positions": 4096, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
         "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "yarn, all given": (
        {"kind": "yarn", "factor": 6.0, "positions": 2048, "beta_fast": 16.0, "beta_slow": 2.0,
         "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.3},
    ),
    "yarn, two mscales": (
        {"kind": "yarn", "factor": 40.0, "positions": 4096, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
         "mscale_all_dim": 1.2},
    ),
}  # fmt: skip


def frequencies(stretch: RopeScaling | None, length: int = 0) -> torch.Tensor:
    """From the angle of position 1, whose sine and cosine have the size of the tables."""
    cos, sin = rope_tables(torch.ones(1, 1), SIZE, THETA, torch.float64, stretch, length)
    return torch.atan2(sin, cos)[0, 0]


def theirs(values: dict[str, Any], length: int | None = None, known: int = 131072) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * SIZE, num_attention_heads=4, max_position_embeddings=known,
        rope_parameters=values | {"rope_theta": THETA},
    )  # fmt: skip
    return utilities.ROPE_INIT_FUNCTIONS[values["rope_type"]](config, "cpu", seq_len=length)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_size_equal_transformers(name: str) -> None:
    ours, other = CASES[name]
    stretch = RopeScaling(**ours)
    want, size = theirs(other)
    got = frequencies(stretch)
    assert ((got - want).abs() / want).max() <= 1e-6
    assert table_factor(stretch) == pytest.approx(size, rel=1e-12)
    assert ((frequencies(None) - want).abs() / want).max() > 0.1
    narrow = rope_tables(torch.arange(64)[None], SIZE, THETA, torch.float32, stretch)
    angles = torch.arange(64)[:, None] * want.double()
    for table, exact in zip(narrow, (angles.cos() * size, angles.sin() * size), strict=True):
        assert (table[0] - exact).abs().max() < 1e-5 * size


@pytest.mark.parametrize("length", [100, 4096, 5000, 20000])
def test_dynamic_equals_transformers_at_each_length(length: int) -> None:
    want, _ = theirs({"rope_type": "dynamic", "factor": 3.0}, length, 4096)
    got = frequencies(RopeScaling("dynamic", 3.0, positions=4096), length)
    assert ((got - want).abs() / want).max() <= 1e-6
    assert torch.equal(got, frequencies(None)) == (length <= 4096)


def test_ntk_keeps_the_fastest_wave_and_stretches_the_slowest_by_the_factor() -> None:
    plain, got = frequencies(None), frequencies(RopeScaling("ntk", 5.0))
    assert got[0] == plain[0]
    assert plain[-1] / got[-1] == pytest.approx(5.0, rel=1e-9)
    assert (got[1:] < plain[1:]).all()
    dynamic, _ = theirs({"rope_type": "dynamic", "factor": 5.0}, 2 * 4096, 4096)  # a factor of 5 x 2 - 4 = 6
    assert ((frequencies(RopeScaling("ntk", 6.0)) - dynamic).abs() / dynamic).max() <= 1e-6


def test_scores_of_latent_attention_grow_with_the_mscale_of_all_dims() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    want = modeling.yarn_apply_mscale({"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 1.2}, 1.0)
    assert score_factor(RopeScaling("yarn", 40.0, positions=4096, mscale_all_dim=1.2)) == pytest.approx(want)
    assert score_factor(RopeScaling("yarn", 40.0, positions=4096)) == score_factor(None) == 1


# What a configuration may say

TINY = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, vocab_size=61, head_size=SIZE)
NUMBERS: dict[str, Any] = {
    "rope_factor": 4.0, "rope_low_factor": 1.0, "rope_high_factor": 4.0, "rope_positions": 128, "rope_beta_fast": 16.0,
    "rope_beta_slow": 2.0, "rope_attention_factor": 1.2, "rope_mscale": 0.7, "rope_mscale_all_dim": 1.1,
    "rope_truncate": False,
    "rope_short_factors": (1.0,) * (SIZE // 2), "rope_long_factors": (2.0,) * (SIZE // 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", [None, *ROPE_SCALINGS])
def test_each_kind_has_its_numbers_and_no_others(kind: str | None) -> None:
    assert set(NUMBERS) == set(ROPE_NUMBERS)
    needed, allowed = ROPE_SCALINGS.get(kind, ()), ROPE_OPTIONS.get(kind, ())
    whole = {name: NUMBERS[name] for name in (*needed, *allowed)} | {"rope_scaling": kind}
    resolved = dataclasses.replace(TINY, **whole).resolve()
    if kind is not None:
        assert frequencies(resolved.rope_scaling_spec, 999).shape == (SIZE // 2,)
    for name in NUMBERS:
        given = {key: value for key, value in whole.items() if key != name}
        if name not in needed and name not in allowed:
            given[name] = NUMBERS[name]
        if name in allowed:
            without = dataclasses.replace(TINY, **given).resolve().rope_scaling_spec
            assert getattr(without, name.removeprefix("rope_")) == getattr(
                RopeScaling(kind, 4.0), name.removeprefix("rope_")
            )
            continue
        with pytest.raises(UsageError, match=f"{'needs' if name in needed else 'has no'} model.{name}"):
            dataclasses.replace(TINY, **given).resolve()


def test_bounds_that_cross_are_refused() -> None:
    yarn = {
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_positions": 128,
        "rope_beta_fast": 1.0,
        "rope_beta_slow": 2.0,
    }
    with pytest.raises(UsageError, match="rope_beta_slow 2.0 must be less than model.rope_beta_fast 1.0"):
        dataclasses.replace(TINY, **yarn).resolve()
    with pytest.raises(UsageError, match="must be one of linear, ntk, dynamic, llama3, yarn"):
        dataclasses.replace(TINY, rope_scaling="wobble").resolve()


@pytest.mark.parametrize(("changed", "said"), [
    ({"rope_scaling": "ntk", "head_size": 2}, "2 rotated features and so a single wave"),
    ({"rope_scaling": "dynamic", "rope_positions": 4, "head_size": 2}, "2 rotated features"),
    ({"rope_scaling": "yarn", "rope_positions": 4, "rope_theta": 1.0}, "yarn needs more than 1"),
    ({"rope_scaling": "linear", "family": "gpt2"}, "but model.positions is learned"),
])  # fmt: skip
def test_a_stretch_without_waves_to_stretch_is_refused(changed, said) -> None:
    """Each of them would divide by zero in the first forward pass, or be read by nothing."""
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(TINY, rope_factor=2.0, **changed).resolve()
    changed = {"rope_scaling": "ntk", "head_size": 4}
    assert dataclasses.replace(TINY, rope_factor=2.0, **changed).resolve().rope_scaling_spec.kind == "ntk"


def test_llama_31_has_the_numbers_of_its_publication() -> None:
    stretch = ModelConfig(preset="llama3.1-8b").resolve().rope_scaling_spec
    assert stretch == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert ModelConfig(preset="llama3.2-1b").resolve().rope_scaling_spec.factor == 32.0
