"""Feed-forward nonlinearities. SwiGLU: arXiv 2002.05202."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops import native
from megallm.ops.kernels import KERNELS


class _SwiGlu(torch.autograd.Function):
    """Keeps its input only; autograd would keep `silu(gate)` too."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, kernels: object | None) -> Tensor:
        ctx.kernels = kernels
        if kernels is not None:
            gate_up = gate_up.contiguous()
            out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
            kernels.swiglu(gate_up, None, out)
        ctx.save_for_backward(gate_up)
        if kernels is not None:
            return out
        if native.kernels(gate_up) and gate_up.is_contiguous():
            return native.swiglu_forward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        if native.kernels(gate_up, grad) and gate_up.is_contiguous():
            return native.swiglu_backward(grad, gate_up), None
        into = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        if ctx.kernels is not None:
            ctx.kernels.swiglu(gate_up, grad.contiguous(), into)
            return into, None
        (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, dim=-1), into.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        # silu_backward is wide inside, unlike a product of narrow factors.
        torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu(gate, out=grad_up).mul_(grad)
        return into, None


def swiglu(gate_up: Tensor) -> Tensor:
    """Computes `silu(gate) * up` for `[..., 2 F]` with the gate first -> `[..., F]`."""
    return _SwiGlu.apply(gate_up, KERNELS.of(gate_up))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def geglu(gate_up: Tensor) -> Tensor:
    """Computes `gelu(gate) * up` for `[..., 2 F]` with the gate first -> `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_tanh(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


CLAMP, SIGMOID_SLOPE = 7.0, 1.702


def swiglu_clamped(gate_up: Tensor) -> Tensor:
    """Computes `gate * sigmoid(1.702 gate) * (up + 1)`, with the gate at most 7 and up between -7
    and 7 (gpt-oss, arXiv 2508.10925).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=CLAMP)
    return gate * (SIGMOID_SLOPE * gate).sigmoid() * (up.clamp(-CLAMP, CLAMP) + 1)


ACTIVATIONS = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": geglu_tanh,
    "swiglu_clamped": swiglu_clamped,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
