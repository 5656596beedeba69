"""The process groups of one layout. A `Mesh` is passed to whoever needs it; there is no global
one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megallm.base.errors import UsageError
from megallm.base.payload import from_payload, to_payload
from megallm.parallel.layout import PURPOSES, Layout


@dataclass(frozen=True)
class Axis:
    """This rank's view of one group: its own place, the size, the global ranks, the process group.

    `broken` names the reductions that are left out on purpose (the oracle's negative controls).
    """

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    broken: frozenset[str] = frozenset()


class Mesh:
    """Groups by purpose (`tp cp dp pp data grads model ep expert_grads world`) of this rank in a
    layout.

    `Mesh.single()` has size 1 everywhere and makes each collective the identity, so one-process
    code and parallel code are the same code.
    """

    def __init__(
        self, layout: Layout, rank: int, device: torch.device, axes: dict[str, Axis]
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.device = device
        self.coords = layout.coords(rank)
        self.axes = axes
        self.views: dict[tuple[str, int], tuple[Axis, Axis]] = {}
        self.tp, self.cp, self.dp, self.pp = axes["tp"], axes["cp"], axes["dp"], axes["pp"]
        self.data, self.grads, self.model, self.world = (
            axes["data"],
            axes["grads"],
            axes["model"],
            axes["world"],
        )
        self.ep, self.expert_grads = axes["ep"], axes["expert_grads"]

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """Returns the mesh of one process: every axis has size 1."""
        return Mesh(Layout(), 0, torch.device(device), {name: Axis(name) for name in PURPOSES})

    @staticmethod
    def start(
        layout: Layout, device: torch.device | str = "cpu", broken: frozenset[str] = frozenset()
    ) -> Mesh:
        """Create this rank's groups; collective over the world, after `init_process_group`.

        Raises UsageError when the world is not of the layout's size.
        """
        if layout.world == 1:
            axes = {name: Axis(name, broken=broken) for name in PURPOSES}
            return Mesh(layout, 0, torch.device(device), axes)
        if dist.get_world_size() != layout.world:
            raise UsageError(
                f"{dist.get_world_size()} processes were started, but the layout pp={layout.pp} "
                f"dp={layout.dp} cp={layout.cp} tp={layout.tp} needs {layout.world}."
            )
        rank = dist.get_rank()
        made: dict[tuple[int, ...], dist.ProcessGroup] = {
            tuple(range(layout.world)): dist.group.WORLD
        }
        axes = {}
        for purpose in PURPOSES:
            ranks = layout.ranks(purpose, of=rank)
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
            axes[purpose] = Axis(
                purpose, ranks.index(rank), len(ranks), ranks, made.get(ranks), broken
            )
        return Mesh(layout, rank, torch.device(device), axes)

    def pair(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Returns a new group of the given ranks; collective over the world: every rank makes every
        pair in one order.

        `use_local_synchronization` would not do: torch derives the group's name from how many
        groups the process already has, and that differs between the middle and the ends of a
        pipeline.
        """
        return dist.new_group(list(ranks))

    def view(self, name: str, inner: int) -> tuple[Axis, Axis]:
        """Returns an axis as a grid `(outer, inner)`: `inner` neighbours form the inner axis, equal
        places the outer one.

        Collective over the world the first time a view is asked for; `inner` divides the axis's
        size.
        """
        if (name, inner) not in self.views:
            axis = self.axes[name]
            alone = Axis(name, ranks=(self.rank,), broken=axis.broken)
            if inner in (1, axis.size):
                self.views[name, inner] = (axis, alone) if inner == 1 else (alone, axis)
            else:
                self.views[name, inner] = self._grid(axis, inner)
        return self.views[name, inner]

    def _grid(self, axis: Axis, inner: int) -> tuple[Axis, Axis]:
        mine: list[Axis] = []
        for line in self.layout.groups(axis.name):  # every rank makes every group, in one order
            outer = [line[first::inner] for first in range(inner)]
            for ranks in (
                *outer,
                *(line[begin : begin + inner] for begin in range(0, len(line), inner)),
            ):
                group = dist.new_group(list(ranks))
                if self.rank in ranks:
                    mine.append(
                        Axis(
                            axis.name, ranks.index(self.rank), len(ranks), ranks, group, axis.broken
                        )
                    )
        return mine[0], mine[1]

    # Control messages: JSON over the world group, never pickle.

    def gather_json(self, value: Any) -> list[Any] | None:
        """Gathers every rank's value on rank 0, None elsewhere; collective over the world."""
        if self.world.size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world.size, dtype=torch.int64)
        sizes[self.world.rank] = payload.numel()
        dist.all_reduce(sizes, group=self.world.group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = (
            [torch.empty_like(padded) for _ in range(self.world.size)]
            if self.world.rank == 0
            else None
        )
        dist.gather(padded, rows, dst=0, group=self.world.group)
        if rows is None:
            return None
        return [
            json.loads(bytes(row[:n].numpy())) for row, n in zip(rows, sizes.tolist(), strict=True)
        ]

    def broadcast_json(self, value: Any) -> Any:
        """Broadcasts rank 0's value to every rank; collective over the world."""
        if self.world.size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([payload.numel()])
        dist.broadcast(size, 0, group=self.world.group)
        if self.world.rank != 0:
            payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.world.group)
        return json.loads(bytes(payload.numpy()))

    def all_values(self, value: Any, axis: Axis) -> list[Any]:
        """Returns the values of an axis's ranks, in their order: what JSON can hold, with arrays of
        numpy in it, which are sent in binary; collective over the axis.
        """
        if axis.size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(to_payload(value)), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(axis.size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=axis.group)
        counts = [int(size) for size in sizes]
        padded = torch.zeros(max(counts), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(rows, padded, group=axis.group)
        pairs = zip(rows, counts, strict=True)
        return [from_payload(row[:count].numpy().tobytes()) for row, count in pairs]

    def largest(self, value: int) -> int:
        """Returns the largest of every rank's value; collective over the world."""
        if self.world.size == 1:
            return value
        vote = torch.tensor([value])
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.world.group)
        return int(vote)

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        if self.world.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.world.group)
