"""Adapters in the slots beside linears: any layout trains and generates like one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator, Job
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.attention import Attention
from megallm.models.block import Block
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Experts
from megallm.models.virtual import VirtualTokens
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.tensor import without_adapters
from megallm.peft.bottleneck import Bottleneck
from megallm.peft.ia3 import InnerScale, ScaledOutputs
from megallm.peft.prompts import EncodedPrompt, PrefixKeys, Prompt
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

COUNT = 3  # virtual tokens
TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 14, "shared_ffn_hidden_size": 12, "aux_coef": 0.5}
LATENTS = {
    "kv_lora_dim": 7, "q_lora_dim": 9, "nope_head_size": 3, "rope_head_size": 4, "value_head_size": 5
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "window": TINY | {"sliding_window": 5},
    "gpt2": TINY | {"family": "gpt2", "num_kv_heads": 4, "ffn_hidden_size": 32},
    "moe": TINY | {"moe": EXPERTS},
    "mla": TINY | {"num_kv_heads": None, "mla": LATENTS},
}
Fill = Callable[[Stage], None]


def attentions(stage: Stage) -> list[nn.Module]:
    return [x for x in stage.modules() if isinstance(x, (Attention, LatentAttention))]


def scales(stage: Stage) -> None:
    """(IA)3 on keys, values and inner activations."""
    for module in list(stage.modules()):
        if isinstance(module, Attention):
            module.kv.adapter = ScaledOutputs(module.kv, (0, 1))
            module.o.adapter = ScaledOutputs(module.o, (0,)) if module.o.bias is None else None
        if isinstance(module, (Mlp, Experts)):
            module.scale.adapter = InnerScale(module)


def prefixes(stage: Stage) -> None:
    stage.virtual.adapter = VirtualTokens(COUNT, False, stage.config)
    for attention in attentions(stage):
        attention.prefix.adapter = PrefixKeys(attention, COUNT)


def prompts(stage: Stage, inner: int = 0) -> None:
    stage.virtual.adapter = VirtualTokens(COUNT, True, stage.config)
    if stage.span.first:
        hidden = stage.config.hidden_size
        made = EncodedPrompt(stage, COUNT, hidden, inner) if inner else Prompt(stage, COUNT, hidden)
        stage.prompt.adapter = made


def bottlenecks(stage: Stage, parallel: bool = False) -> None:
    for block in [x for x in stage.modules() if isinstance(x, Block)]:
        sizes, sp = (stage.config.hidden_size, 5), stage.sp
        block.after_mlp.adapter = Bottleneck(block.mesh, sp, sizes, parallel)
        if not parallel:
            block.after_attention.adapter = Bottleneck(block.mesh, sp, sizes)


METHODS: dict[str, Fill] = {
    "ia3": scales,
    "prefix": prefixes,
    "prompt": prompts,
    "p-tuning": partial(prompts, inner=10),
    "houlsby": bottlenecks,
    "parallel": partial(bottlenecks, parallel=True),
}


def adapt(stage: Stage, method: str) -> None:
    """Freeze everything, and fill the slots of a method."""
    stage.requires_grad_(False)
    METHODS[method](stage)


def packed(everything: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The rows of each microbatch as documents of one row, the last one cut in two."""
    made = []
    for number, batch in enumerate(everything):
        rows, tokens = batch["tokens"].shape
        ends = [*range(0, rows * tokens, tokens), rows * tokens - 3 - number, rows * tokens]
        lengths = torch.tensor(ends).diff()
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        row = {name: x.reshape(1, -1) for name, x in batch.items()}
        made.append(
            row
            | {"positions": positions[None], "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
        )
    return made


Case = tuple[Layout, str, dict[str, Any]]
SP, FULL, ZB = {"sp": True}, {"recompute": "full"}, {"recompute": "selective"}
CASES: dict[str, tuple[list[str], Case]] = {
    "tp4": (["ia3", "prefix", "p-tuning", "houlsby"], (Layout(tp=4), "dense", {})),
    "tp2-sp-recompute": ([*METHODS], (Layout(tp=2), "gpt2", SP | FULL)),
    "cp2-tp2": (["prefix", "prompt"], (Layout(cp=2, tp=2), "dense", SP | ZB)),
    "ulysses-packed": (["prefix"], (Layout(cp=2), "dense", {"cp_kind": "ulysses", "packed": 1})),
    "ulysses-tp4": (["prefix"], (Layout(cp=2, tp=2), "dense", {"cp_kind": "ulysses"})),
    "gather-packed": (["prefix", "p-tuning"], (Layout(cp=2), "dense", {"cp_kind": "allgather", "packed": 1})),
    "ring-packed": (["prefix", "prompt"], (Layout(cp=2), "window", {"packed": 1})),
    "zero3-recompute": ([*METHODS], (Layout(dp=2), "dense", FULL | {"zero": 3})),
    "zb-v": ([*METHODS], (Layout(pp=2), "dense", {"schedule": "zb-v", "chunks": 2})),
    "interleaved-packed": (
        ["prefix", "prompt", "ia3"],
        (Layout(pp=2), "dense", {"schedule": "interleaved", "chunks": 2, "packed": 1}),
    ),
    "experts": (["ia3", "prefix", "parallel"], (Layout(dp=2, tp=2, ep=4), "moe", SP | FULL)),
    "latents": (["prefix", "prompt"], (Layout(cp=2, tp=2), "mla", SP)),
}  # fmt: skip


def trained(case: Case, method: str, broken: str = "") -> tuple[list, list]:
    """Losses and norms of three steps, and this rank's pieces of the weights and moments."""
    layout, model, changes = case
    changes = dict(changes)
    make = packed if changes.pop("packed", 0) else list
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    if broken:
        mesh.world.broken.add(broken)
    config = config_of(ModelConfig(**MODELS[model]).resolve(), **changes)
    engine = Engine.build(config, mesh, partial(adapt, method=method))
    numbers = []
    for step in range(3):
        given = share(make(batches(4, tokens=16, seed=step)), mesh)
        stats = engine.train_step(given, NextToken(), 0.02)
        numbers.append((stats.loss, stats.grad_norm))
    return numbers, [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


def alone(case: Case) -> Case:
    """The same on one rank, without anything but the rows themselves."""
    _, model, changes = case
    return Layout(), model, {"packed": changes["packed"]} if "packed" in changes else {}


PAIRS = [(name, method) for name, (methods, _) in CASES.items() for method in methods]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_trains_as_in_one_process(name, method):
    case = CASES[name][1]
    numbers, parts = trained(alone(case), method)
    whole = {name: tensor for name, _, tensor in parts}
    assert all(".adapter." in name for name in whole if name.startswith("optim."))
    assert any(float(x.abs().max()) > 0 for name, x in whole.items() if "exp_avg." in name)
    for ours, pieces in run_ranks(case[0].world, trained, case, method):
        for step, expected in zip(ours, numbers, strict=True):
            assert step == pytest.approx(expected, rel=1e-9)
        for name, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[name][box], rtol=1e-8, atol=1e-11)
