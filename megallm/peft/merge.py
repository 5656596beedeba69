"""Adapters in the base's weights: in a running engine, and on the way from folder to folder.

An adapter that can be merged has `add_to(weight)`, which changes this rank's piece in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.convert.weights import WeightSource, whole_stage
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.ops.precision import wide, wide_dtype
from megallm.parallel.mesh import Mesh
from megallm.parallel.quantized import rounded
from megallm.parallel.shard import Box
from megallm.parallel.tensor import ADAPTER, Adaptable, Linear, Slot
from megallm.peft.config import PeftConfig
from megallm.peft.ia3 import ScaledOutputs
from megallm.peft.inject import prepare_adapters
from megallm.peft.lora import MAGNITUDE
from megallm.peft.slots import slots_of
from megallm.peft.sources import Joined, read_whole

HEAD, EMBEDDING = "head.weight", "embedding.weight"
Originals = list[tuple[str, Tensor]]


def merge(engine: Engine) -> Originals:
    """Put the adapters in use into the base's weights and switch the slots off; collective over the
    world.

    Returns this rank's pieces as they were, on the CPU: with them `unmerge` brings back every bit.
    Raises UsageError for a tied head, which must not change the embedding, and for several adapters
    of which one is DoRA's.
    """
    made: dict[str, Tensor] = {}
    with engine.parameters.gathered():
        for stage in engine.model.stages.values():
            for name, module in slots_of(stage):
                if module.is_adapted:
                    made[f"{name}.weight"] = _merged(name, module)
    kept: Originals = []
    for name, shard, box, tensor in engine.masters():
        if name in made:
            kept.append((name, tensor.to("cpu", copy=True)))
            whole = shard.box(engine.mesh.layout, engine.mesh.coords)
            tensor.copy_(made[name][box.slices(whole)])
    _publish(engine, adapts=False)
    return kept


def unmerge(engine: Engine, kept: Originals) -> None:
    """Bring back the base's weights that `merge` returned, bit for bit, and switch the slots on."""
    names = {name for name, _ in kept}
    held = [tensor for name, _, _, tensor in engine.masters() if name in names]
    for tensor, (_, before) in zip(held, kept, strict=True):
        tensor.copy_(before)
    _publish(engine, adapts=True)


def _publish(engine: Engine, adapts: bool) -> None:
    for stage in engine.model.stages.values():
        for _, module in slots_of(stage):
            module.adapts = adapts
    engine.model.fp8.loaded()
    engine.parameters.publish()


@torch.no_grad()
def _merged(name: str, module: Adaptable) -> Tensor:
    """This rank's piece of the weight with the adapters in use in it, wide."""
    used = list(module.adapter.in_use())
    _check_matrix(name, module)
    if isinstance(module, Linear) and module.quantized is not None:
        raise UsageError(
            f"{name} is held in 4 bit, which an adapter cannot be merged into without loss. "
            "`megallm merge` writes a folder with both together in the base's dtype."
        )
    if "weight" not in module.shards:
        raise UsageError(
            "The adapter of the head cannot be merged: the head is tied to the embedding, which it "
            "must not change. `megallm merge` writes a folder whose head is its own."
        )
    _check_several(name, used)
    weight = wide(module.weight).clone()
    for adapter in used:
        adapter.add_to(weight)
    return weight


def _check_matrix(name: str, module: Adaptable) -> None:
    used = module.adapter.in_use()
    if isinstance(module, Slot) or any(isinstance(each, ScaledOutputs) for each in used):
        raise UsageError(
            f"{name} has an adapter that is no part of a matrix: only those of lora and adalora "
            "can be merged. Use the adapter beside the base: `megallm generate --model RUN`, or "
            "its folder of PEFT's."
        )


def _check_several(name: str, used: Sequence[nn.Module]) -> None:
    dora = [a for a in used if any(n.endswith(MAGNITUDE) for n, _ in a.named_parameters())]
    if len(used) > 1 and dora:
        raise UsageError(
            f"{name} has several adapters of which one is DoRA's: merge one at a time."
        )


class MergedSource:
    """A base and an adapter of it as the source of a plain model; one tensor at a time is whole.

    `model` is that of the result: where the adapter changes one end of tied weights alone, it has
    the head for itself. Of a base in 4 bit the values are those that its codes stand for, beside
    which the adapter was trained.
    """

    def __init__(
        self, base: WeightSource, adapter: WeightSource, config: PeftConfig, model: ModelConfig
    ) -> None:
        self.model, self.base = model, Joined(adapter, base)
        stage = whole_stage(model, Mesh.single("meta"))
        prepare_adapters(config, model)(stage)
        self.slots = {f"{name}.weight": module for name, module in slots_of(stage)}
        self.in_bits = {
            f"{name}.weight"
            for name, module in stage.named_modules()
            if isinstance(module, Linear) and module.quantized is not None
        }
        for name, module in self.slots.items():
            _check_matrix(name.removesuffix(".weight"), module)
            prefix = name.removesuffix("weight") + ADAPTER.strip(".")
            for leaf, _ in list(module.adapter.named_parameters()):
                at, _, last = leaf.rpartition(".")
                values = read_whole(adapter, f"{prefix}.{leaf}")
                values = values.to(wide_dtype(values.dtype))
                owner = module.adapter.get_submodule(at)
                owner.register_parameter(last, nn.Parameter(values, requires_grad=False))
        ends = {HEAD, EMBEDDING} & (self.slots.keys() | set(adapter.names()))
        if model.tie_embeddings and ends:
            self.model = replace(model, tie_embeddings=False)
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        names = {name for name in self.base.names() if ADAPTER not in name}
        return sorted(names if self.model.tie_embeddings else names | {HEAD})

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.base.info(self._stored(name))

    def _stored(self, name: str) -> str:
        """The name that the base has a tensor under: a head that was tied lies in the embedding."""
        return EMBEDDING if name == HEAD and HEAD not in self.base.owner else name

    @torch.no_grad()
    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        """Fill `tensor` with the box at `offset`, in the dtype it has, computed wide."""
        if name not in self.slots and name not in self.in_bits:
            self.base.read_into(self._stored(name), offset, tensor)
            return
        if self._last is None or self._last[0] != name:
            stored = self._stored(name)
            dtype = self.base.info(stored)[1]
            if name in self.in_bits:
                whole = rounded(read_whole(self.base, stored), wide_dtype(dtype))
            else:
                whole = read_whole(self.base, stored, wide_dtype(dtype))
            if name in self.slots:
                for adapter in self.slots[name].adapter.in_use():
                    adapter.add_to(whole)
            self._last = (name, whole)
        tensor.copy_(self._last[1][Box(tuple(offset), tuple(tensor.shape)).slices()])
