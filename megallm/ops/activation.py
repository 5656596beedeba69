"""Feed-forward nonlinearities. SwiGLU: arXiv 2002.05202."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `[..., 2 F]` with the gate first -> `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu, "gelu_tanh": gelu_tanh}
