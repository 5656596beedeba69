"""Sources of weights (`convert.weights.WeightSource`) made of others: several joined, tensors in
memory, and a base with an adapter merged into it, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megallm.convert.weights import WeightSource
from megallm.parallel.shard import Box


class Joined:
    """The tensors of several sources; the first that has a name counts. `meta` is the first's."""

    def __init__(self, *sources: Any) -> None:
        self.sources = sources
        self.owner = {name: each for each in reversed(sources) for name in each.names()}

    @property
    def meta(self) -> Any:
        """What the first source, a checkpoint's CheckpointReader, remembers beside tensors."""
        return self.sources[0].meta

    def names(self) -> list[str]:
        return sorted(self.owner)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.owner.get(name, self.sources[0]).info(name)

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        self.owner.get(name, self.sources[0]).read_into(name, offset, tensor)


class TensorSource:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        box = Box(tuple(offset), tuple(tensor.shape))
        tensor.copy_(self.tensors[name][box.slices()])


def read_whole(source: WeightSource, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns one tensor of a source, in `dtype` (None: as stored)."""
    full, stored = source.info(name)
    whole = torch.empty(full, dtype=dtype or stored)
    source.read_into(name, (0,) * len(full), whole)
    return whole
