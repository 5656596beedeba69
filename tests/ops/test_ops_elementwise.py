"""Norms, rotary embedding and activations against written-out references, forward and gradient, in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megallm.ops.activation import ACTIVATIONS
from megallm.ops.norm import layer_norm, rms_norm
from megallm.ops.precision import wide
from megallm.ops.rope import apply_rope, rope_tables

# One table of tolerances per dtype: relative to the largest element.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
EPS = 1e-5


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def swiglu(x: Tensor) -> Tensor:
    gate, up = x[..., :4], x[..., 4:]
    return gate / (1 + (-gate).exp()) * up


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def rotated(x: Tensor) -> Tensor:
    """Each pair (i, i + E/2) as a complex number, turned by position * theta^(-2 i / E)."""
    half = x.shape[-1] // 2
    turn = PLACES[..., None].double() * 100.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turn), turn)[:, :, None]
    return torch.cat((z.real, z.imag), -1)


PLACES = torch.tensor([[0, 1, 5, 30], [7, 8, 9, 3]])


def rotate(x: Tensor) -> Tensor:
    return apply_rope(x, *rope_tables(PLACES, x.shape[-1], 100.0, wide(x).dtype))


CASES: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), rms, [(2, 4, 8), (8,)]),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, EPS), layer, [(2, 4, 8), (8,), (8,)]),
    "swiglu": (ACTIVATIONS["swiglu"], swiglu, [(2, 4, 8)]),
    "gelu": (ACTIVATIONS["gelu"], gelu, [(2, 4, 8)]),
    "gelu_tanh": (ACTIVATIONS["gelu_tanh"], gelu_tanh, [(2, 4, 8)]),
    "rope": (rotate, rotated, [(2, 4, 3, 8)]),
}


def error(ours: Callable, theirs: Callable, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> float:
    """The largest relative error of the result and of every gradient; the reference runs in float64."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, z = ours(*inputs), theirs(*exact)
    assert y.dtype == dtype
    upstream = torch.randn(z.shape, generator=draw, dtype=torch.float64).to(dtype)
    y.backward(upstream)
    z.backward(upstream.double())
    pairs = [(y.detach(), z.detach()), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient(name, dtype):
    ours, theirs, shapes = CASES[name]
    assert error(ours, theirs, shapes, dtype) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("one", "other"), [("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")])
def test_the_two_gelus_are_told_apart(one, other):
    assert error(CASES[one][0], CASES[other][1], [(2, 4, 8)], torch.float32) > 10 * TOLERANCES[torch.float32]


def test_wide_is_never_a_downcast():
    assert wide(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert wide(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.ones(1)).dtype == torch.float32


def test_positions_far_out_keep_their_angle_in_float32():
    """Angles are made in the wide dtype: position 100,000 is turned to within 1e-2 of the exact angle."""
    places = torch.tensor([[100_000]])
    cos, sin = rope_tables(places, 8, 10000.0, torch.float32)
    exact_cos, exact_sin = rope_tables(places, 8, 10000.0, torch.float64)
    assert float((cos - exact_cos).abs().max()) < 1e-2 and float((sin - exact_sin).abs().max()) < 1e-2
