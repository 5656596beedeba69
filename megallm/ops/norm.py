"""RMSNorm (arXiv 1910.07467) and LayerNorm over the last dim; statistics and products are wide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import native
from megallm.ops.kernels import KERNELS
from megallm.ops.precision import wide, wide_dtype

# Sums of weight gradients over some of the rows each, of long rows and of short ones: enough to
# keep a large GPU busy (csrc/cuda/norm.cu).
LONG_ROW, LONG_PARTS, SHORT_PARTS = 1024, 264, 2048


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


class _KernelNorm(torch.autograd.Function):
    """LayerNorm where there is a bias, else RMSNorm, by the kernels of csrc/cuda/norm.cu; with a
    residual of `x + residual`, which it returns as well.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        kernels: object,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        mean = None if bias is None else torch.empty_like(scale)
        residual = None if residual is None else residual.contiguous()
        kernels.norm(x, residual, weight.contiguous(), bias, eps, y, total, mean, scale)
        ctx.kernels = kernels
        ctx.save_for_backward(x if total is None else total, weight, mean, scale)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple:
        x, weight, mean, scale = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        grad_total = None if grad_total is None else grad_total.contiguous()
        parts = min(scale.numel(), LONG_PARTS if x.shape[-1] > LONG_ROW else SHORT_PARTS)
        grad_x = torch.empty_like(x)
        grad_weight = scale.new_empty(parts, x.shape[-1])
        grad_bias = None if mean is None else torch.empty_like(grad_weight)
        ctx.kernels.norm_backward(
            grad, grad_total, x, weight.contiguous(), mean, scale, grad_x, grad_weight, grad_bias
        )
        grad_bias = None if grad_bias is None else grad_bias.sum(0).to(weight.dtype)
        of_residual = grad_x if ctx.needs_input_grad[1] else None
        return grad_x, of_residual, grad_weight.sum(0).to(weight.dtype), grad_bias, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `x / sqrt(mean(x^2) + eps) * weight`, `[..., D]` in the dtype of `x`."""
    kernels = KERNELS.of(x, weight)
    if kernels is not None:
        return _KernelNorm.apply(x, None, weight, None, kernels, eps)
    same = x.dtype == weight.dtype == wide_dtype(x.dtype)
    if not torch.is_grad_enabled() and same and not native.kernels(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)  # the same operations, in one call
    return _RmsNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Computes `(x - mean) / sqrt(var + eps) * weight + bias`, `[..., D]` in the dtype of `x`."""
    kernels = KERNELS.of(x, weight, bias)
    if kernels is not None:
        bias = torch.zeros_like(weight) if bias is None else bias
        return _KernelNorm.apply(x, None, weight, bias, kernels, eps)
    bias = None if bias is None else wide(bias)
    return F.layer_norm(wide(x), weight.shape, wide(weight), bias, eps).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns `rms_norm(x + residual)` and the sum, of `[..., D]`; one pass over memory on a GPU.
    """
    kernels = KERNELS.of(x, residual, weight)
    if kernels is not None and residual.dtype == x.dtype:
        return _KernelNorm.apply(x, residual, weight, None, kernels, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns `layer_norm(x + residual)` and the sum, of `[..., D]`."""
    kernels = KERNELS.of(x, residual, weight, bias)
    if kernels is not None and residual.dtype == x.dtype:
        bias = torch.zeros_like(weight) if bias is None else bias
        return _KernelNorm.apply(x, residual, weight, bias, kernels, eps)
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
