"""Messages between pipeline ranks: one two-rank group per (source, destination, kind).

A wire carries messages in the order of the sender's plan, and the receiver posts its receives in that
same order, so two messages between the same peers can never be mistaken for one another, not even when
the previous and the next stage are the same rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import InternalError
from megallm.parallel.mesh import Mesh

Key = tuple[int, int]  # (micro, receiving stage)
POSTED = 2  # receives kept in flight on a wire


@dataclass
class Wire:
    """One direction between two ranks for one kind of message."""

    source: int
    destination: int
    group: dist.ProcessGroup
    expected: deque[Key] = field(default_factory=deque)
    posted: deque[tuple[Key, Tensor, dist.Work]] = field(default_factory=deque)
    sent: list[tuple[Tensor, dist.Work]] = field(default_factory=list)

    def send(self, x: Tensor) -> None:
        """Start sending; the tensor is kept alive until `flush`."""
        x = x.contiguous()
        self.sent.append((x, dist.isend(x, self.destination, group=self.group)))

    def expect(self, keys: Sequence[Key], new_buffer: Callable[[], Tensor]) -> None:
        """Announce the coming messages in the sender's order and post the first receives."""
        self.expected.extend(keys)
        self.new_buffer = new_buffer
        self._post()

    def take(self, key: Key) -> Tensor:
        """Wait for the next message, which has to be `key`."""
        posted, buffer, work = self.posted.popleft()
        if posted != key:
            raise InternalError(f"The wire {self.source}->{self.destination} delivers {posted}, the plan asks for {key}.")
        work.wait()
        self._post()
        return buffer

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for _, work in self.sent:
            work.wait()
        self.sent.clear()

    def _post(self) -> None:
        while self.expected and len(self.posted) < POSTED:
            buffer = self.new_buffer()
            work = dist.irecv(buffer, self.source, group=self.group)
            self.posted.append((self.expected.popleft(), buffer, work))


def open_wires(mesh: Mesh) -> dict[tuple[str, str], Wire]:
    """This rank's wires along its pipeline line: `("in"|"out", "F"|"B")`; collective over the world."""
    wires = {}
    for early, late in (pair for line in mesh.layout.groups("pp") for pair in pairwise(line)):
        for kind, source, destination in (("F", early, late), ("B", late, early)):
            group = mesh.pair((early, late))
            if mesh.rank in (early, late):
                wires["out" if mesh.rank == source else "in", kind] = Wire(source, destination, group)
    return wires


def empty_like_hidden(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A maker of receive buffers of one shape."""
    return lambda: torch.empty(shape, dtype=dtype, device=device)
