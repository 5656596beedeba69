"""Matrix products of float32 on CPUs by the kernels of csrc/ops, and by torch elsewhere.

MKL, which torch multiplies float32 with, takes its AVX2 path on AMD; oneDNN is faster there but compiles and keeps a kernel
for every shape that it meets. Other dtypes are torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import native

SMALLEST = 2**21  # multiplications: below, a call costs more than it saves
FEWEST = 32  # rows, columns and depth: matrices that are thinner are read, not multiplied


def takes(rows: int, columns: int, depth: int, *tensors: Tensor) -> bool:
    """Returns whether the kernels multiply `[rows, depth]` by `[depth, columns]`."""
    if min(rows, columns, depth) < FEWEST or rows * columns * depth < SMALLEST:
        return False
    if any(x.dtype != torch.float32 for x in tensors):
        return False
    module = native.kernels(*tensors)
    return module is not None and module.outruns_blas()


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Computes `a b` of matrices, into a contiguous `out` where one is given, or with `add` onto
    it.
    """
    if takes(a.shape[0], b.shape[1], a.shape[1], a, b):
        return native.product(a, b, out, add)
    if add:
        return out.addmm_(a, b)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x W^T + b` for x `[..., in]` and W `[out, in]`, differentiable."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not takes(rows, *weight.shape, x, weight) or bias is not None and bias.dtype != x.dtype:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = matmul(x.reshape(-1, x.shape[-1]), weight.mT)
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        rows, given = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        of_x = matmul(given, weight).view(x.shape) if needs[0] else None
        of_weight = matmul(given.mT, rows) if needs[1] else None
        return of_x, of_weight, given.sum(0) if needs[2] else None
