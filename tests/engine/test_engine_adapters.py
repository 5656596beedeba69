"""Low-rank adapters in the slots of linears: any layout trains and generates like one process."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.ops.grouped_gemm import Runs, grouped_linear
from megallm.optim.config import ZeroConfig
from megallm.parallel.expert import GroupedLinear
from megallm.parallel.layout import Layout
from megallm.parallel.linear import linear
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import ColumnLinear, Linear, RowLinear, ShardedModule
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

DIM = 3
TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 14, "shared_ffn_hidden_size": 10, "aux_coef": 0.5}
LATENTS = {
    "kv_lora_dim": 7, "q_lora_dim": 9, "nope_head_size": 3, "rope_head_size": 4, "value_head_size": 5
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "biased": TINY | {"tie_embeddings": True, "bias": True},
    "moe": TINY | {"moe": EXPERTS},
    "mla": TINY | {"num_kv_heads": None, "mla": LATENTS},
}


class LowRank(ShardedModule):
    """`y + B A x` beside every matrix of a stack; records as in the linear, or partial over tp."""

    def __init__(self, base: Linear) -> None:
        super().__init__(base.mesh, base.sp)
        shard = base.shards["weight"]
        *stack, out, width = shard.full
        rows, columns = shard.split.get(len(stack)), shard.split.get(len(stack) + 1)
        tp = ("tp",) if base.mesh.tp.size > 1 else ()
        partial_a = tp if isinstance(base, ColumnLinear) else shard.partial
        partial_b = tp if isinstance(base, RowLinear) else shard.partial
        self.add_parameter("a", self._record((*stack, DIM, width), columns, -1, partial_a))
        self.add_parameter("b", self._record((*stack, out, DIM), rows, -2, partial_b))
        self.stack = math.prod(stack)

    @staticmethod
    def _record(full: tuple[int, ...], axis: str | None, dim: int, summed: tuple[str, ...]) -> Shard:
        if axis is None:
            return Shard(full, {}, summed, normal(0.3))
        return Shard(full, {len(full) + dim: axis}, (), normal(0.3))

    def forward(self, x: Tensor, y: Tensor, rows: slice | None) -> Tensor:
        a, b = self.a.view(self.stack, DIM, -1), self.b.view(self.stack, -1, DIM)
        b = b if rows is None else b[:, rows]
        queue = self.weight_grads
        made = [linear(linear(x, a[i], None, queue), b[i], None, queue) for i in range(self.stack)]
        return y + torch.cat(made, dim=-1)


class GroupedLowRank(ShardedModule):
    """The same for experts, whose matrices lie side by side."""

    def __init__(self, base: GroupedLinear) -> None:
        super().__init__(base.mesh)
        experts, *out, width = base.shards["weight"].full
        for name, size in (("a", (DIM, width)), ("b", (math.prod(out), DIM))):
            self.add_parameter(name, Shard((experts, *size), {0: "ep"}, (), normal(0.3)))

    def forward(self, x: Tensor, y: Tensor, runs: Runs) -> Tensor:
        inner = grouped_linear(x, self.a, runs, self.weight_grads)
        return y + grouped_linear(inner, self.b, runs, self.weight_grads)


def adapt(stage: nn.Module, only: str = "") -> None:
    """Freeze everything, and put an adapter into each linear that has `only` in its name."""
    stage.requires_grad_(False)
    for name, module in list(stage.named_modules()):
        if isinstance(module, Linear) and only in name:
            grouped = isinstance(module, GroupedLinear)
            module.adapter = GroupedLowRank(module) if grouped else LowRank(module)


ZB_H1 = {"schedule": "zb-h1"}
CASES: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "tp4": (Layout(tp=4), "dense", {}),
    "tp2-sp-recompute": (Layout(tp=2), "biased", {"sp": True, "recompute": "full"}),
    "zb-h1-tp2-sp": (Layout(pp=2, tp=2), "biased", ZB_H1 | {"sp": True, "recompute": "selective"}),
    "zb-v": (Layout(pp=2), "dense", {"schedule": "zb-v", "chunks": 2}),
    "zero3-recompute": (Layout(dp=2), "dense", {"zero": ZeroConfig(3), "recompute": "full"}),
    "hybrid-zero2": (Layout(dp=4), "dense", {"zero": ZeroConfig(2, 2)}),
    "experts": (Layout(dp=2, tp=2, ep=4), "moe", {"sp": True, "recompute": "full"}),
    "experts-zb-h1": (Layout(pp=2, tp=2, ep=2), "moe", ZB_H1 | {"recompute": "selective"}),
    "latents": (Layout(cp=2, tp=2), "mla", {"sp": True}),
    "only k_up": (Layout(cp=2), "mla", {}),
}


def trained(layout: Layout, model: str, changes: dict[str, Any], only: str) -> tuple[list, list]:
    """Losses and norms of two steps, and this rank's pieces of the weights and moments."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    config = config_of(ModelConfig(**MODELS[model]).resolve(), **changes)
    engine = Engine.build(config, mesh, partial(adapt, only=only))
    numbers = []
    for step in range(2):
        given = share(batches(4, tokens=16, seed=step), mesh)
        stats = engine.train_step(given, NextToken(), 0.02)
        numbers.append((stats.loss, stats.grad_norm))
    return numbers, [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_as_in_one_process(case):
    layout, model, changes = CASES[case]
    only = case.removeprefix("only ") if case.startswith("only ") else ""
    numbers, parts = trained(Layout(), model, {}, only)
    whole = {name: tensor for name, _, tensor in parts}
    assert any(".adapter." in name for name in whole if name.startswith("optim."))
    missing = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    for ours, pieces in run_ranks(layout.world, trained, layout, model, changes, only):
        for step, expected in zip(ours, numbers, strict=True):
            assert step == pytest.approx(expected, rel=1e-9)
        for name, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[name][box], rtol=1e-8, atol=1e-11)
            missing[name][box] = False
    assert not any(left.any() for left in missing.values())


def generated(layout: Layout, model: str) -> float:
    """The largest difference between log-probabilities of generation and of `log_probs`."""
    mesh = Mesh.start(layout)
    config = config_of(ModelConfig(**MODELS[model]).resolve(), zero=3)
    engine = Engine.build(config, mesh, adapt)
    requests = [Request(number, [1 + number, 7, 3], Answer(Ending(8))) for number in range(3)]
    with engine.parameters.gathered():
        Generator(engine.model).generate(requests, Sampling())
    gaps = []
    for request in requests:
        text = torch.tensor([[*request.prompt, *request.answer.tokens]])
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
        batch |= {"positions": torch.arange(10)[None], "mask": torch.ones(1, 10, dtype=torch.bool)}
        made = torch.tensor(request.answer.log_probs, dtype=torch.float64)
        gaps.append(engine.log_probs([batch])[0][0, 2:] - made)
    return float(torch.stack(gaps).abs().max())


@pytest.mark.parametrize("model", ["dense", "mla"])
def test_generation_uses_the_adapters(model):
    assert max(run_ranks(4, generated, Layout(dp=2, tp=2), model)) < 1e-12
