"""Grouped GEMM: matrix products of runs of rows, each run with its own matrix: what the experts of
one rank compute.

Rows are sorted by expert. `loop` is the reference, one product after another in any dtype;
`F.grouped_mm` is one kernel, for the dtypes and strides that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is refused by the kernel
CPU_DTYPES = (
    torch.float32,
)  # of these on a CPU; its products of narrow numbers are better made by the loop
STRIDE_BYTES = 16  # what the kernel asks of the rows of its matrices
CPU_ROWS = 64


@dataclass(frozen=True)
class Runs:
    """How many rows each of the X matrices has, as `ends` int32 `[X]` on the device; `known` when
    the host has them.
    """

    ends: Tensor
    known: tuple[int, ...] | None = None

    @staticmethod
    def of(sizes: list[int], device: torch.device) -> Runs:
        ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Runs(ends.to(device, non_blocking=True), tuple(sizes))

    def with_rest(self, rows: int) -> Runs:
        """Returns the runs of `rows` in all: those behind the last run are given to it."""
        return Runs(torch.cat((self.ends[:-1], torch.full_like(self.ends[-1:], rows))))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each matrix on the host: the loop needs them, the kernel does not. May
        wait for the device.
        """
        if self.known is not None:
            return self.known
        ends = self.ends.tolist()
        return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


class WeightGrads(Protocol):
    """Takes weight gradients that are put off (`parallel.linear.WeightGradQueue`)."""

    def put(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None: ...


def loop_rows(x: Tensor, matrices: Tensor, runs: Runs) -> Tensor:
    """Multiplies `[N, K]` by `[X, K, M]` of each row's run -> `[N, M]`."""
    pairs = zip(x.split(runs.sizes), matrices, strict=True)
    return torch.cat([(_filled(rows) @ matrix)[: len(rows)] for rows, matrix in pairs])


def loop_outer(a: Tensor, b: Tensor, runs: Runs) -> Tensor:
    """Computes `a_e^T b_e` of each run of `[N, K]` and `[N, M]` -> `[X, K, M]`; zero where a run is
    empty.
    """
    pairs = zip(a.split(runs.sizes), b.split(runs.sizes), strict=True)
    return torch.stack([_filled(p).mT @ _filled(q) for p, q in pairs])


def _filled(rows: Tensor) -> Tensor:
    """Rows of zeros up to a multiple of CPU_ROWS, for narrow numbers on a CPU.

    There oneDNN makes code for every number of rows that it meets, and keeps the last thousand of
    them: runs of any length would cost up to a gigabyte, and more time than the products.
    """
    missing = -len(rows) % CPU_ROWS
    if (
        not missing
        or rows.device.type != "cpu"
        or rows.dtype not in (torch.bfloat16, torch.float16)
    ):
        return rows
    return F.pad(rows, (0, 0, 0, missing))


def fits_kernel(*matrices: Tensor) -> bool:
    """Returns whether `F.grouped_mm` takes these: a known dtype, rows at whole multiples of 16
    bytes, something to do.
    """
    first = matrices[0]
    if first.dtype not in GROUPED_DTYPES or any(
        x.dtype != first.dtype or x.numel() == 0 for x in matrices
    ):
        return False
    if first.device.type == "cpu" and first.dtype not in CPU_DTYPES:
        return False
    return all(x.shape[-1] * x.element_size() % STRIDE_BYTES == 0 for x in matrices)


def _rows(x: Tensor, matrices: Tensor, runs: Runs, stored: Tensor) -> Tensor:
    """`stored` is the contiguous tensor of which `matrices` may be the transpose."""
    if fits_kernel(x, stored):
        return F.grouped_mm(x, matrices, offs=runs.ends)
    return loop_rows(x, matrices, runs)


def grouped_weight_gradient(x: Tensor, dy: Tensor, runs: Runs) -> Tensor:
    """Maps `[N, in]` and `[N, out]` -> `[X, out, in]`: always of the full shape, zero for experts
    without rows.
    """
    if fits_kernel(x, dy):
        return F.grouped_mm(dy.mT, x, offs=runs.ends)
    return loop_outer(dy, x, runs)


def grouped_input_gradient(dy: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """Computes `dy_e W_e` for the rows of each expert: `[N, out]`, W `[X, out, in]` -> `[N, in]`.
    """
    return _rows(dy, weight, runs, weight)


def grouped_linear(
    x: Tensor, weight: Tensor, runs: Runs, weight_grads: WeightGrads | None = None
) -> Tensor:
    """Computes `x_e W_e^T` for the rows of each expert: `[N, in]`, W `[X, out, in]` -> `[N, out]`.

    With `weight_grads` the weight's gradient goes there. The weight always gets one, also where no
    expert has a row: whether ranks reduce it together must not depend on the tokens.
    """
    return _GroupedLinear.apply(x, weight, runs, weight_grads)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, runs: Runs, weight_grads: WeightGrads | None
    ) -> Tensor:
        ctx.save_for_backward(*([x] if ctx.needs_input_grad[1] else []))  # frozen: none is kept
        # Not save_for_backward: recomputation would hand back a detached copy, which leads to no
        # parameter.
        ctx.weight, ctx.runs, ctx.weight_grads = weight, runs, weight_grads
        return _rows(x, weight.mT, runs, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        weight, runs, dy = ctx.weight.detach(), ctx.runs, dy.contiguous()
        dx = grouped_input_gradient(dy, weight, runs) if ctx.needs_input_grad[0] else None
        gradient = None
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            if ctx.weight_grads is None:
                gradient = grouped_weight_gradient(x, dy, runs)
            else:
                ctx.weight_grads.put(
                    ctx.weight, partial(grouped_weight_gradient, x.detach(), dy, runs)
                )
        return dx, gradient, None, None
