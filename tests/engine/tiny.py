"""Tiny engines, their batches, and their state through the one door that checkpoints use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megallm.engine.config import EngineConfig, PipelineOptions
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig, ZeroOptions
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh

MODEL = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, num_kv_heads=2, vocab_size=61,
    max_positions=64, init_std=0.1, tie_embeddings=True,
).resolve()  # fmt: skip
Batch = dict[str, Tensor]

# With beta1 = 0 the first moment is the gradient of the last step, exactly.
SEEN = OptimConfig(betas=(0.0, 0.95), clip=0.0, weight_decay=0.1)


PIPELINE = ("schedule", "chunks", "stages", "group")
ZERO = ("stage", "shard_size", "bf16_grads", "zero_offload", "tree")


def config_of(model: ModelConfig = MODEL, optim: OptimConfig = SEEN, **options: Any) -> EngineConfig:
    """The configuration of an engine with flat options: `zero` is the stage, `schedule` and `chunks`
    are the pipeline's, the rest are called as in EngineConfig; fp64 unless said otherwise.
    """
    zero = {key.removeprefix("zero_"): options.pop(key) for key in ZERO if key in options}
    zero |= {"stage": options.pop("zero")} if "zero" in options else {}
    pipeline = {key: options.pop(key) for key in PIPELINE if key in options}
    values = {"precision": "fp64", "seed": 5} | options
    return EngineConfig(
        model, optim, pipeline=PipelineOptions(**pipeline), zero=ZeroOptions(**zero), **values
    )


def engine_of(mesh: Mesh | None = None, **changes: Any) -> Engine:
    """An engine with its initial weights; fp64 unless said otherwise."""
    values = {"model": MODEL, "optim": SEEN, "precision": "fp64", "seed": 5} | changes
    return Engine.build(EngineConfig(**values), mesh or Mesh.single())


def batches(count: int, rows: int = 2, tokens: int = 12, seed: int = 0, vocab: int = 61) -> list[Batch]:
    """Microbatches with a third of the labels masked."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        text = torch.randint(vocab, (rows, tokens + 1), generator=draw)
        made.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "positions": torch.arange(tokens).expand(rows, tokens).contiguous(),
                "mask": torch.rand(rows, tokens, generator=draw) > 0.33,
            }
        )
    return made


def share(everything: list[Batch], mesh: Mesh) -> list[Batch]:
    """The contiguous block of the microbatches that this data rank reads."""
    each = len(everything) // mesh.data.size
    return everything[mesh.data.rank * each : (mesh.data.rank + 1) * each]


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of what this rank owns, by logical name; whole tensors at a layout of one rank."""
    return {part.name: part.tensor.detach().clone() for part in engine.parts()}


def gradients_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the last step of an engine whose optimizer is `SEEN`."""
    prefix = "optim.exp_avg."
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest max|a - b| / max|b| over all tensors; one that is zero must be zero."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].double(), x.double()) for name, x in theirs.items()]
    return max(float((mine - x).abs().max() / x.abs().max().clamp(min=1e-300)) for mine, x in pairs)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())


def layouts() -> Iterable[Layout]:
    """One of each axis, and all of them."""
    return (Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(dp=2, pp=2), Layout(tp=2, pp=2))
