"""Parameters, gradients and their reductions on one rank: ZeRO 0 to 3 as one mechanism (arXiv
1910.02054).

This is the distributed optimizer of Megatron-LM (stage 1) and fully sharded data parallelism (stage
3). Gradient accumulation over microbatches happens here, wide, in one flat buffer a bucket.

The pipeline says when a stage's gradients of a microbatch are complete, the stage says when a unit
is about to be used or done with; this class gathers, lets go, accumulates wide and reduces as the
Shard records and the ZeRO stage ask. Messages start as soon as their gradients are complete; at
most IN_FLIGHT of them are waited for before `finish`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, product
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megallm.base.heartbeat import HEARTBEAT
from megallm.ops.precision import wide_dtype
from megallm.optim import buckets
from megallm.optim.buckets import BucketParam, ParamGroup, ParamSlice, plan_buckets
from megallm.optim.config import ZeroConfig
from megallm.optim.flat import FlatBucket
from megallm.optim.rules import whole_elements
from megallm.optim.tree import TreeSum, exchanger, tree_all_reduce_
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Entry
from megallm.parallel.units import unit_of

# Reduce-scatters of one microbatch's gradients under way; each holds a whole bucket until done.
IN_FLIGHT = 2


class Division(NamedTuple):
    """Who divides the state (`shard`), and who holds the same range (`replica`); together they sum
    gradients.
    """

    shard: Axis
    replica: Axis


class Sharing(NamedTuple):
    """Who divides the state of dense parameters and of experts, and who shares the embedding
    (`tie`, under the logical name `tied_name`).

    `units` names units that several local stages use (an embedding that is also the head): their
    gradient is complete only at the end of the step.
    """

    dense: Division
    experts: Division
    tie: Axis
    tied_name: str
    units: frozenset[str] = frozenset()


class ShardedParameters:
    """All parameters of this rank's stages. Listens to the pipeline (`starts`, `stage_done`) and to
    units.
    """

    def __init__(
        self,
        entries: list[Entry],
        mesh: Mesh,
        dtype: torch.dtype,
        options: ZeroConfig,
        sharing: Sharing,
        param_groups: Mapping[str, ParamGroup],
        tree: bool = False,
    ) -> None:
        self.mesh, self.options, self.groups, self.shared = mesh, options, sharing, sharing.units
        self.param_groups = param_groups
        self.shards = {entry.name: entry.shard for entry in entries}
        self.shapes = {entry.name: entry.param.shape for entry in entries}
        self.tied_name = sharing.tied_name if sharing.tie.size > 1 else None
        self.flat = self._allocate(entries, dtype)
        self.params: dict[str, nn.Parameter] = {}
        self.trainable = [bucket for bucket in self.flat if not bucket.frozen]
        self.views = {
            name: view for bucket in self.flat for name, view in bucket.views(self.shapes).items()
        }
        self.by_unit: dict[str, list[FlatBucket]] = {}
        self.by_stage: dict[int, list[str]] = {}
        for bucket in self.flat:
            for unit in sorted(bucket.plan.units):
                self.by_unit.setdefault(unit, []).append(bucket)
        for entry in entries:
            units = self.by_stage.setdefault(entry.stage, [])
            if unit_of(entry.name) not in units:
                units.append(unit_of(entry.name))
        self.ahead, self.behind = self._neighbours()
        self.tree, self.trees = tree, [TreeSum() for _ in self.flat] if tree else []
        self.note(0)
        self.keeps = False  # all parameters stay gathered (`gathered`)
        self._reset()

    def _allocate(self, entries: list[Entry], dtype: torch.dtype) -> list[FlatBucket]:
        members: dict[int, list[BucketParam]] = {}
        for entry in entries:
            members.setdefault(entry.stage, []).append(self._member(entry))
        wide, device = wide_dtype(dtype), self.mesh.device
        made: list[FlatBucket] = []
        for stage, expert in product(sorted(members), (False, True)):
            shard = self._division(expert).shard
            shard = shard if self.options.stage else Axis("shard", broken=shard.broken)
            some = [member for member in members[stage] if member.expert == expert]
            by_unit = self.options.stage == 3
            for plan in plan_buckets(
                some, wide.itemsize, shard.size, buckets.BUCKET_BYTES, by_unit
            ):
                made.append(FlatBucket(len(made), plan, self.options, shard, (dtype, wide), device))
        return made

    def _division(self, expert: bool) -> Division:
        """Who divides and sums gradients of a kind of parameter."""
        wrong = "grads.wrong_group" in self.mesh.world.broken
        return self.groups.experts if expert and not wrong else self.groups.dense

    def _member(self, entry: Entry) -> BucketParam:
        name, param, shard, _ = entry
        param_group, layout = self.param_groups[name], self.mesh.layout
        largest = shard.box(layout, self.mesh.coords | dict.fromkeys(shard.split.values(), 0))
        whole = (
            0
            if param_group.frozen
            else whole_elements(param_group.rule, shard, layout, param.shape)
        )
        tied = name == self.tied_name
        return BucketParam(
            name,
            param.numel(),
            unit_of(name),
            shard.partial,
            tied,
            param_group,
            whole,
            largest.size,
            shard.expert,
        )

    def _neighbours(self) -> tuple[dict[str, str], dict[str, str]]:
        """For each unit the next one in a forward and in a backward pass through its stage."""
        pairs = [
            pair for units in self.by_stage.values() for pair in zip(units, units[1:], strict=False)
        ]
        behind = {
            second: first for first, second in pairs if first != "embedding"
        }  # a look-up needs no weights again
        return dict(pairs), behind

    def _reset(self) -> None:
        self.done: deque[Callable[[], None]] = deque()
        self.launched: set[int] = set()
        self.waiting = [set(bucket.plan.units) for bucket in self.flat]
        self.early = self.last = False

    def attach(self, params: dict[str, nn.Parameter]) -> None:
        """Attach the parameters that now live on `views`; their `.grad` is collected."""
        self.params = params
        self.reshard()

    # Units: bring parameters and let them go

    def before_forward(self, keys: tuple[str, ...]) -> None:
        self._unshard(keys, self.ahead)

    def after_forward(self, keys: tuple[str, ...]) -> None:
        self._reshard(keys)

    def before_backward(self, keys: tuple[str, ...]) -> None:
        self._unshard(keys, self.behind)

    def after_backward(self, keys: tuple[str, ...]) -> None:
        self._reshard(keys)
        if self.early:
            self._complete([key for key in keys if key not in self.shared])

    def _unshard(self, keys: tuple[str, ...], following: dict[str, str]) -> None:
        for key in keys:
            for bucket in self.by_unit[key]:
                bucket.unshard()
        for bucket in self.by_unit.get(following.get(keys[0], ""), ()):
            bucket.prefetch()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep all parameters on this rank inside the context, gathered once: for many forward
        passes in a row.

        Collective over the shard groups; ranks may then use their weights in any order, or not at
        all. Weights that change inside are gathered anew (`publish`).
        """
        before, self.keeps = self.keeps, True
        try:
            for bucket in self.flat:
                bucket.unshard()
            yield
        finally:
            self.keeps = before
            if not before:
                self.reshard()

    def _reshard(self, keys: tuple[str, ...]) -> None:
        if self.keeps:
            return
        for key in keys:
            for bucket in self.by_unit[key]:
                bucket.reshard()

    def reshard(self) -> None:
        """Let go of what is not kept between uses."""
        for bucket in self.flat:
            bucket.reshard()

    def wait_and_reshard(self) -> None:
        """Wait for what is on its way and let go of what is stale, before weights are written from
        outside.
        """
        for bucket in self.flat:
            bucket.wait_and_reshard()

    # Gradients

    def begin_step(self) -> None:
        """Begin a step, before its first microbatch."""
        self._reset()
        for bucket in self.trainable:
            bucket.begin_step()

    def starts(self, stage: int, last: bool, whole: bool) -> None:
        """Begin a backward pass on a stage; `whole`: weight gradients come with it, so units
        complete one by one.
        """
        self.last, self.early = last, whole

    def stage_done(self, stage: int, last: bool) -> None:
        """Mark the gradients of one microbatch on one stage as complete."""
        self.early, self.last = False, last
        units = self.by_stage.get(stage, [])
        self._reshard(tuple(units))
        self._complete(units)

    def _complete(self, units: list[str]) -> None:
        """Take the gradients of finished units; start the reduction of buckets that have all they
        wait for.

        A unit may have been taken already when its own backward pass ended; then it waits for the
        next microbatch.
        """
        for unit in units:
            for bucket in (bucket for bucket in self.by_unit[unit] if not bucket.frozen):
                waiting = self.waiting[bucket.index]
                waiting.discard(unit)
                if not waiting:
                    waiting |= bucket.plan.units
                    self._take(bucket)

    def _take(self, bucket: FlatBucket) -> None:
        """Add the gradients of one microbatch to where they accumulate.

        A bucket without any gradient was taken already. Which buckets have one follows from the
        plan, not from the tokens: experts that no token chose have one of zeros
        (`ops.grouped_gemm`), so all ranks reduce alike.
        """
        if not any(self.params[member.name].grad is not None for member in bucket.plan.members):
            return
        if bucket.sharded_grads:
            while len(self.done) >= IN_FLIGHT:
                self.done.popleft()()
            bucket.reduce_scatter(bucket.pack(self.params, bucket.message_dtype), self.done)
        elif self.tree:
            self.trees[bucket.index].add(bucket.pack(self.params, bucket.grads.dtype))
        else:
            bucket.accumulate(self.params)
            if self.last and not bucket.plan.units & self.shared:
                self._launch(bucket)

    def _launch(self, bucket: FlatBucket) -> None:
        """Start the one reduction of a bucket whose gradients were accumulated whole."""
        self.launched.add(bucket.index)
        if self.options.stage:
            bucket.reduce_scatter(bucket.grads, self.done)
        else:
            axis = self._division(bucket.plan.expert).shard
            self.done.append(comm.start_all_reduce(bucket.grads, axis, bucket.reduction))

    def finish(self) -> None:
        """Complete all gradients; collective over dp x cp, the partial axes and the tie."""
        HEARTBEAT.enter("reduce")
        self.last = True
        for bucket in self.trainable:
            self._take(bucket)
            if (
                not bucket.sharded_grads
                and not self.tree
                and bucket.index not in self.launched
            ):
                bucket.zero_if_untouched()
                self._launch(bucket)
        while self.done:
            self.done.popleft()()
        for bucket in self.trainable:
            self._finish_bucket(bucket)

    def _finish_bucket(self, bucket: FlatBucket) -> None:
        if self.tree:
            axis = self.mesh.grads
            bucket.grads.copy_(self.trees[bucket.index].total())
            if "grads.data" not in axis.broken:
                tree_all_reduce_(bucket.grads, axis, exchanger(axis))
        elif self.options.stage:
            bucket.zero_if_untouched()
            comm.all_reduce_(
                bucket.shard_grads, self._division(bucket.plan.expert).replica, bucket.reduction
            )
        target = bucket.grads if self.tree else bucket.shard_grads
        for axis in bucket.plan.partial:
            comm.all_reduce_(target, self.mesh.axes[axis], "grads.partial")
        if bucket.plan.tied:
            comm.all_reduce_(target, self.groups.tie, "grads.tie")

    def publish(self, frozen: bool = True) -> None:
        """Send the weights, in the model's dtype, on their way to whoever needs them.

        An update leaves `frozen` ones as they are: it need not send them again.
        """
        changed = self.flat if frozen else self.trainable
        for bucket in changed:
            bucket.publish()
        if self.keeps:  # what is gathered here are the weights before
            for bucket in changed:
                bucket.reshard()
                bucket.unshard()

    # Ownership

    def owns(self, name: str) -> bool:
        """Returns whether this rank is the one that answers for its range of a parameter (one owner
        per logical element).
        """
        if name == self.tied_name and self.groups.tie.rank:
            return False
        shard, coords = self.shards[name], self.mesh.coords
        if self.options.stage:  # dp x cp (edp of experts) is divided, or counted by `replica`
            coords = coords | {"dp": 0, "cp": 0, "edp": 0}
            if self._division(shard.expert).replica.rank:
                return False
        return shard.owned(coords)

    def slices(self, bucket: FlatBucket) -> Iterator[ParamSlice]:
        """Yields the stretches of members in this rank's range of a bucket."""
        yield from bucket.plan.slices(bucket.begin, bucket.end)

    def squared_norm(self) -> Tensor:
        """Sum of squares of all logical gradient elements but frozen ones, a float64 scalar;
        collective over the world. What ranks `note` is added up with it, in `noted`.

        In tree mode every rank holds the whole sums, and one replica is added up in an order that
        does not depend on the number of replicas.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for bucket in self.trainable:
            tree = self.tree
            flat = bucket.grads if tree else bucket.shard_grads
            cuts = bucket.plan.slices(0, bucket.plan.numel) if tree else self.slices(bucket)
            for counts, run in groupby(cuts, key=lambda cut: self._counts(cut.member.name)):
                if counts:
                    run = list(run)
                    part = flat[run[0].place : run[-1].place + run[-1].end - run[-1].begin]
                    total += torch.linalg.vector_norm(part).to(torch.float64) ** 2
        axis = self.mesh.model if self.tree else self.mesh.world
        both = comm.all_reduce_(torch.cat((total[None], self.noted)), axis, "clip.norm")
        self.noted = both[1:]
        if self.tree:
            comm.all_reduce_(self.noted, self.mesh.data, "clip.norm")
        return both[0]

    def note(self, value: int, verdicts: Tensor | None = None) -> None:
        """Tell all ranks a number, 0, 1 or 2, with the next gradient norm, and two `verdicts`,
        float64 `[2]` on the device, which are added up (None: zeros).
        """
        counts = torch.tensor([value == 1, value == 2, 0, 0], dtype=torch.float64)
        self.noted = counts.to(self.mesh.device, non_blocking=True)
        if verdicts is not None:
            self.noted[2:] = verdicts

    @property
    def verdicts(self) -> Tensor:
        """The verdicts of all ranks, added up, once the norm is known: `[2]` on the device."""
        return self.noted[2:]

    def largest_noted(self) -> int:
        """Returns the largest number that a rank told; waits for the device."""
        ones, twos = self.noted[:2].tolist()
        return 2 if twos else int(ones > 0)

    def _counts(self, name: str) -> bool:
        if not self.tree:
            return self.owns(name)
        tied_twice = name == self.tied_name and self.groups.tie.rank
        return not tied_twice and self.shards[name].owned(self.mesh.coords | {"dp": 0})


def shard_groups(mesh: Mesh, options: ZeroConfig, experts: bool) -> tuple[Division, Division]:
    """Returns who divides dense parameters (inside dp x cp) and experts, if there are any (inside
    edp); collective over the world when they are new groups. Where `shard_size` does not divide
    edp, its largest part that does divides experts.
    """
    dense = _division(mesh, "grads", options.shard_size)
    return dense, _division(mesh, "expert_grads", options.shard_size) if experts else dense


def _division(mesh: Mesh, purpose: str, size: int | None) -> Division:
    axis = mesh.axes[purpose]
    inner = axis.size if size is None else gcd(size, axis.size)
    if inner == axis.size:
        return Division(axis, Axis("replica", broken=axis.broken))
    replica, shard = mesh.view(purpose, inner)
    return Division(shard, replica)
