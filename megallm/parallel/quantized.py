"""Frozen weights of linears in 4 bit (QLoRA, arXiv 2305.14314), instead of a parameter.

Every rank quantises the whole matrix and keeps the codes of its piece, so values do not depend on
the layout. Nothing else of the weight exists: it is made anew in the forward pass and again in the
backward pass, which needs it for the gradient of the input. These are no parameters: they lie in no
bucket, and data ranks each hold them whole at every ZeRO stage. Gathering them would take a message
a block for the 0.52 bytes a value that stage 3 would spare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.base.errors import InternalError
from megallm.ops.grouped_gemm import Runs, grouped_input_gradient, grouped_linear
from megallm.ops.nf4 import MatrixRange, Nf4
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, WeightSource

# Fills a tensor, shaped like a box of the logical tensor, with the box at an offset.
ReadInto = Callable[[tuple[int, ...], Tensor], None]


class QuantizedWeight:
    """This rank's piece of a weight `(*stack, out, in)`, matrix by matrix; empty until `read`."""

    def __init__(self, shard: Shard, mesh: Mesh) -> None:
        self.shard, self.device = shard, mesh.device
        self.box = shard.box(mesh.layout, mesh.coords)
        self.matrices: list[Nf4] = []

    def _members(self) -> Iterator[tuple[int, ...]]:
        """The places in the stack of the matrices that this rank has."""
        begins, counts = self.box.offset[:-2], self.box.shape[:-2]
        yield from product(*(range(a, a + n) for a, n in zip(begins, counts, strict=True)))

    def read_from(self, source: WeightSource, name: str) -> None:
        """Quantise the weight that a source has under this name, one whole matrix after
        another.
        """
        self.read(partial(source.read_into, name), source.info(name)[1])

    def read(self, read_into: ReadInto, dtype: torch.dtype = torch.float32) -> None:
        """Quantise what `read_into` gives in `dtype`."""
        full = self.shard.full[-2:]
        rows, columns = (
            (a, a + n) for a, n in zip(self.box.offset[-2:], self.box.shape[-2:], strict=True)
        )
        self.matrices = []
        for member in self._members():
            whole = torch.empty((1,) * len(member) + full, dtype=dtype, device=self.device)
            read_into((*member, 0, 0), whole)
            self.matrices.append(Nf4.of(whole.view(full), MatrixRange(rows, columns, full)))

    @property
    def numel(self) -> int:
        """Values of this rank's piece."""
        return prod(self.box.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(matrix.num_bytes for matrix in self.matrices)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the piece as the parameter would be, `(*stack, out, in)`."""
        if not self.matrices:
            raise InternalError("a 4-bit weight is used before it was filled.")
        made = [matrix.dequantize(dtype) for matrix in self.matrices]
        return torch.stack(made).view(self.box.shape)

    def linear(self, x: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        """Computes `x W^T + b` with these rows of each matrix, `[..., in] -> [..., stack * out]`.
        """
        return _QuantizedLinear.apply(x, self, bias, rows)

    def grouped_linear(self, x: Tensor, runs: Runs) -> Tensor:
        """Computes `x_e W_e^T` for the rows of each expert, `[N, in] -> [N, stack * out]`."""
        return _QuantizedGroupedLinear.apply(x, self, runs)

    def rows(self, dtype: torch.dtype, rows: slice | None) -> Tensor:
        """Returns `(stack * out, in)` of these rows of each matrix."""
        whole = self.dequantize(dtype)
        return (whole if rows is None else whole[..., rows, :]).flatten(0, -2)


def rounded(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values `(*stack, out, in)` that whole matrices have in 4 bit, in `dtype`."""
    full = matrices.shape[-2:]
    piece = MatrixRange((0, full[0]), (0, full[1]), tuple(full))
    made = [Nf4.of(matrix, piece).dequantize(dtype) for matrix in matrices.view(-1, *full)]
    return torch.stack(made).view(matrices.shape)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        rows: slice | None,
    ) -> Tensor:
        ctx.weight, ctx.rows = weight, rows
        return F.linear(x, weight.rows(x.dtype, rows), bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        needs = ctx.needs_input_grad
        dx = dy @ ctx.weight.rows(dy.dtype, ctx.rows) if needs[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if needs[2] else None, None


class _QuantizedGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: QuantizedWeight, runs: Runs) -> Tensor:
        ctx.weight, ctx.runs = weight, runs
        return grouped_linear(x, weight.dequantize(x.dtype).flatten(1, -2), runs)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        whole = ctx.weight.dequantize(dy.dtype).flatten(1, -2)
        return grouped_input_gradient(dy.contiguous(), whole, ctx.runs), None, None
