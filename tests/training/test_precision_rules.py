"""Rules about precision and recomputation: each is refused in words, and each fix mends it."""

from __future__ import annotations

import inspect
import re

import pytest

from megallm.base.config import replace
from megallm.base.errors import UsageError
from megallm.ops import backends
from megallm.training.rules import precision
from megallm.training.validate import check
from tests.training.test_validate import GOOD, assert_refused

FP8, SELECTIVE = {"train.precision": "fp8"}, {"train.recompute": "selective"}
ACCEPTED = [
    FP8,
    FP8 | {"train.fp8.recipe": "delayed", "train.fp8.history": 1024, "train.fp8.margin": 1},
    FP8 | {"train.fp8.recipe": "blockwise", "train.fp8.bf16_first": 1, "train.fp8.bf16_last": 2},
    {"train.precision": "fp16", "train.loss_scale.initial": 1024.0},
    SELECTIVE | {"train.recompute_modules": ("norm", "mlp", "core"), "train.recompute_layers": 2},
    {"train.recompute": "full", "train.recompute_layers": 1, "train.offload": True, "train.fused_head": "on"},
]
BROKEN = [
    ("loss_scale", {"train.loss_scale.initial": 64.0}, "train.loss_scale is of train.precision fp16"),
    ("loss_scale", {"train.precision": "fp16", "train.loss_scale.minimum": 1e6}, "greater than train.loss_scale.init"),
    ("fp8", {"train.fp8.recipe": "delayed"}, "train.fp8.recipe is of train.precision fp8; the precision is fp32."),
    ("fp8", FP8 | {"train.fp8.history": 8}, "train.fp8.history is 8, which train.fp8.recipe tensorwise does not use."),
    ("fp8", FP8 | {"train.fp8.recipe": "rowwise", "train.fp8.margin": 1}, "Nearest valid: train.fp8.margin=0 or"),
    ("fp8_layers", FP8 | {"train.fp8.bf16_first": 2, "train.fp8.bf16_last": 2}, "leave none of the 4 layers"),
    ("fp8_layers", FP8 | {"train.fp8.bf16_last": 9}, "Nearest valid: train.precision=bf16 train.fp8.bf16_last=0."),
    ("fp8_backend", FP8 | {"train.fp8.backend": "transformer_engine"}, "but transformer-engine is not installed"),
    ("recompute", {"train.recompute_modules": ("mlp",)}, "Nearest valid: train.recompute=selective or"),
    ("recompute", {"train.recompute_layers": 2}, "train.recompute none makes nothing again"),
    ("recompute", SELECTIVE | {"train.recompute_modules": ()}, "selective makes nothing again"),
    ("recompute", SELECTIVE | {"train.recompute_modules": ("mlp", "activation")}, "train.recompute_modules=['mlp']"),
    ("recompute", SELECTIVE | {"train.recompute_modules": ("norm", "norm")}, "names something twice"),
    (
        "recompute_norm",
        SELECTIVE | {"train.recompute_modules": ("norm",), "layout.tp": 2, "layout.sp": True},
        "what is kept is the gathered copy. Nearest valid: train.recompute=none",
    ),
    (
        "recompute_norm",
        SELECTIVE | {"train.recompute_modules": ("norm", "mlp"), "train.offload": True},
        "train.offload",
    ),
    ("recompute_norm", SELECTIVE | FP8 | {"train.recompute_modules": ("norm", "mlp")}, "keep their inputs in FP8"),
    (
        "recompute_norm",
        SELECTIVE | {"train.recompute_modules": ("norm", "mlp"), "model.norm_place": "post"},
        "their outputs are the residual stream",
    ),
]


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_what_is_accepted(values):
    check(replace(GOOD, values))


@pytest.mark.parametrize(("rule", "values", "sentence"), BROKEN, ids=[f"{row[0]}-{i}" for i, row in enumerate(BROKEN)])
def test_each_rule(rule, values, sentence):
    assert_refused(rule, values, sentence)


def test_transformer_engine_has_other_recipes_and_schedules(monkeypatch):
    """As if it were installed; nothing of it runs."""
    monkeypatch.setattr(backends, "version", lambda name: "2.8")
    asked = replace(GOOD, FP8 | {"train.fp8.backend": "transformer_engine"})
    check(asked)
    with pytest.raises(UsageError, match="has no recipe rowwise; it has delayed, tensorwise, blockwise"):
        check(replace(asked, {"train.fp8.recipe": "rowwise"}))
    with pytest.raises(UsageError, match="puts weight gradients off"):
        check(replace(asked, {"layout.pp": 2, "layout.schedule": "zb-h1"}))


def test_every_rule_has_a_row():
    names = set(re.findall(r'Problem\(\s*"(\w+)"', inspect.getsource(precision)))
    assert names == {row[0] for row in BROKEN}


def test_a_backend_that_is_missing_says_how_to_have_it():
    assert backends.version("transformer_engine") is None, "this test is for machines without it"
    with pytest.raises(UsageError, match=r"train\.fp8\.backend asks for transformer-engine, but .* is not installed"):
        backends.require("transformer_engine")


def test_a_backend_that_cannot_be_imported_is_a_sentence(monkeypatch):
    monkeypatch.setattr(backends, "version", lambda name: "9.9")
    with pytest.raises(UsageError, match="transformer-engine 9.9 is installed but cannot be imported: No module"):
        backends.require("transformer_engine")
