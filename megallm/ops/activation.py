"""Feed-forward nonlinearities. SwiGLU: arXiv 2002.05202."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _SwiGlu(torch.autograd.Function):
    """Keeps its input only; autograd would keep `silu(gate)` too."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)  # wide inside, unlike a product of narrow factors
        return torch.cat((grad_gate, F.silu(gate).mul_(grad)), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `[..., 2 F]` with the gate first -> `[..., F]`."""
    return _SwiGlu.apply(gate_up)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu, "gelu_tanh": gelu_tanh}
