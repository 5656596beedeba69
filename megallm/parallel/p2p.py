"""Messages between pipeline ranks: one two-rank group per (source, destination, kind).

A channel carries messages in the order of the sender's plan, and the receiver posts its receives in
that same order, so two messages between the same peers can never be mistaken for one another, not
even when the previous and the next stage are the same rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import InternalError
from megallm.parallel.mesh import Mesh
from megallm.parallel.schedule import BACKWARD, FORWARD, Placement

Key = tuple[int, int]  # (micro, receiving stage)
POSTED = 2  # receives kept in flight on a channel


@dataclass
class Channel:
    """One direction between two ranks for one kind of message."""

    source: int
    destination: int
    group: dist.ProcessGroup
    expected: deque[Key] = field(default_factory=deque)
    posted: deque[tuple[Key, Tensor, dist.Work]] = field(default_factory=deque)
    sent: deque[tuple[Tensor, dist.Work]] = field(default_factory=deque)

    def send(self, x: Tensor) -> None:
        """Start sending; the tensor is kept alive until it has left."""
        while self.sent and self.sent[0][1].is_completed():
            self.sent.popleft()
        x = x.contiguous()
        self.sent.append((x, dist.isend(x, self.destination, group=self.group)))

    def expect(self, keys: Sequence[Key], new_buffer: Callable[[], Tensor]) -> None:
        """Name the coming messages in the sender's order and post the first receives."""
        self.expected.extend(keys)
        self.new_buffer = new_buffer
        self._post()

    def take(self, key: Key) -> Tensor:
        """Wait for the next message, which has to be `key`."""
        if not self.posted:
            raise InternalError(
                f"The plan asks for {key} from channel {self.source}->{self.destination}; nothing "
                "is due."
            )
        posted, buffer, work = self.posted.popleft()
        if posted != key:
            raise InternalError(
                f"The channel {self.source}->{self.destination} delivers {posted}, the plan asks "
                f"for {key}."
            )
        work.wait()
        self._post()
        return buffer

    def flush(self) -> None:
        """Wait until everything sent has left."""
        while self.sent:
            self.sent.popleft()[1].wait()

    def _post(self) -> None:
        while self.expected and len(self.posted) < POSTED:
            buffer = self.new_buffer()
            work = dist.irecv(buffer, self.source, group=self.group)
            self.posted.append((self.expected.popleft(), buffer, work))


def open_channels(mesh: Mesh, placement: Placement) -> dict[tuple[int, int, str], Channel]:
    """Returns this rank's channels by (source, destination, kind), in global ranks; collective over
    the world.
    """
    channels = {}
    holders = [placement.rank_of(stage) for stage in range(placement.num_stages)]
    edges = [(a, b, FORWARD) for a, b in pairwise(holders)] + [
        (b, a, BACKWARD) for a, b in pairwise(holders)
    ]
    for line in mesh.layout.groups("pp"):
        for a, b, kind in dict.fromkeys(edge for edge in edges if edge[0] != edge[1]):
            source, destination = line[a], line[b]
            group = mesh.pair((min(source, destination), max(source, destination)))
            if mesh.rank in (source, destination):
                channels[source, destination, kind] = Channel(source, destination, group)
    return channels
