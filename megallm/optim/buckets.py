"""Which parameters share a flat buffer. Pure.

Parameters whose gradients travel the same way (same partial axes, same tie, same decay) and that sit in
neighbouring blocks are laid end to end, so a reduction is one message and an update is one loop.
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Member:
    """One parameter on this rank: its logical name, local element count and how its gradient is reduced."""

    name: str
    numel: int
    partial: tuple[str, ...] = ()
    tied: bool = False
    decay: bool = True

    @property
    def route(self) -> tuple[tuple[str, ...], bool, bool]:
        return (self.partial, self.tied, self.decay)


@dataclass(frozen=True)
class Bucket:
    """Members end to end; `offsets[i]` is where member i begins."""

    members: tuple[Member, ...]
    offsets: tuple[int, ...]
    numel: int

    @property
    def partial(self) -> tuple[str, ...]:
        return self.members[0].partial

    @property
    def tied(self) -> bool:
        return self.members[0].tied

    @property
    def decay(self) -> bool:
        return self.members[0].decay


def plan_buckets(members: list[Member], itemsize: int, bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Group members of one route, in model order, into buckets of about `bucket_bytes`; never splits a member."""
    open_lists: dict[tuple, list[Member]] = {}
    closed: list[list[Member]] = []
    for member in members:
        group = open_lists.setdefault(member.route, [])
        if group and (sum(m.numel for m in group) + member.numel) * itemsize > bucket_bytes:
            closed.append(group)
            open_lists[member.route] = group = []
        group.append(member)
    return [_bucket(group) for group in closed + list(open_lists.values())]


def _bucket(group: list[Member]) -> Bucket:
    offsets, total = [], 0
    for member in group:
        offsets.append(total)
        total += member.numel
    return Bucket(tuple(group), tuple(offsets), total)
