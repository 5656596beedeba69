"""Rotary position embedding (arXiv 2104.09864), rotate-half convention, as a function of positions:
no buffers.

A `Scaling` adapts it to longer texts than the model knew: by smaller frequencies (linear, llama3,
yarn, longrope), by a larger theta (ntk, dynamic), and with YaRN and LongRoPE also by larger cosines
and sines. Frequencies equal those of transformers.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import native
from megallm.ops.kernels import KERNELS
from megallm.ops.norm import rms_norm
from megallm.ops.precision import wide


class Scaling(Protocol):
    """How a rotary embedding is adapted; each `kind` reads the numbers named beside it."""

    kind: str  # linear | ntk | dynamic | llama3 | yarn | longrope, all of which read `factor`
    factor: float
    low_factor: float | None  # llama3
    high_factor: float | None  # llama3
    positions: int | None  # dynamic, llama3, yarn, longrope: positions that the model knew before
    beta_fast: float  # yarn, like all that follow
    beta_slow: float
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool
    short_factors: tuple[float, ...] | None  # longrope, one for each wave
    long_factors: tuple[float, ...] | None


def rope_tables(
    positions: Tensor,
    head_size: int,
    theta: float,
    dtype: torch.dtype,
    scaling: Scaling | None = None,
    length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin `[B, T, E/2]` of the angles at `positions` `[B, T]`, in the wide `dtype`.

    `length` is that of the longest text, in tokens; only dynamic and longrope look at it.
    """
    if scaling is not None:
        theta = stretched_theta(theta, head_size, scaling, length)
    exponent = torch.arange(0, head_size, 2, dtype=dtype, device=positions.device) / head_size
    frequencies = theta**-exponent
    if scaling is not None:
        frequencies = stretched(frequencies, scaling, theta, length)
    angles = positions.to(dtype)[..., None] * frequencies
    size = table_factor(scaling)
    return (angles.cos(), angles.sin()) if size == 1 else (angles.cos() * size, angles.sin() * size)


def stretched_theta(theta: float, head_size: int, scaling: Scaling, length: int) -> float:
    """Returns theta for a longer context: the fastest wave stays, the slowest becomes `factor`
    times as long ("NTK-aware").

    ntk always; dynamic by as much as texts of `length` tokens exceed the positions that were known,
    so that shorter ones see no change.
    """
    if scaling.kind not in ("ntk", "dynamic"):
        return theta
    factor = scaling.factor
    if scaling.kind == "dynamic":
        factor = factor * max(length, scaling.positions) / scaling.positions - (factor - 1)
    return theta * factor ** (head_size / (head_size - 2))


def stretched(
    frequencies: Tensor, scaling: Scaling, theta: float = 10000.0, length: int = 0
) -> Tensor:
    """Returns lowered frequencies `[E/2]`; `theta` is the one that they were made with (yarn looks
    at it).

    linear divides all by `factor` (arXiv 2306.15595). llama3 (Llama 3.1, arXiv 2407.21783) divides
    those of waves that did not turn `low_factor` times within the old context of `positions`,
    leaves those that turned more than `high_factor` times, and blends in between. yarn (arXiv
    2309.00071) does the same between `beta_slow` and `beta_fast` turns, but blends evenly over the
    features. longrope (arXiv 2402.13753) divides each by a number of its own, another one where the
    longest text has more tokens than the old context.
    """
    if scaling.kind in ("ntk", "dynamic"):
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        grown = length > scaling.positions
        return frequencies / frequencies.new_tensor(
            scaling.long_factors if grown else scaling.short_factors
        )
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(frequencies, scaling, theta)
    else:
        turns = scaling.positions * frequencies / (2 * math.pi)
        kept = ((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)).clamp(
            0, 1
        )
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(frequencies: Tensor, scaling: Scaling, theta: float) -> Tensor:
    """The share `[E/2]` of each frequency that stays: 1 for fast waves, 0 for slow ones, a ramp
    between.
    """
    size = 2 * len(frequencies)

    def feature(turns: float) -> float:
        """Returns which pair of features turns this often within the old context; pairs count from
        0 as real numbers.
        """
        return size * math.log(scaling.positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Returns YaRN's correction of the magnitude of scores in a context that is `factor` times as
    long.
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def table_factor(scaling: Scaling | None) -> float:
    """Returns what cosines and sines are multiplied by: `attention_factor`, or what YaRN makes of
    its mscales and LongRoPE of the old context; else 1.
    """
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "longrope":
        grown = math.log(max(scaling.factor, 1.0))
        return math.sqrt(1 + grown / math.log(scaling.positions))
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.factor, scaling.mscale) / mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return mscale(scaling.factor)


def score_factor(scaling: Scaling | None) -> float:
    """Returns what all scores of latent attention are multiplied by: the square of the mscale of
    all dims (DeepSeek-V2).
    """
    if scaling is None or scaling.kind != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[B, T, H, E]` by the tables `[B, T, R/2]`; the result has the dtype of `x`. With
    R less than E the first R features are rotated and the others pass.
    """
    kernels = KERNELS.of(x, cos, sin)
    if kernels is not None:
        return _KernelRotated.apply(x, *_tables(cos, sin), kernels)
    if native.kernels(x, cos, sin):
        tables = (wide(table).expand(*x.shape[:2], -1).contiguous() for table in (cos, sin))
        return _NativelyRotated.apply(x, *tables)
    return _Rotated.apply(x, cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype))


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns `apply_rope(rms_norm(x, weight, eps), cos, sin)`: heads `[B, T, H, E]`, weight `[E]`;
    one pass over memory on a GPU.
    """
    kernels = KERNELS.of(x, weight, cos, sin)
    if kernels is None or x.shape[-1] > KERNEL_HEAD:
        return apply_rope(rms_norm(x, weight, eps), cos, sin)
    return _KernelNormRotated.apply(x, weight, *_tables(cos, sin), kernels, eps)


KERNEL_HEAD = 256  # features of the largest head that csrc/cuda/rope.cu normalises
PARTS = 2048  # sums of weight gradients over some of the heads each


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As a kernel reads them: float32, rows behind each other."""
    return wide(cos).contiguous(), wide(sin).contiguous()


def _rows(x: Tensor) -> Tensor:
    """As a kernel reads heads: any strides, but the features of one lie together."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


class _KernelRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, kernels: object) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return _KernelRotated.turned(kernels, x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        turned = _KernelRotated.turned(ctx.kernels, grad, *ctx.saved_tensors, -1.0)
        return turned, None, None, None

    @staticmethod
    def turned(kernels: object, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        into = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.rope(_rows(x), cos, sin, None, 0.0, sign, into)
        return into


class _KernelNormRotated(torch.autograd.Function):
    """Keeps the heads as they came; their scales are made again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        kernels: object,
        eps: float,
    ) -> Tensor:
        x, into = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.rope(x, cos, sin, wide(weight).contiguous(), eps, 1.0, into)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.kernels, ctx.eps = kernels, eps
        return into

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        x, weight, cos, sin = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = cos.new_empty(min(x.shape[:-1].numel(), PARTS), x.shape[-1])
        kept = wide(weight).contiguous()
        ctx.kernels.norm_rope_backward(_rows(grad), x, cos, sin, kept, ctx.eps, grad_x, parts)
        return grad_x, parts.sum(0).to(weight.dtype), None, None, None, None


class _NativelyRotated(torch.autograd.Function):
    """The same by the kernels for CPUs, with wide tables."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return native.rope(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return native.rope(grad, *ctx.saved_tensors, -1), None, None


class _Rotated(torch.autograd.Function):
    """The gradient is turned back: by the same angles with the other sign."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`sign` -1 turns back."""
    into, size = torch.empty_like(x, memory_format=torch.contiguous_format), 2 * cos.shape[-1]
    into[..., size:] = x[..., size:]
    first, second = x[..., :size].chunk(2, dim=-1)
    left, right = into[..., :size].chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=sign)
    return into
