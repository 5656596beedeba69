"""Tokens to the order of their experts and back: each token is copied once for each expert it goes
to.

Copy `t k + j` is token t's for its j-th expert. An order lists copies by expert; copies that are
dropped are not in it. Both directions are gathers of unique rows, so gradients are sums in a fixed
order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.kernels import KERNELS


def order_of(
    experts: Tensor, num_experts: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sorts copies by expert: experts `[N, k]` -> (order int64 `[N k]` of the copies by expert,
    copies per expert int64 `[X]`).

    `keep` `[N, k]` says which copies are not dropped; the others come last and are not counted. How
    many there are only the device knows.
    """
    flat = experts.flatten()
    if keep is not None:
        flat = flat.masked_fill(~keep.flatten(), num_experts)
    counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[
        :num_experts
    ]
    return flat.argsort(stable=True), counts


def _room(like: Tensor, order: Tensor, rows: int) -> Tensor:
    """`[rows, D]`, zero unless an order of all of them will fill it."""
    shape = (rows, like.shape[1])
    return like.new_empty(shape) if len(order) == rows else like.new_zeros(shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape, ctx.copies = x.shape, copies
        return x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        (order,) = ctx.saved_tensors
        rows, width = ctx.shape
        flat = _room(grad, order, rows * ctx.copies).index_copy_(0, order, grad)
        return flat.view(rows, ctx.copies, width).sum(1) if ctx.copies > 1 else flat, None, None


def places_of(order: Tensor, rows: int, copies: int) -> Tensor:
    """Returns which row of the order each copy is, int64 `[rows, copies]`; -1 where it is in none.
    """
    slots = order.new_full((rows * copies,), -1)
    places = torch.arange(len(order), device=order.device)
    return slots.index_copy_(0, order, places).view(rows, copies)


class _KernelPermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, order: Tensor, copies: int, kernels: object
    ) -> Tensor:
        ctx.save_for_backward(order)
        ctx.sizes, ctx.kernels = (len(x), copies), kernels
        out = x.new_empty(len(order), x.shape[1])
        kernels.moe_gather(x.contiguous(), order.contiguous(), None, copies, out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        out = grad.new_empty(ctx.sizes[0], grad.shape[1])
        slots = places_of(ctx.saved_tensors[0], *ctx.sizes)
        ctx.kernels.moe_sum(grad.contiguous(), slots, None, out)
        return out, None, None, None


class _KernelCombine(torch.autograd.Function):
    """Keeps the experts' rows as they came, in their order; nothing is scattered."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, order: Tensor, weights: Tensor, kernels: object
    ) -> Tensor:
        y, weights, slots = y.contiguous(), weights.contiguous(), places_of(order, *weights.shape)
        out = y.new_empty(len(weights), y.shape[1])
        kernels.moe_sum(y, slots, weights, out)
        ctx.save_for_backward(y, order, weights, slots)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        y, order, weights, slots = ctx.saved_tensors
        grad, grad_weights = grad.contiguous(), torch.empty_like(weights)
        grad_y = torch.empty_like(y)
        ctx.kernels.moe_gather(grad, order.contiguous(), weights, weights.shape[1], grad_y)
        ctx.kernels.moe_dot(y, slots, grad, grad_weights)
        return grad_y, None, grad_weights, None


def permute(x: Tensor, order: Tensor, copies: int) -> Tensor:
    """Gathers tokens `[N, D]` -> their copies in the given order `[M, D]`."""
    kernels = KERNELS.of(x)
    if kernels is not None:
        return _KernelPermute.apply(x, order, copies, kernels)
    return _Permute.apply(x, order, copies)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, order: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(order)
        return _room(y, order, rows).index_copy_(0, order, y)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def unpermute(y: Tensor, order: Tensor, rows: int) -> Tensor:
    """Scatters rows `[M, D]` back to where they were: row `order[i]` of the result `[rows, D]` is
    `y[i]`, the rest is zero.
    """
    return _Unpermute.apply(y, order, rows)


class _WeightedSum(torch.autograd.Function):
    """Copy by copy: a batched product of n tiny matrices would be slower."""

    @staticmethod
    def forward(ctx: FunctionCtx, flat: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(flat, weights)
        total = flat[:, 0] * weights[:, 0, None]
        for j in range(1, weights.shape[1]):
            total += flat[:, j] * weights[:, j, None]
        return total.to(flat.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        flat, weights = ctx.saved_tensors
        grad_flat, grad_weights = torch.empty_like(flat), torch.empty_like(weights)
        wide = grad.to(weights.dtype)
        for j in range(weights.shape[1]):
            grad_flat[:, j] = wide * weights[:, j, None]
            grad_weights[:, j] = (wide * flat[:, j]).sum(-1)
        return grad_flat, grad_weights


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of each token's copies: `[M, D]` in the given order, weights wide
    `[N, k]` -> `[N, D]`.
    """
    rows, copies = weights.shape
    kernels = KERNELS.of(y, weights)
    if kernels is not None and weights.dtype == torch.float32 and copies:
        return _KernelCombine.apply(y, order, weights, kernels)
    return _WeightedSum.apply(
        unpermute(y, order, rows * copies).view(rows, copies, y.shape[1]), weights
    )
