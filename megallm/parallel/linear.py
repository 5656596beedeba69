"""A linear whose weight gradient can be put off: `B` gives the gradient of the input, `W` that of
the weight.

Zero-bubble schedules (arXiv 2401.10241) need the two apart. `W` needs only the input and the
gradient of the output, so nothing else of the forward pass stays alive between `B` and `W`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import product

DeferredGrad = tuple[
    Tensor, Callable[[], Tensor]
]  # a weight as it was used, and what computes its gradient


class WeightGradQueue:
    """The weight gradients that backward passes have put off, in order."""

    def __init__(self) -> None:
        self.pending: list[DeferredGrad] = []

    def put(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Put off `gradient()`, of the shape of `weight`, which is the parameter or a view made of
        it.
        """
        self.pending.append((weight, gradient))

    def take(self) -> list[DeferredGrad]:
        """Returns everything put off since the last call."""
        pending, self.pending = self.pending, []
        return pending


def compute_weight_grads(work: list[DeferredGrad]) -> None:
    """Add each gradient to its weight's `.grad`, through whatever view of the parameter was
    used.
    """
    for weight, gradient in work:
        torch.autograd.backward(weight, gradient())
    work.clear()


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Computes `dy^T x` of all rows, `[..., in]` and `[..., out]` -> `[out, in]`."""
    return product.matmul(dy.flatten(0, -2).mT, x.flatten(0, -2))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_grads: WeightGradQueue | None
) -> Tensor:
    """Computes `x W^T + b`, `[..., in] -> [..., out]`; with a queue the weight's gradient goes
    there.
    """
    if weight_grads is None or not weight.requires_grad:
        return product.dense(x, weight, bias)
    return _SplitLinear.apply(x, weight, bias, weight_grads)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_grads: WeightGradQueue,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not save_for_backward: recomputation would hand back a detached copy, which leads to no
        # parameter.
        ctx.weight, ctx.weight_grads, ctx.has_bias = weight, weight_grads, bias is not None
        return product.dense(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        ctx.weight_grads.put(ctx.weight, partial(weight_gradient, x.detach(), dy))
        return (
            product.matmul(dy.flatten(0, -2), ctx.weight.detach()).view(x.shape),
            None,
            dy.flatten(0, -2).sum(0) if ctx.has_bias else None,
            None,
        )
