"""Gradient buckets: which parameters share a flat buffer, and which range of it a rank keeps. Pure.

Parameters whose gradients travel the same way (same partial axes, same tie) and that sit in
neighbouring units are laid end to end, so a reduction is one message and an update is one loop. The
buffer is padded to a multiple of the shard group, and rank k of the group keeps range k. Members
and ranges begin at multiples of `ALIGN`, so that an update gives the same bits however parameters
are laid out and divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from megallm.base.errors import InternalError

# Bytes of wide gradients in one message; ZeRO stage 3 has a bucket per block instead.
BUCKET_BYTES = 32 * 2**20
# Elements; what is left over at the end of a vectorised loop is rounded otherwise than the rest.
ALIGN = 16
# Padding of a bucket whose ranges hold whole matrices, as a share, at which it grows no further.
WASTE = 1 / 8


class ParamGroup(NamedTuple):
    """How the optimizer treats a parameter. A `frozen` one costs its weights and nothing else."""

    rule: str = "adamw"
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class BucketParam:
    """One parameter on this rank: its logical name, unit, local element count and how its gradient
    is reduced.

    `whole` elements in a row stay on one rank of the shard group (a matrix, for rules that need all
    of it): all of them, or a multiple of `ALIGN` that is the same on all ranks that split the
    parameter; 0: any elements may part. `max_numel` is the largest local count on any of those
    ranks, so that they all plan alike; 0: `numel`. `expert`: gradients are summed over edp, the
    ranks with the same experts, instead of dp x cp.
    """

    name: str
    numel: int
    unit: str
    partial: tuple[str, ...] = ()
    tied: bool = False
    param_group: ParamGroup = ParamGroup()
    whole: int = 0
    max_numel: int = 0
    expert: bool = False

    @property
    def bucket_key(self) -> tuple:
        """Equal for members that may share a bucket."""
        frozen = self.param_group.frozen
        return (
            self.partial,
            self.tied,
            "" if frozen else self.param_group.rule,
            self.whole > 0,
            self.expert,
            frozen,
        )

    @property
    def space(self) -> int:
        """Elements to leave for it, a multiple of `ALIGN`."""
        return _padded(self.max_numel or self.numel)

    @property
    def atomic_size(self) -> int:
        """The longest stretch that must stay on one rank; 0 when any may part."""
        return self.space if self.whole == self.numel else self.whole


@dataclass(frozen=True)
class Bucket:
    """Members one after another; `offsets[i]` is where member i begins, `numel` includes the
    padding, which is zero.
    """

    members: tuple[BucketParam, ...]
    offsets: tuple[int, ...]
    numel: int

    @property
    def partial(self) -> tuple[str, ...]:
        return self.members[0].partial

    @property
    def tied(self) -> bool:
        return self.members[0].tied

    @property
    def expert(self) -> bool:
        return self.members[0].expert

    @property
    def rule(self) -> str:
        return self.members[0].param_group.rule

    @property
    def frozen(self) -> bool:
        return self.members[0].param_group.frozen

    @property
    def units(self) -> frozenset[str]:
        return frozenset(member.unit for member in self.members)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """The padding after members, where there is some."""
        ends = [
            offset + member.numel for member, offset in zip(self.members, self.offsets, strict=True)
        ]
        return [
            gap
            for gap in zip(ends, (*self.offsets[1:], self.numel), strict=True)
            if gap[0] < gap[1]
        ]

    def shard_range(self, size: int, rank: int) -> tuple[int, int]:
        """Returns the elements that `rank` of `size` keeps."""
        each = self.numel // size
        return rank * each, (rank + 1) * each

    def slices(self, begin: int, end: int) -> list[ParamSlice]:
        """Returns the stretches of members inside `begin <= i < end`, in order."""
        cuts = []
        for member, offset in zip(self.members, self.offsets, strict=True):
            first, last = max(begin, offset), min(end, offset + member.numel)
            if first < last:
                cuts.append(ParamSlice(member, first - offset, last - offset, first - begin))
        return cuts

    def runs(self, begin: int, end: int) -> list[tuple[int, int, ParamGroup]]:
        """Returns `(first, last, param_group)` stretches of `begin <= i < end` treated alike,
        counted from `begin`.

        For `begin` and `end` of a shard they are whole multiples of `ALIGN`, padding included.
        """
        runs = []
        for param_group, cuts in groupby(
            self.slices(begin, end), key=lambda cut: cut.member.param_group
        ):
            cuts = list(cuts)
            runs.append(
                (
                    cuts[0].place,
                    _padded(cuts[-1].place + cuts[-1].end - cuts[-1].begin),
                    param_group,
                )
            )
        return runs


@dataclass(frozen=True)
class ParamSlice:
    """Elements `begin <= i < end` of a member's flat local tensor, found at `place` of a shard."""

    member: BucketParam
    begin: int
    end: int
    place: int

    def of(self, flat: Any) -> Any:
        """Returns the elements in a buffer that holds the shard."""
        return flat[self.place : self.place + self.end - self.begin]


def plan_buckets(
    members: list[BucketParam],
    itemsize: int,
    shards: int = 1,
    bucket_bytes: int = BUCKET_BYTES,
    by_unit: bool = False,
) -> list[Bucket]:
    """Join members of one route into buckets of about `bucket_bytes` (`by_unit`: one per unit);
    members are whole.

    Inside a bucket members that are treated alike lie together, those with most decay first, so
    that a shard has few runs. A bucket of members with a `whole` grows until it can be divided
    nearly evenly; what is left over at the end and cannot joins the bucket before it.
    """
    open_lists: dict[tuple, list[BucketParam]] = {}
    closed: list[list[BucketParam]] = []
    for member in members:
        group = open_lists.setdefault(member.bucket_key, [])
        full = group and (sum(m.space for m in group) + member.space) * itemsize > bucket_bytes
        if group and (group[-1].unit != member.unit if by_unit else full and _even(group, shards)):
            closed.append(group)
            open_lists[member.bucket_key] = group = []
        group.append(member)
    for group in open_lists.values():
        before = [other for other in closed if other[0].bucket_key == group[0].bucket_key]
        if before and not by_unit and not _even(group, shards):
            before[-1].extend(group)
        else:
            closed.append(group)
    return [_bucket(group, shards) for group in closed]


def _bucket(group: list[BucketParam], shards: int) -> Bucket:
    if group[0].whole and shards > 1:
        return _whole_bucket(group, shards)
    group = sorted(group, key=lambda m: (-m.param_group.weight_decay, m.param_group.lr_scale))
    offsets, total = [], 0
    for member in group:
        offsets.append(total)
        total += member.space
    return Bucket(tuple(group), tuple(offsets), _padded(total, shards * ALIGN))


# Members of which some elements must stay together


def _even(group: list[BucketParam], shards: int) -> bool:
    """Whether equal ranges cost little: `WASTE` of the elements at most."""
    total = sum(member.space for member in group)
    return (
        shards == 1
        or not group[0].whole
        or _whole_bucket(group, shards).numel <= (1 + WASTE) * total
    )


def _whole_bucket(group: list[BucketParam], shards: int) -> Bucket:
    """The smallest equal ranges that were found in which no `whole` lies across two of them."""
    total = sum(member.space for member in group)
    fair = max(_padded(-(-total // shards)), *(member.atomic_size for member in group))
    steps = {fair + _padded(fair * i // 32) for i in range(32 * shards)}
    steps |= {-(-fair // member.atomic_size) * member.atomic_size for member in group}
    for each in sorted(steps):
        starts = _fit(group, each, shards)
        if starts is not None:
            order = sorted(range(len(group)), key=lambda i: starts[i])
            return Bucket(
                tuple(group[i] for i in order), tuple(starts[i] for i in order), each * shards
            )
    raise InternalError(
        f"no ranges for {', '.join(m.name for m in group)} over {shards} ranks: the plan is wrong."
    )


def _fit(group: list[BucketParam], each: int, shards: int) -> list[int] | None:
    """Where each member begins when every range has `each` elements; None when that was not found
    to be possible.

    Stacks longer than a range are laid first, from one range into the next: what is in front of a
    boundary ends exactly there. The others go, longest first, into the first gap of one range that
    is left.
    """
    starts = [-1] * len(group)
    order = sorted(range(len(group)), key=lambda i: -group[i].space)
    gaps: list[tuple[int, int]] = []
    place = 0
    for i in order:
        member = group[i]
        if member.space <= each:
            continue
        boundary = (place // each + 1) * each
        head = min((boundary - place) // member.whole, member.numel // member.whole) * member.whole
        if member.numel - head > each and each % member.whole:
            return None
        starts[i] = boundary - head
        gaps.append((place, starts[i]))
        place = starts[i] + member.space
    if place > each * shards:
        return None
    boundary = min(-(-place // each), shards) * each
    gaps += [(place, boundary)] + [
        (begin, begin + each) for begin in range(boundary, each * shards, each)
    ]
    for i in order:
        if starts[i] < 0:
            gap = next(
                (k for k, (begin, end) in enumerate(gaps) if end - begin >= group[i].space), None
            )
            if gap is None:
                return None
            starts[i], end = gaps[gap]
            gaps[gap] = (starts[i] + group[i].space, end)
    return starts


def _padded(count: int, unit: int = ALIGN) -> int:
    return -(-count // unit) * unit
