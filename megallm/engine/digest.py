"""Checksums of the state: one number for the logical weights, whatever the layout, and one for each
tensor that several ranks hold alike.

A checksum is a sum modulo 2^64 over the elements: of each the bits, mixed, times an odd number that
says where it stands in the logical tensor. A flipped bit changes it; the order of the sum, and who
holds which elements, do not. Integers only: every device computes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megallm.engine.engine import Engine
from megallm.parallel.shard import Box

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # elements at a time: what is made of them stays in a cache
_MIX = 0x9E3779B97F4A7C15 - 2**64  # odd: 2^64 over the golden ratio
_SHIFT = 29


def checksum(tensor: Tensor, box: Box | None = None, full: tuple[int, ...] = ()) -> Tensor:
    """Returns the checksum of a box of a logical tensor of the shape `full` (None: the tensor is
    whole), an int64 scalar on its device; those of boxes that make up a tensor add up to its own.
    """
    bits = tensor.detach().contiguous()
    bits = bits.reshape(1, -1) if tensor.ndim < 2 else bits.flatten(0, -2)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not bits.numel():
        return total
    bits = bits.view(_BITS[tensor.element_size()])
    starts = _row_starts(box or Box((0,) * tensor.ndim, tuple(tensor.shape)), full, tensor)
    width = bits.shape[1]
    columns = torch.arange(width, dtype=torch.int64, device=tensor.device)
    rows = max(1, _CHUNK // width)
    for begin in range(0, len(bits), rows):
        x = bits[begin : begin + rows].to(torch.int64)
        x = (x + 1) * _MIX
        x ^= x >> _SHIFT
        # sum of x (2 (start + column) + 1) over the row
        weights = 2 * starts[begin : begin + rows] + 1
        total += (x.sum(1) * weights).sum() + 2 * (x * columns).sum()
    return total


def _row_starts(box: Box, full: tuple[int, ...], tensor: Tensor) -> Tensor:
    """The place in the logical tensor of the first element of each row of a box."""
    full = full or tuple(tensor.shape) or (1,)
    offset, shape = (box.offset, box.shape) if box.shape else ((0,), (1,))
    starts = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for dim, (begin, count) in enumerate(zip(offset, shape, strict=True)):
        stride = prod(full[dim + 1 :])
        if dim == len(full) - 1:
            return (starts + begin).reshape(-1)
        places = torch.arange(begin, begin + count, dtype=torch.int64, device=tensor.device)
        starts = (starts[..., None] + places * stride).reshape(-1)
    return starts.reshape(-1)


def key_of_tensor(name: str) -> int:
    """Returns an odd number of 63 bits that stands for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1 | 1


def weights_digest(engine: Engine) -> str:
    """Returns 16 hexadecimal digits of the logical weights that are trained (the wide masters), the
    same at every layout that holds the same bits; collective over the world.
    """
    total = torch.zeros((), dtype=torch.int64, device=engine.mesh.device)
    for held in engine.masters():
        if engine.parameters.owns(held.name) and engine.parameters.params[held.name].requires_grad:
            part = checksum(held.tensor, held.box, held.shard.full)
            total += part.to(total.device) * key_of_tensor(held.name)
    if engine.mesh.world.size > 1:
        dist.all_reduce(total, group=engine.mesh.world.group)
    return f"{int(total) % 2**64:016x}"


# Replicas


class Replicated(NamedTuple):
    """A tensor of this rank by what identifies it: ranks with an equal `key` hold equal bits."""

    key: str
    tensor: Tensor


class Mismatch(NamedTuple):
    """Ranks that hold other bits of a tensor than most of its holders; with no majority (two
    holders) all of them are `ranks` and `others` is empty.
    """

    name: str
    ranks: tuple[int, ...]
    others: tuple[int, ...]


def replicated(engine: Engine) -> Iterator[Replicated]:
    """Yields every tensor of the state, and of the parameters as the model has them where ZeRO
    keeps them whole beside its own range.
    """
    for held in engine.state():
        yield Replicated(f"{held.name} {held.box.offset} {held.box.shape}", held.tensor)
    mesh, parameters = engine.mesh, engine.parameters
    for bucket in parameters.flat:
        bucket.settle()
        if bucket.shard.size == 1 or bucket.frees_params:
            continue
        for member in bucket.plan.members:
            box = parameters.shards[member.name].box(mesh.layout, mesh.coords)
            key = f"parameter {member.name} {box.offset} {box.shape}"
            yield Replicated(key, parameters.views[member.name])


def bits_hash(tensor: Tensor) -> int:
    """Returns a hash of 63 bits of a tensor's bits: xxh3 on the host (10 GB/s), `checksum`
    elsewhere.
    """
    if tensor.device.type != "cpu":
        return int(checksum(tensor)) & (2**63 - 1)
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.numpy()) >> 1


class ReplicaCheck:
    """Compares what ranks hold alike, over dp, cp, tp, ep and tied stages: whatever is replicated.

    Each rank hashes its tensors; rank 0 gets 8 bytes for each and finds those that differ. Which
    tensors there are is told once.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._keys: list[list[str]] | None = None
        self._told = False

    def differences(self) -> list[Mismatch]:
        """Returns what differs, the same on every rank; collective over the world."""
        mesh = self.engine.mesh
        if mesh.world.size == 1:
            return []
        held = list(replicated(self.engine))
        if not self._told:
            self._keys = mesh.gather_json([each.key for each in held])
            self._told = True
        hashes = mesh.gather_json([bits_hash(each.tensor) for each in held])
        found: Any = None
        if self._keys is not None:
            found = compare_hashes(self._keys, hashes)
        return [
            Mismatch(name, tuple(ranks), tuple(others))
            for name, ranks, others in mesh.broadcast_json(found)
        ]


def compare_hashes(keys: list[list[str]], hashes: list[list[int]]) -> list[Mismatch]:
    """Returns the tensors whose holders do not all have the same hash; lists by rank. Pure."""
    holders: dict[str, dict[int, list[int]]] = {}
    for rank, (names, values) in enumerate(zip(keys, hashes, strict=True)):
        for name, value in zip(names, values, strict=True):
            holders.setdefault(name, {}).setdefault(value, []).append(rank)
    found = []
    for name, by_hash in holders.items():
        if len(by_hash) == 1:
            continue
        groups = sorted(by_hash.values(), key=len, reverse=True)
        everybody = sum(map(len, groups))
        if 2 * len(groups[0]) > everybody:
            odd = tuple(sorted(rank for group in groups[1:] for rank in group))
            found.append(Mismatch(name, odd, tuple(groups[0])))
        else:
            everyone = tuple(sorted(rank for group in groups for rank in group))
            found.append(Mismatch(name, everyone, ()))
    return found
