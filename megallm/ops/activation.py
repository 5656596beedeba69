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
        (gate_up,) = ctx.saved_tensors
        into = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, dim=-1), into.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        # silu_backward is wide inside, unlike a product of narrow factors.
        torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu(gate, out=grad_up).mul_(grad)
        return into


def swiglu(gate_up: Tensor) -> Tensor:
    """Computes `silu(gate) * up` for `[..., 2 F]` with the gate first -> `[..., F]`."""
    return _SwiGlu.apply(gate_up)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu, "gelu_tanh": gelu_tanh}
