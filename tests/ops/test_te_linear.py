"""The adapter to Transformer Engine against a stand-in with its signatures, which `test_backend_contracts` reads from
the library itself: that was never run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megallm.models.sections import MoeConfig
from megallm.ops import backends, te_linear
from megallm.ops.low_precision import Fp8Options
from tests.engine.tiny import MODEL, engine_of


class Linear(nn.Module):
    """What the adapter relies on: a weight `(out, in)` of its own on the device that was asked for."""

    def __init__(self, inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert STATE["recipe"] is not None, "outside of fp8_autocast"
        return F.linear(x, self.weight)


STATE: dict[str, Any] = {"recipe": None}


@contextmanager
def fp8_autocast(enabled: bool, fp8_recipe: object, fp8_group: object):
    assert enabled
    STATE["recipe"] = fp8_recipe
    yield
    STATE["recipe"] = None


RECIPES = SimpleNamespace(
    Format=SimpleNamespace(HYBRID="hybrid", E4M3="e4m3"),
    DelayedScaling=lambda **values: ("delayed", values),
    Float8CurrentScaling=lambda **values: ("current", values),
    Float8BlockScaling=lambda **values: ("block", values),
)


@contextmanager
def autocast(enabled: bool, recipe: object, amax_reduction_group: object):
    with fp8_autocast(enabled, recipe, amax_reduction_group):
        yield


@pytest.fixture(autouse=True, params=[{"fp8_autocast": fp8_autocast}, {"autocast": autocast}], ids=["old", "new"])
def library(monkeypatch, request):
    te = SimpleNamespace(Linear=Linear, **request.param)
    monkeypatch.setattr(backends, "require", lambda name, module=None: RECIPES if module else te)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (
            Fp8Options("delayed", history=8, margin=1),
            ("delayed", {"margin": 1, "amax_history_len": 8, "fp8_format": "hybrid"}),
        ),
        (Fp8Options("tensorwise"), ("current", {"fp8_format": "hybrid"})),
        (Fp8Options("blockwise"), ("block", {"fp8_format": "e4m3"})),
    ],
)
def test_recipes_are_translated(options, recipe):
    assert te_linear.te_recipe(options) == recipe


def test_it_computes_with_our_weight_and_leaves_it_the_gradient():
    linear = te_linear.TeLinear(Fp8Options(), None)
    stacked, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    x = torch.randn(2, 5, 4)
    y = linear(x, stacked.flatten(0, -2), bias)
    torch.testing.assert_close(y, F.linear(x, stacked.flatten(0, -2), bias))
    y.sum().backward()
    assert stacked.grad.shape == (2, 3, 4) and bias.grad is not None


def test_an_engine_takes_it_for_the_linears_of_its_blocks():
    engine = engine_of(precision="fp8", fp8=Fp8Options(backend="transformer_engine"))
    block = engine.model.stages[0].layers["0"]
    assert isinstance(block.mlp.down.te, te_linear.TeLinear) and block.attention.q.te is not None
    assert not engine.model.fp8.linears


def test_experts_stay_as_they_are():
    model = replace(MODEL, moe=MoeConfig(num_experts=4, ffn_hidden_size=12, shared_ffn_hidden_size=8)).resolve()
    engine = engine_of(model=model, precision="fp8", fp8=Fp8Options(backend="transformer_engine"))
    moe = engine.model.stages[0].layers["0"].moe
    assert moe.shared.down.te is not None and moe.experts.down.te is None and moe.experts.down.fp8 is None
