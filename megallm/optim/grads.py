"""Parameters and gradients in flat buckets: accumulation wide, reduction as the Shard records say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megallm.ops.precision import wide_dtype
from megallm.optim.buckets import Bucket, Member, plan_buckets
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Shard


@dataclass
class FlatBucket:
    """Storage of one bucket: `params` in the model dtype, `grads` and `master` wide.

    `master` is `params` itself when the model dtype is wide already.
    """

    plan: Bucket
    params: Tensor
    master: Tensor
    grads: Tensor

    def view(self, flat: Tensor, i: int, shape: torch.Size) -> Tensor:
        """Member i of a flat buffer in its shape."""
        begin = self.plan.offsets[i]
        return flat[begin : begin + self.plan.members[i].numel].view(shape)


class Buckets:
    """All parameters of this rank's stage, in flat buckets.

    `tie` is the axis of the two ranks that share the embedding (size 1 without tied pipeline stages), and
    `tied_name` the logical name they share.
    """

    def __init__(self, entries: list[tuple[str, nn.Parameter, Shard]], mesh: Mesh, dtype: torch.dtype, tie: Axis, tied_name: str | None) -> None:
        self.mesh, self.tie = mesh, tie
        self.shards = {name: shard for name, _, shard in entries}
        self.shapes = {name: param.shape for name, param, _ in entries}
        self.tied_name = tied_name if tie.size > 1 else None
        members = [
            Member(name, param.numel(), shard.partial, name == self.tied_name, shard.decay)
            for name, param, shard in entries
        ]
        wide = wide_dtype(dtype)
        self.flat = [self._allocate(plan, dtype, wide) for plan in plan_buckets(members, wide.itemsize)]
        self.model_params: dict[str, nn.Parameter] = {}

    def _allocate(self, plan: Bucket, dtype: torch.dtype, wide: torch.dtype) -> FlatBucket:
        params = torch.zeros(plan.numel, dtype=dtype, device=self.mesh.device)
        master = params if dtype == wide else torch.zeros(plan.numel, dtype=wide, device=self.mesh.device)
        return FlatBucket(plan, params, master, torch.zeros(plan.numel, dtype=wide, device=self.mesh.device))

    def views(self, which: str) -> dict[str, Tensor]:
        """Logical name -> this rank's piece of `params`, `master` or `grads`."""
        flats = {"params": lambda b: b.params, "master": lambda b: b.master, "grads": lambda b: b.grads}[which]
        return {
            member.name: bucket.view(flats(bucket), i, self.shapes[member.name])
            for bucket in self.flat
            for i, member in enumerate(bucket.plan.members)
        }

    def attach(self, entries: list[tuple[str, nn.Parameter, Shard]]) -> None:
        """Remember the placed parameters whose `.grad` is collected."""
        grads = self.views("grads")
        self.pairs = [(param, grads[name]) for name, param, _ in entries]

    def collect(self) -> None:
        """Add each parameter's gradient of one microbatch to its wide accumulator, and free it."""
        for param, accumulator in self.pairs:
            if param.grad is not None:
                accumulator.add_(param.grad)
                param.grad = None

    def reduce(self) -> None:
        """Complete the gradients: over dp x cp, over the partial axes, over the tie; collective over all of them."""
        for bucket in self.flat:
            comm.all_reduce_(bucket.grads, self.mesh.grads, "grads.data")
            for axis in bucket.plan.partial:
                comm.all_reduce_(bucket.grads, self.mesh.axes[axis], "grads.partial")
            if bucket.plan.tied:
                comm.all_reduce_(bucket.grads, self.tie, "grads.tie")

    def zero(self) -> None:
        """Clear the accumulators before the first microbatch of a step."""
        for bucket in self.flat:
            bucket.grads.zero_()

    def publish(self) -> None:
        """Copy the master weights into the model's dtype."""
        for bucket in self.flat:
            if bucket.master is not bucket.params:
                bucket.params.copy_(bucket.master)

    def owned(self, name: str) -> bool:
        """Whether this rank owns its piece of a parameter (one owner per logical element)."""
        first = name != self.tied_name or self.tie.rank == 0
        return self.shards[name].owned(self.mesh.coords, first)

    def owned_views(self, which: str) -> Iterator[tuple[str, Tensor]]:
        """The views of `which` that this rank owns."""
        return ((name, view) for name, view in self.views(which).items() if self.owned(name))


def tie_axis(mesh: Mesh, tied: bool) -> Axis:
    """The group of the first and the last pipeline stage, size 1 when nothing is shared; collective over the world."""
    if not tied or mesh.pp.size == 1:
        return Axis("tie")
    ends = (mesh.pp.ranks[0], mesh.pp.ranks[-1])
    group = mesh.pp.group
    if mesh.pp.size > 2:
        made = {line: mesh.pair((line[0], line[-1])) for line in mesh.layout.groups("pp")}
        group = made[mesh.pp.ranks]
    if mesh.rank not in ends:
        return Axis("tie")
    return Axis("tie", ends.index(mesh.rank), 2, ends, group, mesh.pp.broken)


def squared_norm(buckets: Buckets) -> Tensor:
    """Sum of squares of the owned gradient elements of the world, a scalar; collective over the world."""
    total = torch.zeros((), dtype=torch.float64, device=buckets.mesh.device)
    for _, grad in buckets.owned_views("grads"):
        total += torch.linalg.vector_norm(grad, dtype=grad.dtype).to(torch.float64) ** 2
    return comm.all_reduce_(total, buckets.mesh.world, "clip.norm", dist.ReduceOp.SUM)
