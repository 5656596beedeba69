"""FP8 matrix products: scales, quantisation, and the product itself, native where a kernel exists,
emulated elsewhere.

A value is stored as `fp8(x * scale)` and read as `data * inverse`. Operands are matrices whose last
dim is the one that the product sums over. Emulation multiplies what was stored, dequantised, and
accumulates in fp32 (float64 in the oracle): the sum of exact products, so it equals a kernel up to
the order of that sum. Formats: arXiv 2209.05433; scale rules: Transformer Engine's recipes; blocks
of 128: DeepSeek-V3 (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.kernels import KERNELS
from megallm.ops.precision import wide, wide_dtype

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in FORMATS.items()}  # 448 and 57344
BLOCK = 128
ALIGNED = 16  # both dims of each operand, for the native kernels of a GPU


class Quantised(NamedTuple):
    """A matrix `[R, C]` in FP8, and the inverse of its scale: `[]`, `[R, 1]`, `[R, C/128]` or
    `[R/128, C/128]`.
    """

    data: Tensor
    inverse: Tensor

    def transposed(self) -> Quantised:
        """Returns the transpose `[C, R]`; of a matrix with one scale, or with scales of square
        blocks.
        """
        return Quantised(
            self.data.t().contiguous(),
            self.inverse.t().contiguous() if self.inverse.dim() else self.inverse,
        )


def scale_of(amax: Tensor, largest: float, margin: int = 0, powers: bool = False) -> Tensor:
    """Returns `largest / amax / 2^margin`, or the power of two next below it; 1 where amax is zero
    or not finite.
    """
    usable = (amax > 0) & amax.isfinite()
    scale = (largest / torch.where(usable, amax, 1.0)) / 2.0**margin
    scale = torch.where(scale.isinf(), torch.finfo(scale.dtype).max, scale)
    if powers:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where(usable, scale, 1.0)


def amax_of(x: Tensor, scaled: str) -> Tensor:
    """Returns the largest magnitudes of `[R, C]` that share a scale, wide: `[]`, `[R, 1]`, `[R,
    C/128]` or `[R/128, C/128]`.

    Zero where there is nothing: an expert may have no rows.
    """
    kernels = KERNELS.of(x) if scaled == "tensor" and x.is_contiguous() else None
    if kernels is not None:
        amax = x.new_zeros((), dtype=torch.float32)
        kernels.fp8_amax(x, amax)
        return amax
    size = x.abs()
    if scaled == "tensor":
        return wide(size.amax() if size.numel() else size.new_zeros(()))
    if scaled == "row":
        return wide(size.amax(-1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1))
    height, (rows, columns) = BLOCK if scaled == "square" else 1, size.shape
    if columns % BLOCK or rows % height:
        size = F.pad(size, (0, -columns % BLOCK, 0, -rows % height))
    rows, columns = size.shape
    return wide(size.view(rows // height, height, columns // BLOCK, BLOCK).amax((1, 3)))


def quantise(x: Tensor, form: str, scale: Tensor) -> Quantised:
    """Returns `[R, C]` in the format `form`; what a scale makes too large becomes the largest
    value, as no format rounds.
    """
    largest = LARGEST[form]
    kernels = KERNELS.of(x, scale) if scale.dim() == 0 and x.is_contiguous() else None
    if kernels is not None:
        data = torch.empty_like(x, dtype=FORMATS[form])
        kernels.fp8_quantise(x, wide(scale), data, None, None, 0, 0, False)
        return Quantised(data, 1.0 / scale)
    data = times(wide(x), scale).clamp_(-largest, largest).to(FORMATS[form])
    return Quantised(data, 1.0 / scale)


BLOCK_ROWS = {"row": 0, "block": 1, "square": BLOCK}  # a scale's rows; 0: a row of any length


class Quantisation(NamedTuple):
    """How `quantised` makes scales: of the format `form`, by `scaled` as in `amax_of`."""

    form: str
    scaled: str
    margin: int = 0
    powers: bool = False


def quantised(
    x: Tensor, scaling: Quantisation, transposed: bool = False
) -> tuple[Quantised, Quantised | None]:
    """Returns `[R, C]` by scales of its own largest magnitudes, and where it is wanted the
    transpose, which scales of a tensor or of square blocks have; one pass over memory on a GPU
    (two with one scale).
    """
    form, scaled, margin, powers = scaling
    kernels = KERNELS.of(x) if x.is_contiguous() else None
    if kernels is None:
        scale = scale_of(amax_of(x, scaled), LARGEST[form], margin, powers)
        made = quantise(x, form, scale)
        return made, made.transposed() if transposed else None
    rows, columns = x.shape
    data = torch.empty_like(x, dtype=FORMATS[form])
    other = data.new_empty(columns, rows) if transposed else None
    if scaled == "tensor":
        scale = scale_of(amax_of(x, scaled), LARGEST[form], margin, powers)
        kernels.fp8_quantise(x, scale, data, None, other, 0, 0, False)
        inverse = 1.0 / scale
    else:
        height = BLOCK_ROWS[scaled]
        shape = (rows, 1) if not height else (-(-rows // height), -(-columns // BLOCK))
        inverse = x.new_ones(shape, dtype=torch.float32)
        kernels.fp8_quantise(x, None, data, inverse, other, height, margin, powers)
    if other is None:
        return Quantised(data, inverse), None
    turned = inverse.t().contiguous() if inverse.dim() else inverse
    return Quantised(data, inverse), Quantised(other, turned)


def times(x: Tensor, scale: Tensor) -> Tensor:
    """Computes `x [R, C]` times a scale of any granularity; whole blocks take no matrix of factors.
    """
    (rows, columns), whole = x.shape, x.is_contiguous() and scale.dim() == 2
    if not x.numel():
        return x
    if (
        whole
        and scale.shape[1] * BLOCK == columns
        and rows in (scale.shape[0], scale.shape[0] * BLOCK)
    ):
        blocks = x.view(scale.shape[0], -1, scale.shape[1], BLOCK)
        return (blocks * scale[:, None, :, None]).view(rows, columns)
    return x * expand_scale(scale, x.shape)


def expand_scale(scale: Tensor, shape: torch.Size) -> Tensor:
    """Returns a factor for every element of `shape`, or what broadcasts to that."""
    for dim in range(scale.dim()):
        if scale.shape[dim] not in (1, shape[dim]):
            scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, shape[dim])
    return scale


def dequantise(x: Quantised, dtype: torch.dtype) -> Tensor:
    """Returns the stored values in a wide dtype."""
    return times(x.data.to(dtype), x.inverse.to(dtype))


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """Computes `a b^T` for `[M, K]` and `[N, K]` -> `[M, N]` in `dtype`."""
    return native(a, b, dtype) if runs_natively(a, b) else emulated(a, b, dtype)


def emulated(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """Computes `product` from dequantised operands, accumulated wide."""
    wider = wide_dtype(dtype)
    return (dequantise(a, wider) @ dequantise(b, wider).t()).to(dtype)


def native(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """Computes `product` by torch's kernel; with one scale per tensor or per row only.

    It takes whole multiples of `ALIGNED`: what is missing is filled up with zeros, which add
    nothing to a sum.
    """
    rows, columns = len(a.data), len(b.data)
    a, b = _aligned(a), _aligned(b)
    second = b.inverse.t().contiguous() if b.inverse.dim() else b.inverse
    y = torch._scaled_mm(a.data, b.data.t(), scale_a=a.inverse, scale_b=second, out_dtype=dtype)
    return y[:rows, :columns]


def _aligned(x: Quantised) -> Quantised:
    missing = [-size % ALIGNED for size in x.data.shape]
    if not any(missing):
        return x
    data = F.pad(x.data.view(torch.uint8), (0, missing[1], 0, missing[0])).view(
        x.data.dtype
    )  # eight zero bits are 0.0
    return Quantised(
        data, F.pad(x.inverse, (0, 0, 0, missing[0]), value=1.0) if x.inverse.dim() else x.inverse
    )


def runs_natively(a: Quantised, b: Quantised) -> bool:
    """Returns whether torch's kernel runs it: on GPUs that have FP8 arithmetic, for scales that
    their kernels take.

    A CPU has a kernel too, slower than the emulation: tests compare the two.
    """
    if a.data.device.type != "cuda" or torch.cuda.get_device_capability(a.data.device) < (8, 9):
        return False
    whole = all(x.inverse.dim() == 0 or x.inverse.shape == (x.data.shape[0], 1) for x in (a, b))
    return whole and a.data.numel() > 0 and b.data.numel() > 0
