"""Low-rank terms beside a linear, added in place (LoRA, arXiv 2106.09685).

One product makes the inner features of all matrices of a stack, since they have one input, and each
matrix adds its own to its columns of the output: no sum, no scaling and no concatenation of the
width of the output passes through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.grouped_gemm import WeightGrads


class LowRankSum(NamedTuple):
    """The first column of the output of each matrix, its factor, and where weight gradients go that
    are put off."""

    starts: Sequence[int]
    scales: Sequence[float]
    weight_grads: WeightGrads | None


def add_low_rank(
    x: Tensor, y: Tensor, where: LowRankSum, a: Sequence[Tensor], b: Sequence[Tensor]
) -> Tensor:
    """Returns `y + s_i B_i A_i x` on the columns of each i, `[..., in]` and `[..., out]`; changes
    `y`, unless that is a view.

    `A_i (r_i, in)`, `B_i (out_i, r_i)`.
    """
    if y._base is not None:  # such as of a linear with a bias; autograd would change the base too
        y = y.clone()
    return _AddLowRank.apply(x, y, where, *a, *b)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, y: Tensor, where: LowRankSum, *matrices: Tensor
    ) -> Tensor:
        count = len(where.starts)
        a, b = matrices[:count], matrices[count:]
        inner = x.flatten(0, -2) @ _joined(a).mT
        ctx.save_for_backward(x, inner)
        # Not save_for_backward: recomputation would hand back copies that lead to no parameter.
        ctx.where, ctx.a, ctx.b = where, a, b
        ctx.mark_dirty(y)
        for columns, own, matrix, scale in _members(y, inner, ctx):
            columns.addmm_(own, matrix.mT, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        x, inner = ctx.saved_tensors
        a, b, queue = ctx.a, ctx.b, ctx.where.weight_grads
        d_inner = torch.empty_like(inner)
        d_b = []
        for (columns, own, matrix, scale), place in zip(
            _members(dy, inner, ctx), d_inner.split([len(one) for one in a], dim=1), strict=True
        ):
            place.copy_(columns @ matrix.detach()).mul_(scale)
            d_b.append(partial(_product, columns, own, scale))
        rows = x.detach().flatten(0, -2)
        dx = (d_inner @ _joined(a)).view(x.shape) if ctx.needs_input_grad[0] else None
        if queue is None:
            d_a = _product(d_inner, rows, 1.0).split([len(one) for one in a])
            return dx, dy, None, *d_a, *(make() for make in d_b)
        for one, place in zip(a, d_inner.split([len(one) for one in a], dim=1), strict=True):
            queue.put(one, partial(_product, place, rows, 1.0))
        for one, make in zip(b, d_b, strict=True):
            queue.put(one, make)
        return dx, dy, *[None] * (1 + len(a) + len(b))


def _joined(a: Sequence[Tensor]) -> Tensor:
    """The matrices one below the other, without their graph."""
    return a[0].detach() if len(a) == 1 else torch.cat([one.detach() for one in a])


def _members(
    wide: Tensor, inner: Tensor, ctx: FunctionCtx
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """For each matrix its columns of the output, its inner features, itself and its factor."""
    flat = wide.view(-1, wide.shape[-1]) if wide.is_contiguous() else wide.flatten(0, -2)
    own = inner.split([len(one) for one in ctx.a], dim=1)
    return [
        (flat[:, start : start + len(matrix)], features, matrix.detach(), scale)
        for start, features, matrix, scale in zip(
            ctx.where.starts, own, ctx.b, ctx.where.scales, strict=True
        )
    ]


def _product(dy: Tensor, x: Tensor, scale: float) -> Tensor:
    """`s dy^T x`, `[T, out]` and `[T, in]` -> `[out, in]`; a CPU is twice as fast with few rows in
    front, so the narrower side comes first.
    """
    made = dy.mT @ x if dy.shape[1] <= x.shape[1] else (x.mT @ dy).mT
    return made if scale == 1.0 else made.mul_(scale)
