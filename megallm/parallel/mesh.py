"""The process groups of one layout. A `Mesh` is passed to whoever needs it; there is no global
one.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megallm.base import shared_memory
from megallm.base.errors import UsageError
from megallm.base.payload import from_payload, to_payload
from megallm.parallel import ledger
from megallm.parallel.layout import PURPOSES, Layout, grid_lines


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


def device_backend(device: torch.device) -> str | None:
    """Returns what moves tensors of a device between the ranks of a group; None: what the world
    has.
    """
    return "nccl" if device.type == "cuda" else None


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
        self.lines: dict[Hashable, dict[tuple, dist.ProcessGroup]] = {}  # by placement (`p2p`)
        if axes:
            self._name_axes()

    def _name_axes(self) -> None:
        axes = self.axes
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
        mesh = Mesh(layout, dist.get_rank(), torch.device(device), {})
        ledger.note_group(dist.group.WORLD, range(layout.world))
        ledger.say_purpose(dist.group.WORLD, "world")
        mesh._open(dist.group.WORLD)
        made = {tuple(range(layout.world)): dist.group.WORLD}
        for ranks in layout.communicators(mesh.rank):
            if ranks not in made:
                made[ranks] = mesh.group(ranks)
        for purpose in PURPOSES:
            ranks = layout.ranks(purpose, of=mesh.rank)
            axis = Axis(purpose, ranks.index(mesh.rank), len(ranks), ranks, made.get(ranks), broken)
            ledger.say_purpose(axis.group, purpose)
            mesh.axes[purpose] = axis
        mesh._name_axes()
        return mesh

    def group(self, ranks: tuple[int, ...], opened: bool = True) -> dist.ProcessGroup:
        """Returns a new group of the given ranks, this one among them, with the time limit of the
        world; only its members wait for each other.

        Every rank calls this equally often, each with the ranks of its own group, alone where it
        has none: torch names a group by its ranks and by how many groups the process has. On GPUs
        the group is nccl's alone (gloo, for the host, has the world only), and its communicator
        is made here and not inside a step (`opened`). Not by binding a `device_id` to the world:
        torch would then split each communicator off the world's, with all ranks taking part.
        """
        group = dist.new_group(
            list(ranks),
            timeout=dist.group.WORLD._get_backend(self.device).options._timeout,
            backend=device_backend(self.device),
            use_local_synchronization=True,
        )
        ledger.note_group(group, ranks)
        if opened and len(ranks) > 1:
            self._open(group)
        return group

    @property
    def connects_late(self) -> bool:
        """Whether communicators are made at first use (nccl): gloo and shared memory connect when a
        group is made.
        """
        return dist.get_backend() not in ("gloo", shared_memory.NAME)

    def _open(self, group: dist.ProcessGroup) -> None:
        if self.connects_late:
            ledger.all_reduce(torch.zeros(1, device=self.device), group=group)

    def view(self, name: str, inner: int) -> tuple[Axis, Axis]:
        """Returns an axis as a grid `(outer, inner)`: `inner` neighbours form the inner axis, equal
        places the outer one.

        Collective over the axis the first time a view is asked for; `inner` divides the axis's
        size.
        """
        if (name, inner) not in self.views:
            axis = self.axes[name]
            alone = Axis(name, ranks=(self.rank,), broken=axis.broken)
            if inner in (1, axis.size):
                self.views[name, inner] = (axis, alone) if inner == 1 else (alone, axis)
            else:
                lines = grid_lines(axis.ranks, axis.rank, inner)
                self.views[name, inner] = tuple(self._axis(axis, ranks) for ranks in lines)
        return self.views[name, inner]

    def _axis(self, axis: Axis, ranks: tuple[int, ...]) -> Axis:
        place = ranks.index(self.rank)
        return Axis(axis.name, place, len(ranks), ranks, self.group(ranks), axis.broken)

    # Control messages: JSON over the world group, never pickle.

    def gather_json(self, value: Any) -> list[Any] | None:
        """Gathers every rank's value on rank 0, None elsewhere; collective over the world."""
        if self.world.size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world.size, dtype=torch.int64)
        sizes[self.world.rank] = payload.numel()
        ledger.all_reduce(sizes, group=self.world.group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = (
            [torch.empty_like(padded) for _ in range(self.world.size)]
            if self.world.rank == 0
            else None
        )
        ledger.gather(padded, rows, dst=0, group=self.world.group)
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
        ledger.broadcast(size, 0, group=self.world.group)
        if self.world.rank != 0:
            payload = torch.empty(int(size), dtype=torch.uint8)
        ledger.broadcast(payload, 0, group=self.world.group)
        return json.loads(bytes(payload.numpy()))

    def all_values(self, value: Any, axis: Axis) -> list[Any]:
        """Returns the values of an axis's ranks, in their order: what JSON can hold, with arrays of
        numpy in it, which are sent in binary; collective over the axis.
        """
        if axis.size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(to_payload(value)), dtype=torch.uint8)
        sizes = torch.empty(axis.size, dtype=torch.int64, device=self.device)
        own = torch.tensor([payload.numel()], device=self.device)
        ledger.all_gather_into_tensor(sizes, own, group=axis.group)
        counts = sizes.tolist()
        padded = torch.zeros(max(counts), dtype=torch.uint8, device=self.device)
        padded[: payload.numel()] = payload.to(self.device)
        rows = torch.empty(axis.size * max(counts), dtype=torch.uint8, device=self.device)
        ledger.all_gather_into_tensor(rows, padded, group=axis.group)
        pairs = zip(rows.cpu().view(axis.size, -1), counts, strict=True)
        return [from_payload(row[:count].numpy().tobytes()) for row, count in pairs]

    def largest(self, value: int) -> int:
        """Returns the largest of every rank's value; collective over the world."""
        if self.world.size == 1:
            return value
        vote = torch.tensor([value])
        ledger.all_reduce(vote, dist.ReduceOp.MAX, group=self.world.group)
        return int(vote)

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        if self.world.size > 1:
            ledger.all_reduce(torch.zeros(1), group=self.world.group)
