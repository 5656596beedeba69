"""Which parameters share a flat buffer, and which range of it a rank keeps. Pure.

Parameters whose gradients travel the same way (same partial axes, same tie) and that sit in neighbouring
units are laid end to end, so a reduction is one message and an update is one loop. The buffer is padded to
a multiple of the shard group, and rank k of the group keeps range k. Members and ranges begin at multiples of
`ALIGN`, so that an update gives the same bits however parameters are laid out and divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

ALIGN = 16  # elements; what is left over at the end of a vectorised loop is rounded otherwise than the rest


@dataclass(frozen=True)
class Member:
    """One parameter on this rank: its logical name, unit, local element count and how its gradient is reduced."""

    name: str
    numel: int
    unit: str
    partial: tuple[str, ...] = ()
    tied: bool = False
    decay: bool = True

    @property
    def route(self) -> tuple[tuple[str, ...], bool]:
        return (self.partial, self.tied)


@dataclass(frozen=True)
class Bucket:
    """Members one after another; `offsets[i]` is where member i begins, `numel` includes the padding, which is zero."""

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
    def units(self) -> frozenset[str]:
        return frozenset(member.unit for member in self.members)

    def shard_range(self, size: int, rank: int) -> tuple[int, int]:
        """The elements that `rank` of `size` keeps."""
        each = self.numel // size
        return rank * each, (rank + 1) * each

    def cuts(self, begin: int, end: int) -> list[Cut]:
        """The stretches of members inside `begin <= i < end`, in order."""
        cuts = []
        for member, offset in zip(self.members, self.offsets, strict=True):
            first, last = max(begin, offset), min(end, offset + member.numel)
            if first < last:
                cuts.append(Cut(member, first - offset, last - offset, first - begin))
        return cuts

    def decay_runs(self, begin: int, end: int) -> list[tuple[int, int, bool]]:
        """`(first, last, decay)` stretches of `begin <= i < end` with one decay flag, counted from `begin`.

        For `begin` and `end` of a shard they are whole multiples of `ALIGN`, padding included.
        """
        runs = []
        for decay, cuts in groupby(self.cuts(begin, end), key=lambda cut: cut.member.decay):
            cuts = list(cuts)
            runs.append((cuts[0].place, _padded(cuts[-1].place + cuts[-1].end - cuts[-1].begin), decay))
        return runs


@dataclass(frozen=True)
class Cut:
    """Elements `begin <= i < end` of a member's flat local tensor, found at `place` of a shard."""

    member: Member
    begin: int
    end: int
    place: int


def plan_buckets(
    members: list[Member], itemsize: int, shards: int = 1, bucket_bytes: int = 32 * 2**20, by_unit: bool = False
) -> list[Bucket]:
    """Group members of one route into buckets of about `bucket_bytes` (`by_unit`: one per unit); members are whole.

    Inside a bucket decayed members come first, so that a shard has at most two runs of decay.
    """
    open_lists: dict[tuple, list[Member]] = {}
    closed: list[list[Member]] = []
    for member in members:
        group = open_lists.setdefault(member.route, [])
        full = group and (sum(m.numel for m in group) + member.numel) * itemsize > bucket_bytes
        if group and (group[-1].unit != member.unit if by_unit else full):
            closed.append(group)
            open_lists[member.route] = group = []
        group.append(member)
    return [_bucket(group, shards) for group in closed + list(open_lists.values())]


def _bucket(group: list[Member], shards: int) -> Bucket:
    group = sorted(group, key=lambda member: not member.decay)
    offsets, total = [], 0
    for member in group:
        offsets.append(total)
        total += _padded(member.numel)
    return Bucket(tuple(group), tuple(offsets), _padded(total, shards * ALIGN))


def _padded(count: int, unit: int = ALIGN) -> int:
    return -(-count // unit) * unit
