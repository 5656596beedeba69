"""A dense checkpoint as the start of a mixture of experts (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the dense feed-forward layer. With weights that sum to 1 over a token's
experts the new model computes what the dense one did, whatever the router, which is drawn from the
seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.base.files import atomic_write_text
from megallm.checkpoint import store
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.checkpoint.store import weights_only
from megallm.checkpoint.tools import resolve_step
from megallm.convert.convert import (
    LazyTensors,
    check_output,
    imported_meta,
    to_yaml_section,
    whole_folder,
)
from megallm.convert.tokenizer_files import (
    check_vocabulary,
    checkpoint_tokenizer,
    copied_folder,
    copy_beside,
)
from megallm.convert.weights import Cast, WeightSource, stored_model, whole_stage
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer import BYTES
from megallm.models.build import initial_values
from megallm.models.config import ModelConfig
from megallm.models.sections import MoeConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards


@dataclass(frozen=True)
class UpcycleRequest:
    """`experts` copies in each chosen layer; `first_dense` and `every` say which layers (as in
    `model.moe`).
    """

    source: str
    output: str
    experts: int
    top_k: int = 2
    first_dense: int = 0
    every: int = 1
    seed: int = 1234
    overwrite: bool = False


class Upcycled:
    """The weights of a dense model, read by the names of a model with experts."""

    def __init__(self, source: WeightSource, model: ModelConfig, seed: int) -> None:
        self.source, self.seed = source, seed
        shards = named_shards(whole_stage(model, Mesh.single("meta")))
        self.shards = {name: shard for name, _, shard in shards}
        self.state = model.state_shapes()

    def names(self) -> list[str]:
        return sorted([*self.shards, *self.state])

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns full shape and dtype; what the dense model lacks has that of its embedding, and
        state is float32.
        """
        if name in self.state:
            return self.state[name], torch.float32
        return self.shards[name].full, self.source.info("embedding.weight")[1]

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        """Fill `tensor` with the box at `offset` of the logical tensor `name`."""
        if name in self.state:
            tensor.zero_()
        elif name.endswith(".router.weight"):
            values = initial_values(
                name, self.shards[name], tuple(offset), tuple(tensor.shape), self.seed
            )
            tensor.copy_(values)
        elif ".moe.experts." in name:
            for copy in tensor:
                self.source.read_into(
                    name.replace(".moe.experts.", ".mlp."), tuple(offset[1:]), copy
                )
        else:
            self.source.read_into(name, offset, tensor)


def run(request: UpcycleRequest) -> dict[str, Any]:
    """Write the run folder `request.output` with one checkpoint of step 0; returns {output,
    tensors, bytes, params}.

    Errors: UsageError, CheckpointError, CannotWrite; with any of them nothing is left at the
    output.
    """
    output = Path(request.output)
    check_output(output, request.source, request.overwrite)
    step = resolve_step(request.source, weights_only)
    with CheckpointReader(step) as reader, whole_folder(output) as folder:
        model = with_experts(stored_model(reader), request)
        dtype = reader.info("embedding.weight")[1]
        source = Upcycled(Cast(reader), model, request.seed)
        lazy = [LazyTensors(source, name, *source.info(name)) for name in source.names()]
        spec = checkpoint_tokenizer(step, reader.meta)
        meta = imported_meta(model, dtype, spec if spec == BYTES else None)
        if spec is not None:
            check_vocabulary(reader.meta, spec, tokenizer.load(spec))
        kept = copied_folder(step) if spec in (None, BYTES) else Path(spec)
        if kept is not None:
            copy_beside(kept, folder, spec)
        parts = [Part(part.name, part.shape, (0,) * len(part.shape), part) for part in lazy]
        store.save(folder / "checkpoints", 0, parts, meta, Mesh.single())
        atomic_write_text(folder / "model.yaml", to_yaml_section(model))
    return {
        "output": request.output,
        "tensors": len(lazy),
        "bytes": sum(prod(part.shape) * part.itemsize for part in lazy),
        "params": model.num_params(),
        "active_params": model.num_params(active=True),
    }


def with_experts(dense: ModelConfig, request: UpcycleRequest) -> ModelConfig:
    """Returns the dense model's configuration with experts of the size of its feed-forward
    layer.
    """
    if dense.moe.num_experts:
        raise UsageError(
            f"{request.source} has {dense.moe.num_experts} experts already: only a dense model "
            "grows them."
        )
    if request.experts < 1:
        raise UsageError(f"--experts is {request.experts}; it must be at least 1.")
    if request.top_k == 1 < request.experts:
        raise UsageError(
            "--top-k 1: the weight of the one chosen expert is scaled to 1, so that the model "
            "computes what the dense one did, and then the router gets no gradient and never "
            "learns to choose. Nearest valid: --top-k 2."
        )
    moe = MoeConfig(
        num_experts=request.experts,
        top_k=request.top_k,
        first_dense=request.first_dense,
        every=request.every,
        ffn_hidden_size=dense.ffn_hidden_size,
    )
    model = dataclasses.replace(dense, moe=moe).resolve()
    if not model.num_expert_layers:
        raise UsageError(
            f"--first-dense {request.first_dense} leaves no layer for experts: the model has "
            f"{dense.num_layers} layers."
        )
    return model
