"""Muon over flat buckets (Jordan 2024; arXiv 2502.16982): momentum, made orthogonal matrix by
matrix.

Shards end where matrices end (`BucketParam.whole`), so a rank has all of each of its matrices but
what tensor parallelism splits; those pieces are gathered, and every tensor-parallel rank does the
same work and keeps its slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megallm.base.errors import InternalError
from megallm.ops.newton_schulz import orthogonalized
from megallm.ops.updates import keeping, unless
from megallm.optim.buckets import ParamSlice
from megallm.optim.config import OptimConfig
from megallm.optim.elementwise import Clock
from megallm.optim.flat import FlatBucket
from megallm.optim.zero import ShardedParameters
from megallm.parallel import comm
from megallm.parallel.shard import Shard, piece

GATHER = "muon.matrices"
RMS = 0.2  # of the elements of an AdamW update, as observed in arXiv 2502.16982


class Split(NamedTuple):
    """An axis divides a dim of `Matrices.shape`, which has `total` elements in all."""

    dim: int
    axis: str
    total: int


class Matrices(NamedTuple):
    """Neighbouring matrices `[n, rows, columns]` of one parameter in this rank's range, as held
    here.
    """

    cut: ParamSlice
    shard: Shard
    shape: tuple[int, int, int]

    @property
    def split(self) -> Split | None:
        """How an axis divides the rows or the columns, if one does."""
        for dim in (2, 1):
            place = len(self.shard.full) - len(self.shape) + dim
            if place in self.shard.split:
                return Split(dim, self.shard.split[place], self.shard.full[place])
        return None

    def view(self, flat: Tensor) -> Tensor:
        return self.cut.of(flat).view(self.shape)


class Muon:
    """The buckets of hidden matrices; `states["momentum"]` has this rank's range by bucket
    index.
    """

    def __init__(
        self,
        config: OptimConfig,
        parameters: ShardedParameters,
        states: dict[str, dict[int, Tensor]],
    ) -> None:
        self.config, self.parameters, self.states = config, parameters, states

    def update(self, buckets: list[FlatBucket], lr: float, clock: Clock) -> None:
        """Apply the completed and clipped gradients of `buckets`; collective over the axes that
        split matrices.
        """
        pending: list[Callable[[], None]] = []
        for bucket in buckets:
            direction = self._direction(bucket, clock)
            for matrices in map(self._matrices, self.parameters.slices(bucket)):
                whole = self._start_gather(matrices, matrices.view(direction))
                pending.append(
                    lambda b=bucket, m=matrices, w=whole: self._apply(b, m, w(), lr, clock)
                )
                if (
                    len(pending) > 1
                ):  # one gather is under way while another's matrices are worked on
                    pending.pop(0)()
        for apply in pending:
            apply()

    def _direction(self, bucket: FlatBucket, clock: Clock) -> Tensor:
        """What is to be made orthogonal: the momentum, or with Nesterov the gradient moved along
        it.
        """
        grads, mu = bucket.gradients(), self.config.momentum
        grads = unless(clock.skip, grads)
        if mu == 0:
            return grads
        momentum = self.states["momentum"][bucket.index]
        momentum.lerp_(grads, (1 - mu) * keeping(clock.skip, grads))
        return grads.lerp_(momentum, mu) if self.config.nesterov else momentum

    def _matrices(self, cut: ParamSlice) -> Matrices:
        name = cut.member.name
        rows, columns = self.parameters.shapes[name][-2:]
        if cut.begin % (rows * columns) or cut.end % (rows * columns):
            raise InternalError(
                f"elements {cut.begin} to {cut.end} of {name} are no whole {rows} x {columns} "
                "matrices."
            )
        shape = ((cut.end - cut.begin) // (rows * columns), rows, columns)
        return Matrices(cut, self.parameters.shards[name], shape)

    def _start_gather(self, matrices: Matrices, part: Tensor) -> Callable[[], Tensor]:
        """Begin to bring whole matrices together on the mesh's device; the result waits for
        them.
        """
        split, mesh = matrices.split, self.parameters.mesh
        part = part.to(mesh.device)
        if split is None:
            return lambda: part
        axis = mesh.axes[split.axis]
        if axis.size == 1 or GATHER in axis.broken:
            return lambda: part
        return comm.start_gather_uneven(part, axis, split.dim, split.total)

    def _apply(
        self, bucket: FlatBucket, matrices: Matrices, whole: Tensor, lr: float, clock: Clock
    ) -> None:
        weights, param_group = matrices.view(bucket.master), matrices.cut.member.param_group
        dtype = iteration_dtype(self.config.ns_precision, bucket.params.dtype)
        step = orthogonalized(whole, self.config.ns_steps, dtype)
        step = self._own(matrices, step).to(weights.device, weights.dtype)
        lr, keep = lr * param_group.lr_scale, keeping(clock.skip, weights)
        weights.mul_(1 - lr * param_group.weight_decay * keep)
        weights.addcmul_(
            step,
            keep,
            value=-lr * update_scale(self.config.update_scale, *matrices.shard.full[-2:]),
        )

    def _own(self, matrices: Matrices, whole: Tensor) -> Tensor:
        """This rank's slice of whole matrices."""
        split = matrices.split
        if split is None or whole.shape[split.dim] == matrices.shape[split.dim]:
            return whole
        axis = self.parameters.mesh.axes[split.axis]
        begin, end = piece(split.total, axis.size, axis.rank)
        return whole.narrow(split.dim, begin, end - begin)


def iteration_dtype(precision: str | None, model: torch.dtype) -> torch.dtype:
    """Returns what the Newton-Schulz iterations are computed in: `precision` where it is given,
    else the model's own dtype, and bf16 for those of half precision.

    bf16 is enough for training, but its rounding is that of a matrix product, which another layout
    or kernel makes differently: in fp32 a run is to be the same at every layout.
    """
    if precision is not None:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return torch.bfloat16 if model in (torch.float16, torch.bfloat16) else model


def update_scale(kind: str, rows: int, columns: int) -> float:
    """Returns what an orthogonal update is multiplied by: `rms` brings its root mean square to
    AdamW's, whatever the shape (arXiv 2502.16982, section 2.2); `original` is Jordan's sqrt(max(1,
    rows / columns)).
    """
    return (
        RMS * math.sqrt(max(rows, columns))
        if kind == "rms"
        else math.sqrt(max(1.0, rows / columns))
    )
