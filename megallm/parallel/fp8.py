"""Linears that compute in FP8, with scales of logical tensors: the same at any split over tp, cp
and ep.

The three products of a linear sum over another dim each, so a recipe that scales rows or blocks
stores x and dy twice. A weight is stored once an update. Delayed scales come from a history of
*steps*: the largest magnitude of a step over all microbatches and ranks enters it when the step
commits, so recomputation and accumulation change nothing. Experts are linears side by side: each
has scales of its own, from the rows that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.fp8 import (
    LARGEST,
    Quantisation,
    Quantised,
    amax_of,
    product,
    quantise,
    quantised,
    scale_of,
)
from megallm.ops.grouped_gemm import Runs
from megallm.ops.low_precision import RECIPES, Fp8Options
from megallm.parallel import comm
from megallm.parallel.linear import WeightGradQueue
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Shard, StateTensor

AMAX, EXPERT_AMAX, WRONG_EXPERT = "fp8.amax", "fp8.expert_amax", "fp8.wrong_expert"
HISTORY = "optim.fp8_amax."  # what the names of histories begin with in a checkpoint
OPERANDS = {
    "x": ("tokens", "in"),
    "weight": ("out", "in"),
    "dy": ("tokens", "out"),
}  # what their dims are
ORDER = tuple(OPERANDS)
SELF_TRANSPOSED = ("tensor", "square")  # scales that are those of the transpose too


class Fp8Linear:
    """How one linear stores its operands; `split` has the axes over which `tokens`, `in` and `out`
    are divided.

    With `experts` it is that many linears, of which this rank holds those of its place on ep.
    Operands are lists then, a matrix for each expert here; otherwise lists of one.
    """

    def __init__(
        self, options: Fp8Options, split: Mapping[str, tuple[Axis, ...]], mesh: Mesh, experts: int
    ) -> None:
        self.options, self.recipe, self.split = options, RECIPES[options.recipe], split
        self.keeps_weights = True  # between the microbatches of a step
        self.weight: dict[bool, list[Quantised]] = {}
        size = (len(ORDER), options.history)
        self.shard = (
            Shard((experts, *size), {0: "ep"}) if experts else Shard(size)
        )  # of the history
        self.name = EXPERT_AMAX if experts else AMAX
        self.mixed_up = experts > 0 and WRONG_EXPERT in mesh.world.broken
        self.history = torch.zeros(
            self.shard.box(mesh.layout, mesh.coords).shape, device=mesh.device
        )
        self.seen = torch.zeros_like(
            self.history[..., 0]
        )  # the largest magnitudes of this step so far
        self.complete = False  # whether some step has entered each operand into the history

    def store(
        self,
        name: str,
        matrices: Sequence[Tensor],
        transposed: bool = False,
        training: bool = False,
    ) -> list[Quantised]:
        """Stores operands `[rows, columns]`, or their transposes, ready for products over their
        last dim.

        Collective over the axes that split what shares a scale, unless scales are delayed.
        """
        recipe, form = self.recipe, self.recipe.gradients if name == "dy" else "e4m3"
        scaled, axes = self._granularity(name, transposed)
        afterwards = transposed and scaled in SELF_TRANSPOSED
        if transposed and not afterwards:
            matrices = [matrix.t().contiguous() for matrix in matrices]
        margin = self.options.margin if scaled == "tensor" else 0
        if not recipe.delayed and not self.mixed_up and all(axis.size == 1 for axis in axes):
            rule = Quantisation(form, scaled, margin, recipe.powers)
            made = [quantised(matrix, rule, afterwards) for matrix in matrices]
            return [turned or plain for plain, turned in made]
        amax = [amax_of(matrix, scaled) for matrix in matrices]
        flat = torch.cat([one.flatten() for one in amax])
        flat = (
            self._delayed(name, flat, axes, training)
            if recipe.delayed
            else self._largest(flat, axes)
        )
        if self.mixed_up and scaled == "tensor":
            flat = flat.roll(1)
        scale = scale_of(flat, LARGEST[form], margin, recipe.powers)
        stored = [
            quantise(matrix, form, part.view_as(one))
            for matrix, part, one in zip(
                matrices, scale.split([one.numel() for one in amax]), amax, strict=True
            )
        ]
        return _transposed(stored) if afterwards else stored

    def store_weight(self, weight: Tensor, transposed: bool = False) -> list[Quantised]:
        """Returns the weights `[X, out, in]`, stored once an update."""
        if transposed in self.weight:
            return self.weight[transposed]
        stored = self.store("weight", weight.detach().unbind(), transposed, training=True)
        if self.keeps_weights:
            self.weight[transposed] = stored
        return stored

    def keep_input(self, matrices: Sequence[Tensor], stored: list[Quantised]) -> list[Quantised]:
        """Returns what the products for the weights' gradients will need of x."""
        return (
            stored if self.recipe.scaled == "tensor" else self.store("x", matrices, transposed=True)
        )

    def kept_input(self, kept: Sequence[Tensor]) -> list[Quantised]:
        """Returns x transposed, from the tensors of what `keep_input` gave."""
        stored = [Quantised(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        return _transposed(stored) if self.recipe.scaled == "tensor" else stored

    def gradient_transposed(
        self, matrices: Sequence[Tensor], stored: list[Quantised]
    ) -> list[Quantised]:
        """Returns dy transposed, of dy as it is and as `store` gave it."""
        if self.recipe.scaled == "tensor":
            return _transposed(stored)
        return self.store("dy", matrices, transposed=True)

    def _granularity(self, name: str, transposed: bool) -> tuple[str, Sequence[Axis]]:
        """What shares a scale, and the axes that split it. Blocks are those of a rank's own
        part.
        """
        if self.recipe.scaled == "tensor":
            return "tensor", [axis for kind in OPERANDS[name] for axis in self.split[kind]]
        if self.recipe.scaled == "row":
            return "row", self.split[OPERANDS[name][0 if transposed else 1]]
        return "square" if name == "weight" else "block", ()

    def _delayed(self, name: str, amax: Tensor, axes: Sequence[Axis], training: bool) -> Tensor:
        """The largest of the history, by matrix; of the tensor itself where no step has entered any
        yet.
        """
        place = ORDER.index(name)
        seen = self.seen[..., place]
        if training:
            seen.copy_(torch.maximum(seen, amax.view_as(seen)))
        past = self.history[..., place, :].amax(-1).view_as(amax).to(amax.dtype)
        return past if self.complete else torch.where(past > 0, past, self._largest(amax, axes))

    def _largest(self, amax: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Completed in place over the axes."""
        for axis in axes:
            comm.all_reduce_(amax, axis, self.name, dist.ReduceOp.MAX)
        return amax

    def forget(self) -> None:
        """Drop what was stored of the weight, which has changed."""
        self.weight.clear()

    def advance(self, seen: Tensor) -> None:
        """Enter a step's largest magnitudes, by operand; what is not finite or was not seen leaves
        the history be.

        An expert without tokens saw neither input nor gradient.
        """
        usable = (seen > 0) & seen.isfinite()
        moved = torch.cat((seen[..., None], self.history[..., :-1]), dim=-1)
        self.history.copy_(torch.where(usable[..., None], moved, self.history))
        self.seen.zero_()


def _transposed(stored: list[Quantised]) -> list[Quantised]:
    return [one.transposed() for one in stored]


class Fp8Linears:
    """All FP8 linears of a rank, by the logical names of their weights."""

    def __init__(self, linears: dict[str, Fp8Linear], mesh: Mesh) -> None:
        self.linears, self.mesh = linears, mesh

    def commit(self) -> None:
        """Update all scales after an update of the weights. With delayed scales collective over tp
        and dp x cp, for experts over edp: one reduction of all linears each. Waits for the device,
        once, until every operand was entered.
        """
        for linear in self.linears.values():
            linear.forget()
        delayed = [linear for linear in self.linears.values() if linear.recipe.delayed]
        for name, axes in (
            (AMAX, (self.mesh.tp, self.mesh.grads)),
            (EXPERT_AMAX, (self.mesh.expert_grads,)),
        ):
            some = [linear for linear in delayed if linear.name == name]
            if not some:
                continue
            seen = torch.cat([linear.seen.flatten() for linear in some])
            for axis in axes:
                comm.all_reduce_(seen, axis, name, dist.ReduceOp.MAX)
            for linear, mine in zip(
                some, seen.split([linear.seen.numel() for linear in some]), strict=True
            ):
                linear.advance(mine.view_as(linear.seen))
        self._look([linear for linear in delayed if not linear.complete])

    def _look(self, linears: list[Fp8Linear]) -> None:
        """Learn of which linears every operand has been entered into the history."""
        if linears:
            entered = torch.stack(
                [(linear.history[..., 0] > 0).all() for linear in linears]
            ).tolist()
            for linear, all_of_them in zip(linears, entered, strict=True):
                linear.complete = all_of_them

    def histories(self) -> Iterator[tuple[str, Tensor, Shard]]:
        """Yields what a checkpoint remembers of each linear with delayed scales: `[3, history]`,
        the same on all ranks of a stage, or `[X, 3, history]`, divided over ep like the experts.
        """
        for name, linear in self.linears.items():
            if linear.recipe.delayed:
                yield name, linear.history, linear.shard

    def state(self) -> Iterator[StateTensor]:
        """Yields the histories of delayed scales; those of another length, or of none, start
        afresh.
        """
        coords = self.mesh.coords
        for name, history, shard in self.histories():
            box = shard.box(self.mesh.layout, coords)
            yield StateTensor(
                f"{HISTORY}{name}", shard, box, history, shard.owned(coords), True, True
            )

    def loaded(self) -> None:
        """Drop what was stored: weights and histories were filled from outside."""
        for linear in self.linears.values():
            linear.forget()
        self._look(list(self.linears.values()))


class _Fp8Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        sizes: tuple[int, ...],
        state: Fp8Linear,
        weight_grads: WeightGradQueue | None,
        training: bool,
    ) -> Tensor:
        rows = x.split(sizes)
        stored = state.store("x", rows, training=training)
        if training and ctx.needs_input_grad[1]:
            ctx.save_for_backward(*chain(*state.keep_input(rows, stored)))
        ctx.weight, ctx.state, ctx.weight_grads, ctx.sizes = weight, state, weight_grads, sizes
        return _products(stored, state.store_weight(weight), x.dtype, torch.cat)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        state, dtype, dw = ctx.state, dy.dtype, None
        rows = dy.split(ctx.sizes)
        stored = state.store("dy", rows, training=True)
        dx = _products(stored, state.store_weight(ctx.weight, transposed=True), dtype, torch.cat)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        transposed = state.gradient_transposed(rows, stored)
        gradient = partial(
            _products, transposed, state.kept_input(ctx.saved_tensors), dtype, torch.stack
        )
        if ctx.weight_grads is not None:
            ctx.weight_grads.put(ctx.weight, gradient)
        else:
            dw = gradient()
        return dx, dw, None, None, None, None


def _products(
    a: list[Quantised],
    b: list[Quantised],
    dtype: torch.dtype,
    join: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """`a_e b_e^T` of each pair, together by `torch.cat` or `torch.stack`; of one pair without a
    copy.
    """
    made = [product(*pair, dtype) for pair in zip(a, b, strict=True)]
    if len(made) == 1:
        return made[0] if join is torch.cat else made[0][None]
    return join(made)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Fp8Linear,
    weight_grads: WeightGradQueue | None,
) -> Tensor:
    """Computes `x W^T + b` from operands in FP8, `[..., in] -> [..., out]`; both gradients from
    operands in FP8 too.
    """
    rows = x.flatten(0, -2)
    y = _Fp8Products.apply(
        rows, weight[None], (len(rows),), state, weight_grads, torch.is_grad_enabled()
    )
    y = y.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def fp8_grouped_linear(
    x: Tensor, weight: Tensor, runs: Runs, state: Fp8Linear, weight_grads: WeightGradQueue | None
) -> Tensor:
    """Computes `x_e W_e^T` for the rows of each expert, as `ops.grouped_gemm.grouped_linear`, by
    the products of `fp8_linear`.

    Waits for the device where `runs` does not know its sizes. Every rank that holds an expert takes
    part in the reductions of its magnitudes, also without a row for it.
    """
    return _Fp8Products.apply(x, weight, runs.sizes, state, weight_grads, torch.is_grad_enabled())
