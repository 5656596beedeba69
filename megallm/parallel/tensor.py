"""Tensor- and sequence-parallel layers: linears split by columns or rows, and norms.

A block enters the tensor-parallel region once (`gather_input`), runs any number of column-parallel
linears on that input, and leaves through a row-parallel linear. With sequence parallelism the
activations outside are split along T, `[B, T/tp, D]`, so parameters used there have a gradient that
is partial over tp. Papers: Megatron-LM (arXiv 1909.08053), sequence parallelism (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megallm.ops.low_precision import Fp8Options
from megallm.ops.norm import layer_norm, rms_norm
from megallm.ops.precision import wide
from megallm.ops.te_linear import TeLinear
from megallm.parallel import comm
from megallm.parallel.fp8 import Fp8Linear, fp8_linear
from megallm.parallel.linear import WeightGradQueue, linear
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.quantized import QuantizedWeight
from megallm.parallel.shard import Init, Shard, constant

SEQUENCE_DIM = 1
ADAPTER = ".adapter."  # in the logical name of every parameter of an adapter


class ShardedModule(nn.Module):
    """A module whose parameters live on the meta device until the engine places them; `shards`
    describes each.

    `sp` says whether activations outside the tensor-parallel region are split along T; it is a
    property of activations, not of parameters, and decoding switches it off (`whole_sequences`).
    With `weight_grads`, linears put their weight gradients off (`defer_weight_grads`).
    """

    def __init__(self, mesh: Mesh, sp: bool = False) -> None:
        super().__init__()
        self.mesh = mesh
        self.sp = sp and mesh.tp.size > 1
        self.shards: dict[str, Shard] = {}
        self.weight_grads: WeightGradQueue | None = None

    def add_parameter(self, name: str, shard: Shard) -> None:
        """Register a meta parameter of this rank's local shape."""
        self.shards[name] = shard
        shape = shard.box(self.mesh.layout, self.mesh.coords).shape
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


class Adaptable(ShardedModule):
    """A module with a slot for an adapter; without one, or with `adapts` off, it is the base."""

    def __init__(self, mesh: Mesh, sp: bool = False) -> None:
        super().__init__(mesh, sp)
        self.adapter: nn.Module | None = None
        self.adapts = True

    @property
    def is_adapted(self) -> bool:
        """Whether the result is another than that of the weight alone."""
        return self.adapter is not None and self.adapts


class Slot(Adaptable):
    """A place for an adapter that belongs to no weight; its parameters stand under
    `....adapter.`.
    """

    def forward(self, y: Any, x: Tensor | None = None, *where: Any) -> Any:
        """Returns what the adapter makes of `y`, which was made of `x`; or `y` as it is."""
        return self.adapter(x, y, *where) if self.is_adapted else y


class Linear(Adaptable):
    """A layer that is one product with its `weight`, or one for each expert; in FP8 where `use_fp8`
    says so.
    """

    def __init__(self, mesh: Mesh, sp: bool = False) -> None:
        super().__init__(mesh, sp)
        self.fp8: Fp8Linear | None = None
        self.te: TeLinear | None = None
        self.quantized: QuantizedWeight | None = None

    def quantize(self) -> None:
        """Hold the weight in 4 bit from now on, on the meta device: it is no parameter any
        more.
        """
        self.register_parameter("weight", None)
        self.quantized = QuantizedWeight(self.shards["weight"], self.mesh)

    @property
    def matrix(self) -> Tensor:
        """This rank's piece of the weight, made from 4 bit where it is held so."""
        if self.quantized is None:
            return self.weight
        return self.quantized.dequantize(torch.float32)

    def adapted(self, x: Tensor, y: Tensor, *where: Any) -> Tensor:
        """Returns what the adapter makes of this rank's product `y` of `x`, before anything is
        reduced over tp.

        The slot takes a module called with `(x, y, *where)`; `where` are the rows of the weight
        that were used, or the runs of rows of each expert. Its parameters have Shard records of
        their own and stand under the linear's name.
        """
        return self.adapter(x, y, *where) if self.is_adapted else y

    @property
    def divided(self) -> dict[str, tuple[Axis, ...]]:
        """The axes that split the dims of input, weight and output: `tokens`, `in` and `out`."""
        raise NotImplementedError

    def multiply(self, x: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
        """Computes `x W^T + b` with these rows of each matrix, `[..., in] -> [..., out]`, in FP8,
        with the weight in 4 bit or its gradient put off, where asked.
        """
        if self.quantized is not None:
            return self.quantized.linear(x, bias, rows)
        weight = (self.weight if rows is None else self.weight[..., rows, :]).flatten(0, -2)
        if self.te is not None:
            return self.te(x, weight, bias)
        if self.fp8 is not None:
            return fp8_linear(x, weight, bias, self.fp8, self.weight_grads)
        return linear(x, weight, bias, self.weight_grads)


def use_fp8(model: nn.Module, options: Fp8Options) -> dict[str, Fp8Linear]:
    """Let every linear of `model` compute in FP8; ours by the name of its weight, none of
    Transformer Engine's.

    That library's linears take no runs of any length: with it experts stay as they are.
    """
    made = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        weight, ours = module.shards["weight"], options.backend == "megallm"
        if ours:
            experts = weight.full[0] if weight.expert else 0
            module.fp8 = made[f"{name}.weight"] = Fp8Linear(
                options, module.divided, module.mesh, experts
            )
        elif not weight.expert:
            module.te = TeLinear(options, module.mesh.tp.group)
    return made


def defer_weight_grads(model: nn.Module, weight_grads: WeightGradQueue) -> None:
    """Let every linear of `model` put its weight gradients into the queue."""
    for module in model.modules():
        if isinstance(module, ShardedModule):
            module.weight_grads = weight_grads


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Run `model` without sequence parallelism inside the context."""
    split = [
        module for module in model.modules() if isinstance(module, ShardedModule) and module.sp
    ]
    for module in split:
        module.sp = False
    try:
        yield
    finally:
        for module in split:
            module.sp = True


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run `model` as it is without its adapters inside the context: the reference model at no cost
    of memory.
    """
    slots = [
        module for module in model.modules() if isinstance(module, Adaptable) and module.adapts
    ]
    for module in slots:
        module.adapts = False
    try:
        yield
    finally:
        for module in slots:
            module.adapts = True


def gather_input(x: Tensor, mesh: Mesh, sp: bool, name: str | None = None) -> Tensor:
    """Gathers activations into the tensor-parallel region: `[B, T/tp, D]` (sp) or `[B, T, D]` ->
    `[B, T, D]`; collective over tp.
    """
    if sp:
        return comm.gather_fwd_reduce_scatter_bwd(x, mesh.tp, SEQUENCE_DIM, name or "sp.enter")
    return comm.copy_fwd_sum_bwd(x, mesh.tp, name or "tp.enter")


def reduce_output(x: Tensor, mesh: Mesh, sp: bool, name: str | None = None) -> Tensor:
    """Reduces activations on their way out of the tensor-parallel region: partial sums `[B, T, D]`
    -> `[B, T/tp, D]` (sp) or `[B, T, D]`; over tp.
    """
    if sp:
        return comm.reduce_scatter_fwd_gather_bwd(x, mesh.tp, SEQUENCE_DIM, name or "sp.leave")
    return comm.sum_fwd_copy_bwd(x, mesh.tp, name or "tp.leave")


def sequence_partial(mesh: Mesh, sp: bool) -> tuple[str, ...]:
    """Returns `partial` of a parameter that is applied to sequence-split activations."""
    return ("tp",) if sp and mesh.tp.size > 1 else ()


class ColumnLinear(Linear):
    """`y = x W^T + b` with W `(*stack, out, in)`, `out` split over tp: `[B, T, in] -> [B, T, stack
    * out/tp]`.

    No communication: the input comes from `gather_input`. With `replicated` the weight is whole on
    every rank and its gradient is a partial sum over tp, because each rank projects only `rows` of
    it.
    """

    def __init__(
        self, mesh: Mesh, full: tuple[int, ...], init: Init, bias: bool, replicated: bool = False
    ) -> None:
        super().__init__(mesh)
        dim = len(full) - 2
        split = {} if replicated else {dim: "tp"}
        partial = ("tp",) if replicated and mesh.tp.size > 1 else ()
        self.add_parameter("weight", Shard(full, split, partial, init))
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", Shard(full[:-1], split, partial, constant(0.0), decay=False))

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        bias = self.bias
        if bias is not None:
            bias = (bias if rows is None else bias[..., rows]).flatten()
        return self.adapted(x, self.multiply(x, bias, rows), rows)

    @property
    def divided(self) -> dict[str, tuple[Axis, ...]]:
        return {
            "tokens": (self.mesh.cp,),
            "in": (),
            "out": (self.mesh.tp,) if self.shards["weight"].split else (),
        }


class TokenLinear(Linear):
    """`y = x W^T + b` outside the tensor-parallel region: W `(out, in)` whole on every rank,
    applied to its own tokens.

    `[B, T/tp or T, in] -> [B, T/tp or T, out]`, no communication; with `sp` the gradient is partial
    over tp.
    """

    def __init__(self, mesh: Mesh, full: tuple[int, int], init: Init, bias: bool, sp: bool) -> None:
        super().__init__(mesh, sp)
        partial = sequence_partial(mesh, sp)
        self.add_parameter("weight", Shard(full, {}, partial, init))
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", Shard(full[:1], {}, partial, constant(0.0), decay=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.multiply(x, self.bias), None)

    @property
    def divided(self) -> dict[str, tuple[Axis, ...]]:
        return {
            "tokens": (self.mesh.cp, self.mesh.tp) if self.sp else (self.mesh.cp,),
            "in": (),
            "out": (),
        }


class RowLinear(Linear):
    """`y = sum over tp of x W^T, + b` with W `(out, in)`, `in` split over tp; the bias is added
    once, after the sum.
    """

    def __init__(self, mesh: Mesh, full: tuple[int, int], init: Init, bias: bool, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.add_parameter("weight", Shard(full, {1: "tp"}, (), init))
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter(
                "bias", Shard(full[:1], {}, sequence_partial(mesh, sp), constant(0.0), decay=False)
            )

    def local(self, x: Tensor) -> Tensor:
        """Returns the partial sum of this rank, `[B, T, in/tp] -> [B, T, out]`."""
        return self.adapted(x, self.multiply(x, None), None)

    @property
    def divided(self) -> dict[str, tuple[Axis, ...]]:
        return {"tokens": (self.mesh.cp,), "in": (self.mesh.tp,), "out": ()}

    def reduce(self, y: Tensor) -> Tensor:
        """Sum the partial sums over tp and add the bias."""
        y = reduce_output(y, self.mesh, self.sp)
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.local(x))


class Norm(ShardedModule):
    """RMSNorm or LayerNorm over the last dim, computed wide. With `rmsnorm_unit` the weights are
    counted from 1 (Gemma); `layernorm_unbiased` has no bias.
    """

    def __init__(
        self, mesh: Mesh, kind: str, size: int, eps: float, partial: tuple[str, ...]
    ) -> None:
        super().__init__(mesh)
        self.eps, self.kind = eps, kind
        self.register_parameter("bias", None)
        start = constant(0.0 if kind == "rmsnorm_unit" else 1.0)
        self.add_parameter("weight", Shard((size,), {}, partial, start, decay=False))
        if kind == "layernorm":
            self.add_parameter("bias", Shard((size,), {}, partial, constant(0.0), decay=False))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        if self.kind == "rmsnorm_unit":
            return rms_norm(x, wide(self.weight) + 1, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)
