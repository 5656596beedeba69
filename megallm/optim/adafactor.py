"""Adafactor over flat buckets (arXiv 1804.04235): second moments of matrices as one number a row
and one a column.

The mean of squares along a row or column, the size of a weight and the size of an update are sums
over all elements of a matrix, wherever they lie: over the shard group, because ZeRO's ranges cut
matrices anywhere, and over the axis that splits the matrix. Two messages a step (and two over the
splitting axis) carry all of them. Every rank of the shard group keeps the factors of all its
matrices; each matrix of a stack is a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megallm.ops.updates import keeping, unless
from megallm.optim.buckets import ParamSlice
from megallm.optim.config import OptimConfig
from megallm.optim.elementwise import CHUNK, Clock
from megallm.optim.flat import FlatBucket
from megallm.optim.groups import is_matrix
from megallm.optim.rules import column_factor, row_factor
from megallm.optim.zero import ShardedParameters
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Shard

SUMS = "adafactor.sums"


class Grid(NamedTuple):
    """The piece of one parameter on this rank as `units` matrices of `rows` x `columns`; vectors
    have one row.

    `row_axis` and `column_axis` name the axes that divide the rows and the columns of whole
    matrices.
    """

    name: str
    shard: Shard
    units: int
    rows: int
    columns: int
    row_axis: str | None
    column_axis: str | None

    @staticmethod
    def of(name: str, shard: Shard, shape: torch.Size) -> Grid:
        last = len(shape) - 1
        rows = shape[-2] if is_matrix(shard) else 1
        row_axis = shard.split.get(last - 1) if is_matrix(shard) else None
        return Grid(
            name,
            shard,
            shape.numel() // rows // shape[-1],
            rows,
            shape[-1],
            row_axis,
            shard.split.get(last),
        )

    @property
    def factored(self) -> bool:
        return is_matrix(self.shard)

    @property
    def full(self) -> tuple[int, int]:
        """Rows and columns of a whole matrix."""
        return self.shard.full[-2] if self.factored else 1, self.shard.full[-1]


class Rows(NamedTuple):
    """A stretch of a parameter as whole rows `[n, columns]`, filled up with zeros; `first` counts
    over all units.
    """

    grid: Grid
    first: int
    head: int  # zeros before the stretch
    values: Tensor

    @staticmethod
    def of(grid: Grid, cut: ParamSlice, piece: Tensor) -> Rows:
        """Returns the elements of `cut`, as they are or copied between zeros."""
        first, head = divmod(cut.begin, grid.columns)
        last = -(-cut.end // grid.columns)
        if (last - first) * grid.columns != piece.numel():
            whole = piece.new_zeros((last - first) * grid.columns)
            whole[head : head + piece.numel()] = piece
            piece = whole
        return Rows(grid, first, head, piece.view(last - first, grid.columns))

    def units(self) -> Iterator[tuple[int, slice]]:
        """Yields each matrix that the stretch touches, and its rows here."""
        count, rows = len(self.values), self.grid.rows
        for unit in range(self.first // rows, -(-(self.first + count) // rows)):
            yield (
                unit,
                slice(max(unit * rows - self.first, 0), min((unit + 1) * rows - self.first, count)),
            )


class Sums:
    """Named stretches of one vector that is summed over a shard group, and those with an axis over
    that axis too.
    """

    def __init__(self, wanted: list[tuple[Hashable, int, str | None]]) -> None:
        self.places: dict[Hashable, slice] = {}
        self.regions: dict[str, slice] = {}
        total = 0
        for key, size, axis in sorted(wanted, key=lambda item: item[2] or ""):
            self.places[key] = slice(total, total + size)
            if axis is not None:
                begin = self.regions[axis].start if axis in self.regions else total
                self.regions[axis] = slice(begin, total + size)
            total += size
        self.size = total

    def reduced(self, vector: Tensor, shard: Axis, mesh: Mesh) -> dict[Hashable, Tensor]:
        """Returns the complete sums by key; collective over `shard` and the named axes."""
        total = comm.all_reduce_(vector.to(mesh.device), shard, SUMS)
        for axis, region in self.regions.items():
            comm.all_reduce_(total[region], mesh.axes[axis], SUMS)
        total = total.to(vector.device)
        return {key: total[place] for key, place in self.places.items()}


class FactorGroup:
    """The parameters whose buckets are divided over one shard group, in an order that all its ranks
    share.
    """

    def __init__(self, buckets: list[FlatBucket], grids: list[Grid]) -> None:
        self.buckets, self.grids = buckets, {grid.name: grid for grid in grids}
        squares: list[tuple[Hashable, int, str | None]] = []
        for grid in grids:
            if grid.factored:
                squares.append((("rows", grid.name), grid.units * grid.rows, grid.column_axis))
                squares.append((("columns", grid.name), grid.units * grid.columns, grid.row_axis))
            squares.append((("weights", grid.name), grid.units, grid.row_axis or grid.column_axis))
        self.squares = Sums(squares)
        self.steps = Sums(
            [(grid.name, grid.units, grid.row_axis or grid.column_axis) for grid in grids]
        )


class Adafactor:
    """All parameters; `squares` has the plain second moments of vectors, this rank's range by
    bucket index.
    """

    def __init__(
        self, config: OptimConfig, parameters: ShardedParameters, squares: dict[int, Tensor]
    ) -> None:
        self.config, self.parameters, self.squares = config, parameters, squares
        by_shard: dict[tuple[int, ...], list[FlatBucket]] = {}
        for bucket in parameters.trainable:
            by_shard.setdefault(bucket.shard.ranks, []).append(bucket)
        self.groups = [self._group(buckets) for buckets in by_shard.values()]
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        for group in self.groups:
            like = group.buckets[0].master
            for grid in (grid for grid in group.grids.values() if grid.factored):
                self.rows[grid.name] = like.new_zeros(grid.units * grid.rows)
                self.columns[grid.name] = like.new_zeros(grid.units * grid.columns)

    def _group(self, buckets: list[FlatBucket]) -> FactorGroup:
        names = {member.name for bucket in buckets for member in bucket.plan.members}
        shapes, shards = self.parameters.shapes, self.parameters.shards
        return FactorGroup(
            buckets, [Grid.of(name, shards[name], shapes[name]) for name in shapes if name in names]
        )

    def factors(self) -> Iterator[tuple[str, str, Shard, Tensor]]:
        """Yields `(state, parameter, record, this rank's box)` of the factors."""
        shapes, shards = self.parameters.shapes, self.parameters.shards
        for name, rows in self.rows.items():
            yield "rows", name, row_factor(shards[name]), rows.view(shapes[name][:-1])
            columns = self.columns[name].view(*shapes[name][:-2], shapes[name][-1])
            yield "columns", name, column_factor(shards[name]), columns

    def update(self, buckets: list[FlatBucket], lr: float, clock: Clock) -> None:
        """Apply the completed and clipped gradients; collective over the shard group and axes that
        split parameters.
        """
        for group in self.groups:
            squares = group.squares.reduced(
                self._squares(group, clock), group.buckets[0].shard, self.parameters.mesh
            )
            self._remember(group, squares, clock)
            sums = self._like(group).new_zeros(group.steps.size)
            for rows, _ in self._steps(group, clock):
                place = sums[group.steps.places[rows.grid.name]]
                for unit, here in rows.units():
                    place[unit] += rows.values[here].square().sum()
            steps = group.steps.reduced(sums, group.buckets[0].shard, self.parameters.mesh)
            rates = {
                name: self._rates(group.grids[name], squares["weights", name], steps[name])
                for name in steps
            }
            for rows, (bucket, cut) in self._steps(group, clock):
                self._apply(rows, (bucket, cut), rates[rows.grid.name], lr, clock)

    def _like(self, group: FactorGroup) -> Tensor:
        return group.buckets[0].master

    def _squares(self, group: FactorGroup, clock: Clock) -> Tensor:
        """This rank's share of the sums of squares: of gradients by row and column, of weights by
        matrix.
        """
        total = self._like(group).new_zeros(group.squares.size)
        places = group.squares.places
        for bucket in group.buckets:
            for grid, cut in self._cuts(group, bucket):
                squares = Rows.of(grid, cut, self._grads(bucket, cut, clock).square_())
                weights = Rows.of(grid, cut, cut.of(bucket.master)).values
                for unit, here in squares.units():
                    total[places["weights", grid.name]][unit] += weights[here].square().sum()
                    if grid.factored:
                        columns = total[places["columns", grid.name]].view(grid.units, grid.columns)
                        columns[unit] += squares.values[here].sum(0)
                if grid.factored:
                    rows = total[places["rows", grid.name]]
                    rows[squares.first : squares.first + len(squares.values)] += squares.values.sum(
                        1
                    )
        return total

    def _cuts(self, group: FactorGroup, bucket: FlatBucket) -> Iterator[tuple[Grid, ParamSlice]]:
        """This rank's stretches of a bucket; on a CPU in pieces of whole rows that fit into its
        cache.
        """
        for cut in self.parameters.slices(bucket):
            grid = group.grids[cut.member.name]
            step = (
                cut.end
                if bucket.master.device.type != "cpu"
                else max(CHUNK // grid.columns, 1) * grid.columns
            )
            ends = [*range(cut.begin // step * step + step, cut.end, step), cut.end]
            for begin, end in zip([cut.begin, *ends], ends, strict=False):
                yield grid, ParamSlice(cut.member, begin, end, cut.place + begin - cut.begin)

    def _grads(self, bucket: FlatBucket, cut: ParamSlice, clock: Clock) -> Tensor:
        """A copy of a stretch of the gradient where the weights are, zeros when the update is
        skipped.
        """
        return unless(clock.skip, cut.of(bucket.gradients()))

    def _remember(self, group: FactorGroup, squares: dict[Hashable, Tensor], clock: Clock) -> None:
        """Move the means of squares along: after t steps they keep 1 - t^-decay_power of what they
        were.
        """
        like = self._like(group)
        share = (clock.count.to(like.dtype) + 1) ** -self.config.decay_power * keeping(
            clock.skip, like
        )
        for grid in (grid for grid in group.grids.values() if grid.factored):
            full_rows, full_columns = grid.full
            self.rows[grid.name].lerp_(
                squares["rows", grid.name] / full_columns + self.config.eps, share
            )
            self.columns[grid.name].lerp_(
                squares["columns", grid.name] / full_rows + self.config.eps, share
            )
        for bucket in group.buckets:
            if bucket.index in self.squares:
                mean, grads = self.squares[bucket.index], bucket.gradients()
                mean.lerp_(unless(clock.skip, grads.square()).add_(self.config.eps), share)

    def _steps(
        self, group: FactorGroup, clock: Clock
    ) -> Iterator[tuple[Rows, tuple[FlatBucket, ParamSlice]]]:
        """Gradients over the root of their mean squares, stretch by stretch; not yet limited, and
        nan when skipped.
        """
        for bucket in group.buckets:
            for grid, cut in self._cuts(group, bucket):
                step = self._grads(bucket, cut, clock)
                if not grid.factored:
                    step *= cut.of(self.squares[bucket.index]).rsqrt()
                rows = Rows.of(grid, cut, step)
                if grid.factored:
                    self._scale_(rows)
                yield rows, (bucket, cut)

    def _scale_(self, rows: Rows) -> None:
        """g / sqrt(r c / mean(r)): the mean of all squares is that of the factor which no axis
        divides.
        """
        grid, count = rows.grid, len(rows.values)
        row_means = self.rows[grid.name].view(grid.units, grid.rows)
        column_means = self.columns[grid.name].view(grid.units, grid.columns)
        mean = (column_means if grid.row_axis else row_means).mean(1, keepdim=True)
        per_row = (row_means / mean).rsqrt().flatten()[rows.first : rows.first + count]
        rows.values.mul_(per_row[:, None])
        for unit, here in rows.units():
            rows.values[here] *= column_means[unit].rsqrt()

    def _rates(self, grid: Grid, weights: Tensor, steps: Tensor) -> Tensor:
        """For each matrix: max(min_scale, rms of the weight) / max(1, rms of the update /
        update_clip).
        """
        count = grid.full[0] * grid.full[1]
        size = (weights / count).sqrt().clamp(min=self.config.min_scale)
        return size / ((steps / count).sqrt() / self.config.update_clip).clamp(min=1.0)

    def _apply(
        self,
        rows: Rows,
        place: tuple[FlatBucket, ParamSlice],
        rates: Tensor,
        lr: float,
        clock: Clock,
    ) -> None:
        bucket, cut = place
        param_group = cut.member.param_group
        lr, keep = lr * param_group.lr_scale, keeping(clock.skip, bucket.master)
        relative = (clock.count.to(bucket.master.dtype) + 1).rsqrt().clamp(max=lr)
        for unit, here in rows.units():
            rows.values[here] *= rates[unit] * relative
        step = rows.values.flatten()[rows.head : rows.head + cut.end - cut.begin]
        weights = cut.of(bucket.master)
        weights.mul_(1 - lr * param_group.weight_decay * keep).sub_(unless(clock.skip, step))
