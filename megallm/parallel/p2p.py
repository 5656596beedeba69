"""Messages between pipeline ranks: one channel per (source, destination, kind).

A channel carries messages in the order of the sender's plan, and the receiver posts its receives in
that same order, so two messages between the same peers can never be mistaken for one another, not
even when the previous and the next stage are the same rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import InternalError
from megallm.parallel import ledger
from megallm.parallel.mesh import Mesh
from megallm.parallel.schedule import Edge, Placement, pipeline_edges

Key = tuple[int, int]  # (micro, receiving stage)
POSTED = 2  # receives in flight on a channel of gloo; on nccl 1, as a waiting kernel keeps an SM


@dataclass
class Channel:
    """One direction between two ranks for one kind of message."""

    source: int
    destination: int
    group: dist.ProcessGroup
    ahead: int = POSTED
    expected: deque[Key] = field(default_factory=deque)
    posted: deque[tuple[Key, Tensor, dist.Work]] = field(default_factory=deque)
    sent: deque[tuple[Tensor, dist.Work]] = field(default_factory=deque)

    def open(self, rank: int, device: torch.device) -> None:
        """Exchange an empty message, so that both ends are connected."""
        x = torch.zeros(1, device=device)
        if rank == self.source:
            ledger.isend(x, self.destination, group=self.group).wait()
        else:
            ledger.irecv(x, self.source, group=self.group).wait()

    def send(self, x: Tensor) -> None:
        """Start sending; the tensor is kept alive until it has left."""
        while self.sent and self.sent[0][1].is_completed():
            self.sent.popleft()
        x = x.contiguous()
        self.sent.append((x, ledger.isend(x, self.destination, group=self.group)))

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
        while self.expected and len(self.posted) < self.ahead:
            buffer = self.new_buffer()
            work = ledger.irecv(buffer, self.source, group=self.group)
            self.posted.append((self.expected.popleft(), buffer, work))


def open_channels(mesh: Mesh, placement: Placement) -> dict[tuple[int, int, str], Channel]:
    """Returns this rank's channels by (source, destination, kind), in global ranks; collective over
    pp, and every rank of the world makes equally many groups.

    The messages of a kind that go up the ranks have a group of the whole line, those that go down
    another. nccl gives each pair of ranks of a group a communicator of its own, on which work runs
    in order of issue: there it carries one channel. It is made at its first message, for which
    both hosts wait: the channels are opened here, in one order everywhere, before any plan posts
    its receives.
    """
    channels, line = {}, mesh.pp.ranks
    edges = pipeline_edges(placement)
    known = mesh.lines.get(placement)  # of another model on this mesh: they take turns
    groups = known or {
        way: mesh.group(line, opened=False) for way in dict.fromkeys(map(_way, edges))
    }
    mesh.lines[placement] = groups
    for group in groups.values():
        ledger.say_purpose(group, "pp")
    for edge in edges:
        if mesh.pp.rank in edge[:2]:
            source, destination, kind = line[edge[0]], line[edge[1]], edge[2]
            ahead = 1 if mesh.connects_late else POSTED
            channel = Channel(source, destination, groups[_way(edge)], ahead)
            channels[source, destination, kind] = channel
            if mesh.connects_late and known is None:
                channel.open(mesh.rank, mesh.device)
    return channels


def _way(edge: Edge) -> tuple[str, bool]:
    return edge[2], edge[0] < edge[1]
