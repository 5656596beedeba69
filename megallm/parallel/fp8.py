"""Linears that compute in FP8, with scales of logical tensors: the same at any split over tp (and cp).

The three products of a linear sum over another dim each, so a recipe that scales rows or blocks stores x and dy twice.
A weight is stored once an update. Delayed scales come from a history of *steps*: the largest magnitude of a step over
all microbatches and ranks enters it when the step commits, so recomputation and accumulation change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.fp8 import LARGEST, Quantised, amax_of, product, quantise, quantise_now, scale_of
from megallm.ops.narrow import RECIPES, Fp8Options
from megallm.parallel import comm
from megallm.parallel.linear import WeightQueue
from megallm.parallel.mesh import Axis, Mesh

AMAX = "fp8.amax"
OPERANDS = {"x": ("tokens", "in"), "weight": ("out", "in"), "dy": ("tokens", "out")}  # what their dims are
ORDER = tuple(OPERANDS)


class Fp8Linear:
    """How one linear stores its operands; `split` has the axes over which `tokens`, `in` and `out` are divided."""

    def __init__(self, options: Fp8Options, split: Mapping[str, tuple[Axis, ...]], device: torch.device) -> None:
        self.options, self.recipe, self.split = options, RECIPES[options.recipe], split
        self.keeps_weights = True  # between the microbatches of a step
        self.weight: dict[bool, Quantised] = {}
        self.seen = torch.zeros(len(ORDER), device=device)  # the largest magnitudes of this step so far
        self.history = torch.zeros(len(ORDER), options.history, device=device)
        self.fresh = True  # no step has committed: scales are those of the tensors themselves

    def store(self, name: str, matrix: Tensor, turned: bool = False, training: bool = False) -> Quantised:
        """An operand `[rows, columns]`, or its transpose, ready for a product over its last dim.

        Collective over the axes that split what shares a scale, unless scales are delayed.
        """
        recipe, form = self.recipe, self.recipe.gradients if name == "dy" else "e4m3"
        if recipe.scaled == "tensor":
            stored = quantise(matrix, form, self._scale(name, matrix, form, training))
            return stored.turned() if turned else stored
        if recipe.scaled == "block":
            if name == "weight":
                stored = quantise_now(matrix, form, "square", recipe.powers, partial(self._largest, axes=()))
                return stored.turned() if turned else stored
            return quantise_now(_turn(matrix, turned), form, "block", recipe.powers, partial(self._largest, axes=()))
        summed = OPERANDS[name][0 if turned else 1]
        return quantise_now(
            _turn(matrix, turned), form, "row", recipe.powers, partial(self._largest, axes=self.split[summed])
        )

    def store_weight(self, weight: Tensor, turned: bool = False) -> Quantised:
        """The weight `[out, in]`, stored once an update."""
        if turned in self.weight:
            return self.weight[turned]
        stored = self.store("weight", weight.detach(), turned, training=True)
        if self.keeps_weights:
            self.weight[turned] = stored
        return stored

    def keep_input(self, matrix: Tensor, stored: Quantised) -> tuple[Tensor, Tensor]:
        """What the product for the weight's gradient will need of x."""
        return stored if self.recipe.scaled == "tensor" else self.store("x", matrix, turned=True)

    def kept_input(self, data: Tensor, inverse: Tensor) -> Quantised:
        """x transposed, from what `keep_input` gave."""
        stored = Quantised(data, inverse)
        return stored.turned() if self.recipe.scaled == "tensor" else stored

    def store_gradient(self, matrix: Tensor) -> tuple[Quantised, Quantised]:
        """dy, and dy transposed."""
        stored = self.store("dy", matrix, training=True)
        return stored, stored.turned() if self.recipe.scaled == "tensor" else self.store("dy", matrix, turned=True)

    def _scale(self, name: str, matrix: Tensor, form: str, training: bool) -> Tensor:
        """One scale for the logical tensor of which `matrix` is this rank's part."""
        amax, place = amax_of(matrix, "tensor"), ORDER.index(name)
        if self.recipe.delayed and training:
            self.seen[place] = torch.maximum(self.seen[place], amax)
        if self.recipe.delayed and not self.fresh:
            past = self.history[place].amax()
            amax = torch.where(past > 0, past, amax)  # no step has entered any yet: this rank's part scales itself
        else:
            amax = self._largest(amax, [axis for kind in OPERANDS[name] for axis in self.split[kind]])
        return scale_of(amax, LARGEST[form], self.options.margin, self.recipe.powers)

    def _largest(self, amax: Tensor, axes: list[Axis] | tuple[Axis, ...]) -> Tensor:
        for axis in axes:
            comm.all_reduce_(amax, axis, AMAX, dist.ReduceOp.MAX)
        return amax

    def forget(self) -> None:
        """The weight has changed: what was stored of it is stale."""
        self.weight.clear()

    def advance(self, seen: Tensor) -> None:
        """Enter a step's largest magnitudes, by operand; what is not finite or was not seen leaves the history be."""
        usable = (seen > 0) & seen.isfinite()
        moved = torch.cat((seen[:, None], self.history[:, :-1]), dim=1)
        self.history.copy_(torch.where(usable[:, None], moved, self.history))
        self.seen.zero_()
        self.fresh = False


def _turn(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.t().contiguous() if turned else matrix


class Fp8Linears:
    """All FP8 linears of a rank, by the logical names of their weights."""

    def __init__(self, linears: dict[str, Fp8Linear], mesh: Mesh) -> None:
        self.linears, self.mesh = linears, mesh

    def commit(self) -> None:
        """After an update. With delayed scales collective over tp and dp x cp: one reduction of all linears."""
        for linear in self.linears.values():
            linear.forget()
        delayed = [linear for linear in self.linears.values() if linear.recipe.delayed]
        if not delayed:
            return
        seen = torch.stack([linear.seen for linear in delayed])
        for axis in (self.mesh.tp, self.mesh.grads):
            comm.all_reduce_(seen, axis, AMAX, dist.ReduceOp.MAX)
        for linear, mine in zip(delayed, seen, strict=True):
            linear.advance(mine)

    def histories(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint remembers: `[3, history]` of each linear with delayed scales, the same on all tp ranks."""
        for name, linear in self.linears.items():
            if linear.recipe.delayed:
                yield name, linear.history

    def loaded(self) -> None:
        """Weights and histories were filled from outside."""
        for linear in self.linears.values():
            linear.forget()
            linear.fresh = not bool(linear.history.any())


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, state: Fp8Linear,
        later: WeightQueue | None, training: bool,
    ) -> Tensor:  # fmt: skip
        rows = x.flatten(0, -2)
        stored = state.store("x", rows, training=training)
        y = product(stored, state.store_weight(weight), x.dtype)
        if training:
            ctx.save_for_backward(*state.keep_input(rows, stored))
        ctx.weight, ctx.state, ctx.later, ctx.shape, ctx.has_bias = weight, state, later, x.shape, bias is not None
        y = y.unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        rows, state, dtype = dy.flatten(0, -2), ctx.state, dy.dtype
        stored, turned = state.store_gradient(rows)
        dx = product(stored, state.store_weight(ctx.weight, turned=True), dtype).view(ctx.shape)
        dw, kept = None, state.kept_input(*ctx.saved_tensors)
        if ctx.later is not None and ctx.needs_input_grad[1]:
            ctx.later.put(ctx.weight, partial(product, turned, kept, dtype))
        elif ctx.needs_input_grad[1]:
            dw = product(turned, kept, dtype)
        return dx, dw, rows.sum(0) if ctx.has_bias else None, None, None, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: Fp8Linear, later: WeightQueue | None) -> Tensor:
    """`x W^T + b` from operands in FP8, `[..., in] -> [..., out]`; both gradients from operands in FP8 too."""
    return _Fp8Product.apply(x, weight, bias, state, later, torch.is_grad_enabled())
