"""RMSNorm (arXiv 1910.07467) and LayerNorm over the last dim; statistics and products are wide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import native
from megallm.ops.precision import wide, wide_dtype


class _RmsNorm(torch.autograd.Function):
    """Keeps the input as it came and one wide scalar a row; torch's composite form keeps several
    wide copies.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if native.kernels(x, weight):
            x = x.contiguous()
            out, scale = native.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return out
        values = wide(x)
        scale = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (values * scale).mul_(wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        x, weight, scale = ctx.saved_tensors
        if native.kernels(x, weight, grad) and x.is_contiguous():
            grad_x, grad_weight = native.rms_norm_backward(grad, x, weight, scale)
            return grad_x, grad_weight.to(weight.dtype), None
        unit, grad = x * scale, wide(grad)  # the product is wide because the scale is
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * wide(weight)
        shared = (grad * unit).mean(-1, keepdim=True)
        return (grad - unit.mul_(shared)).mul_(scale).to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `x / sqrt(mean(x^2) + eps) * weight`, `[..., D]` in the dtype of `x`."""
    same = x.dtype == weight.dtype == wide_dtype(x.dtype)
    if not torch.is_grad_enabled() and same and not native.kernels(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)  # the same operations, in one call
    return _RmsNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Computes `(x - mean) / sqrt(var + eps) * weight + bias`, `[..., D]` in the dtype of `x`."""
    bias = None if bias is None else wide(bias)
    return F.layer_norm(wide(x), weight.shape, wide(weight), bias, eps).to(x.dtype)
