"""Tiny engines, their batches, and their state through the one door that checkpoints use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.ops.precision import MODEL_DTYPES
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh

MODEL = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, num_kv_heads=2, vocab_size=61,
    max_positions=64, init_std=0.1, tie_embeddings=True,
).resolve()  # fmt: skip
Batch = dict[str, Tensor]

# With beta1 = 0 the first moment is the gradient of the last step, exactly.
SEEN = OptimConfig(betas=(0.0, 0.95), clip=0.0, weight_decay=0.1)


def config_of(model: ModelConfig = MODEL, optim: OptimConfig = SEEN, **options: Any) -> EngineConfig:
    """The configuration of an engine with flat options, each of the section that has its name (`zero`
    is the stage or the section, `tree` the sum in a fixed order); fp64 unless said otherwise.
    """
    zero = options.pop("zero", 0)
    of_zero = {key: options.pop(key) for key in ("shard_size", "bf16_grads", "zero_offload") if key in options}
    if not isinstance(zero, ZeroConfig):
        zero = ZeroConfig(zero, **{key.removeprefix("zero_"): value for key, value in of_zero.items()})
    names = [field.name for field in fields(LayoutConfig)]
    layout = LayoutConfig(**{key: options.pop(key) for key in names if key in options})
    seed, tree = options.pop("seed", 5), options.pop("tree", False)
    compute = {"precision": "fp64", "determinism": "tree" if tree else "none"} | options
    return EngineConfig(model, layout, zero, optim, ComputeConfig(**compute), seed)


def engine_of(mesh: Mesh | None = None, **changes: Any) -> Engine:
    """An engine with its initial weights; fp64 unless said otherwise. With `fp8` linears compute in it
    whatever the precision of the rest.
    """
    rest = changes.get("precision", "fp64")
    numbers = {"precision": "fp8"} if "fp8" in changes else {}
    dtype = MODEL_DTYPES["bf16" if rest == "fp8" else rest]
    with patch.dict(MODEL_DTYPES, fp8=dtype):
        return Engine.build(config_of(**changes | numbers), mesh or Mesh.single())


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
