"""FP8 linears for the reference: what is stored in FP8, from the whole logical tensors, in ordinary torch.

Imports nothing of megallm. A linear's input, weight and output gradient are rounded to FP8 numbers before each of its
three products, with one scale per tensor, or one per row along the dim that a product sums over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.oracle import reference, reference_mla

FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


def rounded(x: Tensor, form: str, rowwise: bool) -> Tensor:
    """`x [R, C]` float64 as FP8 holds it; row by row with scales that are powers of two."""
    dtype, largest = FORMATS[form]
    amax = x.abs().max(1, keepdim=True).values if rowwise else x.abs().max()
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    if rowwise:
        scale = 2.0 ** scale.log2().floor()
    return (x * scale).clamp(-largest, largest).to(dtype).to(x.dtype) / scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, rowwise: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rowwise = rowwise
        return rounded(x, "e4m3", rowwise) @ rounded(weight, "e4m3", rowwise).T

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x, weight), rowwise = ctx.saved_tensors, ctx.rowwise
        form = "e4m3" if rowwise else "e5m2"
        dx = rounded(dy, form, rowwise) @ rounded(weight.T, "e4m3", rowwise).T
        return dx, rounded(dy.T, form, rowwise) @ rounded(x.T, "e4m3", rowwise).T, None


class Linears:
    """Stands in for `reference.linear`: the parts of a stacked weight are one product, as they are in the model."""

    def __init__(self, rowwise: bool) -> None:
        self.rowwise, self.last = rowwise, ("", None, None)

    def __call__(self, weights: Mapping[str, Tensor], name: str, x: Tensor, part: int | None = None) -> Tensor:
        weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
        if self.last[0] != name or self.last[1] is not x:
            product = _Product.apply(x.flatten(0, -2), weight.flatten(0, -2), self.rowwise)
            self.last = (name, x, product.unflatten(0, x.shape[:-1]).unflatten(-1, weight.shape[:-1]))
        y = self.last[2] if part is None else self.last[2][..., part, :]
        if bias is not None:
            y = y + (bias if part is None else bias[part])
        return y


@dataclass(frozen=True)
class Fp8Loss:
    """`reference.masked_loss` of a model whose blocks compute in FP8, `recipe` tensorwise or rowwise.

    A scale belongs to a tensor of one microbatch, so the batch is taken in `micros` equal pieces.
    """

    recipe: str
    micros: int

    def __call__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        linears, total = Linears(self.recipe == "rowwise"), torch.zeros((), dtype=torch.float64)
        with mock.patch.object(reference, "linear", linears), mock.patch.object(reference_mla, "linear", linears):
            for pieces in zip(*(values.chunk(self.micros) for values in batch.values()), strict=True):
                piece = dict(zip(batch, pieces, strict=True))
                if piece["mask"].any():
                    total = total + reference.masked_loss(config, weights, piece) * piece["mask"].sum()
        return total / batch["mask"].sum()
