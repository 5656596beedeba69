"""Weights that come from outside, or change, reach every copy that is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.ops.low_precision import Fp8Options
from megallm.optim.config import ZeroConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import Linear, ShardedModule
from tests.engine.tiny import MODEL, batches, engine_of, share, state_of
from tests.ranks import run_ranks

WIDE = replace(MODEL, hidden_size=32, ffn_hidden_size=32, head_size=8)
FP8 = {"model": WIDE, "precision": "fp8", "fp8": Fp8Options("tensorwise")}


class Tensors:
    """A source of weights in memory."""

    def __init__(self, engine: Engine) -> None:
        self.tensors = {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
        tensor.copy_(self.tensors[name][box])


class Doubled(ShardedModule):
    """An adapter that adds a multiple of the product, so small at first that it is none."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.add_parameter("factor", Shard((1,), {}, (), normal(1e-3)))

    def forward(self, x: Tensor, y: Tensor, rows: slice | None) -> Tensor:
        return y + y * self.factor


def adapt(stage: nn.Module) -> None:
    for module in list(stage.modules()):
        if isinstance(module, Linear):
            module.adapter = Doubled(module.mesh)


def test_fp8_weights_that_were_stored_before_are_not_used_after_a_fill():
    source, given = Tensors(engine_of(**FP8, seed=6)), batches(1)
    used, fresh = engine_of(**FP8), engine_of(**FP8)
    used.log_probs(given)
    used.fill(source)
    fresh.fill(source)
    assert torch.equal(used.log_probs(given)[0], fresh.log_probs(given)[0])


def test_a_model_with_adapters_takes_the_weights_of_one_without():
    source = Tensors(engine_of(seed=6))
    engine = Engine.build(engine_of().config, Mesh.single(), adapt)
    before = state_of(engine)
    engine.fill(source)
    state = state_of(engine)
    adapters = [name for name in state if name.endswith("adapter.factor") and not name.startswith("optim.")]
    assert adapters and all(torch.equal(state[name], before[name]) for name in adapters)
    assert all(torch.equal(state[name], x) for name, x in source.tensors.items())


def test_another_model_is_refused_and_a_value_head_is_not_a_row_of_the_vocabulary():
    untied = replace(MODEL, tie_embeddings=False)
    source = Tensors(engine_of(model=untied, seed=6))
    critic = engine_of(model=replace(untied, head="value"))
    before = state_of(critic)
    critic.fill(source)
    state = state_of(critic)
    assert torch.equal(state["head.weight"], before["head.weight"])
    assert torch.equal(state["embedding.weight"], source.tensors["embedding.weight"])
    with pytest.raises(UsageError, match=r"embedding.weight in the shape \[61, 24\], this model needs \[67, 24\]"):
        engine_of(model=replace(untied, vocab_size=67)).fill(source)


def trained_while_gathered(nested: bool) -> tuple[list[Tensor], list[Tensor], bool]:
    mesh = Mesh.start(Layout(dp=2))
    engine, plain = engine_of(mesh, zero=ZeroConfig(3)), engine_of(mesh)
    given = share(batches(2), mesh)
    with engine.parameters.gathered():
        if nested:
            with engine.parameters.gathered():
                pass
        kept = all(bucket.present for bucket in engine.parameters.flat)
        for each in (engine, plain):
            each.train_step(given, NextToken(), 0.1)
        return engine.log_probs(given), plain.log_probs(given), kept


@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_are_kept_gathered_follow_an_update(nested):
    for ours, theirs, kept in run_ranks(2, trained_while_gathered, nested):
        assert kept
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
