"""The logical state of a rank: which boxes of which logical tensors its flat buffers hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor

from megallm.checkpoint.plan import boxes_of_range
from megallm.optim.zero import ShardedParameters
from megallm.parallel.shard import Box, Shard


class Piece(NamedTuple):
    """A box of the logical tensor `name`, as a view of a flat buffer."""

    name: str
    shard: Shard
    box: Box
    tensor: Tensor


def pieces(parameters: ShardedParameters, flats: Mapping[int, Tensor]) -> Iterator[Piece]:
    """The pieces in buffers that hold, by the number of a bucket, this rank's range of it."""
    mesh = parameters.mesh
    for index, flat in flats.items():
        bucket = parameters.flat[index]
        for cut in parameters.cuts(bucket):
            name, place = cut.member.name, cut.place
            shard = parameters.shards[name]
            origin = shard.box(mesh.layout, mesh.coords).offset
            for box in boxes_of_range(parameters.shapes[name], cut.begin, cut.end):
                count = prod(box.shape)
                offset = tuple(a + b for a, b in zip(origin, box.offset, strict=True))
                yield Piece(name, shard, Box(offset, box.shape), flat[place : place + count].view(box.shape))
                place += count
