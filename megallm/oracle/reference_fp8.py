"""FP8 linears for the reference: what is stored in FP8, from the whole logical tensors, in ordinary
torch.

Imports nothing of megallm. A linear's input, weight and output gradient are rounded to FP8 numbers
before each of its three products, with one scale per tensor, or one per row along the dim that a
product sums over. A delayed scale is that of the largest magnitude of all earlier steps, of which
the reference sees fewer than a history is long.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.oracle import reference, reference_mla, reference_mtp
from megallm.oracle.reference_moe import Notes

FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
PATCHED = (reference, reference_mla, reference_mtp)


def rounded(x: Tensor, form: str, rowwise: bool, amax: Tensor | None = None) -> Tensor:
    """`x [R, C]` float64 as FP8 holds it; row by row with scales that are powers of two."""
    dtype, largest = FORMATS[form]
    if amax is None:
        amax = x.abs().max(1, keepdim=True).values if rowwise else x.abs().max()
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    if rowwise:
        scale = 2.0 ** scale.log2().floor()
    return (x * scale).clamp(-largest, largest).to(dtype).to(x.dtype) / scale


@dataclass
class Memory:
    """The largest magnitude of each operand (a linear's name, and which) in earlier steps, and in
    this one.

    They are kept as float32, as the model keeps them.
    """

    past: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    now: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def amax(self, name: str, operand: str, x: Tensor) -> Tensor:
        """Returns what the scale of `x` comes from: itself, where no earlier step has seen anything
        but zeros.
        """
        key, amax = (name, operand), x.abs().max()
        seen = amax.to(torch.float32).to(torch.float64)
        self.now[key] = torch.maximum(self.now.get(key, seen), seen)
        past = self.past.get(key, torch.zeros_like(seen))
        return past if past > 0 else amax

    def next_step(self) -> None:
        """What this step saw counts from now on."""
        for key, amax in self.now.items():
            self.past[key] = torch.maximum(self.past.get(key, amax), amax)
        self.now.clear()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, rowwise: bool, memory: Memory | None, name: str
    ) -> Tensor:  # fmt: skip
        amax = [memory and memory.amax(name, kind, operand) for kind, operand in (("x", x), ("weight", weight))]
        ctx.save_for_backward(x, weight)
        ctx.rowwise, ctx.memory, ctx.name, ctx.amax = rowwise, memory, name, amax
        return rounded(x, "e4m3", rowwise, amax[0]) @ rounded(weight, "e4m3", rowwise, amax[1]).T

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x, weight), rowwise, amax = ctx.saved_tensors, ctx.rowwise, ctx.amax
        form, largest = "e4m3" if rowwise else "e5m2", ctx.memory and ctx.memory.amax(ctx.name, "dy", dy)
        dx = rounded(dy, form, rowwise, largest) @ rounded(weight.T, "e4m3", rowwise, amax[1]).T
        dw = rounded(dy.T, form, rowwise, largest) @ rounded(x.T, "e4m3", rowwise, amax[0]).T
        return dx, dw, None, None, None


@dataclass
class Linears:
    """Stands in for `reference_mla.linear`: the parts of a stacked weight are one product, as they
    are in the model.

    `pieces` are the rows of the batch whose tokens share the scales of an input and its gradient,
    `shared` those that share the scales of an expert's.
    """

    rowwise: bool
    memory: Memory | None
    pieces: list[Tensor]
    shared: list[Tensor]
    last: tuple[str, Tensor | None, Tensor | None] = ("", None, None)

    def __call__(self, weights: Mapping[str, Tensor], name: str, x: Tensor, part: int | None = None) -> Tensor:
        weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
        if self.last[0] != name or self.last[1] is not x:
            groups, matrix = self.shared if ".experts." in name else self.pieces, weight.flatten(0, -2)
            made = [
                _Product.apply(x[rows].flatten(0, -2), matrix, self.rowwise, self.memory, name).unflatten(
                    0, (len(rows), *x.shape[1:-1])
                )
                for rows in groups
            ]
            product = torch.cat(made)[torch.cat(groups).argsort()]
            self.last = (name, x, product.unflatten(-1, weight.shape[:-1]))
        y = self.last[2] if part is None else self.last[2][..., part, :]
        if bias is not None:
            y = y + (bias if part is None else bias[part])
        return y


@dataclass
class Fp8Loss:
    """`reference.masked_loss` of a model whose blocks compute in FP8, `recipe` tensorwise, rowwise
    or delayed.

    A scale belongs to a tensor of one microbatch of one of `ranks` data ranks, that of an expert to
    what `together` neighbouring data ranks send it. The batch has data rank after data rank,
    microbatch after microbatch.
    """

    recipe: str
    ranks: int
    micros: int
    together: int
    memory: Memory = field(default_factory=Memory)

    def __call__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], batch: Mapping[str, Tensor],
        notes: Notes | None = None,
    ) -> Tensor:  # fmt: skip
        rows = torch.arange(len(batch["mask"])).view(self.ranks, self.micros, -1)
        shared = rows.unflatten(0, (-1, self.together)).transpose(1, 2).flatten(2).flatten(0, 1)
        if torch.is_grad_enabled():
            self.memory.next_step()
        memory = self.memory if self.recipe == "delayed" else None
        linears = Linears(self.recipe == "rowwise", memory, list(rows.flatten(0, 1)), list(shared))
        with ExitStack() as patched:
            for module in PATCHED:
                patched.enter_context(mock.patch.object(module, "linear", linears))
            return reference.masked_loss(config, weights, batch, notes)
