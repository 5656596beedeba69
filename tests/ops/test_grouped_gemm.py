"""Grouped matrix products: the kernel against the loop, forward and backward; permutations against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.ops import grouped_gemm
from megallm.ops.grouped_gemm import Runs, fits_kernel, grouped_linear, loop_rows
from megallm.ops.moe_permute import combine, order_of, permute, unpermute
from megallm.parallel.linear import WeightGradQueue, compute_weight_grads

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SIZES = [([3, 5, 2], "all"), ([0, 7, 0], "idle"), ([0, 0, 0], "nothing"), ([1, 0, 9], "one row")]


def run(dtype: torch.dtype, sizes: list[int], weight_grads: WeightGradQueue | None = None, wide: int = 24):
    """Output and gradients of one product of seeded numbers, and the leaves' values."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(sum(sizes), 16, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), wide, 16, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(sum(sizes), wide, generator=draw, dtype=torch.float64).to(dtype)
    y = grouped_linear(x, weight, Runs.of(sizes, x.device), weight_grads)
    y.backward(grad)
    if weight_grads is not None:
        assert weight.grad is None, "put off"
        compute_weight_grads(weight_grads.take())
    return y.detach(), x.grad, weight.grad, (x.detach(), weight.detach(), grad)


def by_definition(x, weight, grad, sizes):
    """One expert after another in float64."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = torch.einsum("ni,noi->no", x, weight[experts])
    dx = torch.einsum("no,noi->ni", grad, weight[experts])
    dw = torch.zeros_like(weight).index_add_(0, experts, torch.einsum("no,ni->noi", grad, x))
    return y, dx, dw


@pytest.mark.parametrize("weight_grads", [False, True], ids=["at once", "put off"])
@pytest.mark.parametrize("sizes", [sizes for sizes, _ in SIZES], ids=[name for _, name in SIZES])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_grouped_linear_is_its_definition(dtype, sizes, weight_grads):
    y, dx, dw, inputs = run(dtype, sizes, WeightGradQueue() if weight_grads else None)
    for mine, theirs in zip((y, dx, dw), by_definition(*inputs, sizes), strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        scale = theirs.abs().max() if theirs.numel() else 0.0
        assert mine.numel() == 0 or (mine.double() - theirs).abs().max() <= TOLERANCES[dtype] * max(scale, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_and_the_loop_agree(dtype, monkeypatch):
    """The same products twice: by `F.grouped_mm`, and with the kernel refused."""
    used = []
    monkeypatch.setattr(grouped_gemm, "CPU_DTYPES", grouped_gemm.GROUPED_DTYPES)
    monkeypatch.setattr(grouped_gemm, "loop_rows", lambda *a: used.append("loop") or loop_rows(*a))
    kernel = run(dtype, [3, 0, 5])
    assert not used, "these sizes fit the kernel"
    monkeypatch.setattr(grouped_gemm, "fits_kernel", lambda *_: False)
    loop = run(dtype, [3, 0, 5])
    assert used == ["loop", "loop"]
    for mine, theirs in zip(kernel[:3], loop[:3], strict=True):
        assert (mine - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()


def test_the_kernel_is_asked_only_for_what_it_takes():
    x = torch.zeros(4, 16)
    assert fits_kernel(x) and not fits_kernel(x.double()), "float64 goes through the loop"
    assert not fits_kernel(torch.zeros(4, 5)), "rows of 20 bytes"
    assert not fits_kernel(x.bfloat16()), "on a CPU the loop"
    assert not fits_kernel(x[:0]) and not fits_kernel(x, x.bfloat16())


def test_a_wrong_run_is_noticed():
    """Negative control: a row given to the wrong expert."""
    y, _, _, (x, weight, grad) = run(torch.float64, [3, 5, 2])
    assert (y - by_definition(x, weight, grad, [4, 4, 2])[0]).abs().max() > 0.1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 3), st.integers(3, 6), st.booleans(), st.integers(0, 9))
def test_permuting_and_combining_are_their_definitions(tokens, k, num_experts, drops, seed):
    draw = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=draw).topk(k, -1).indices
    keep = torch.rand(tokens, k, generator=draw) < 0.6 if drops else None
    kept = torch.ones(tokens, k, dtype=torch.bool) if keep is None else keep
    x = torch.randn(tokens, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, k, generator=draw, dtype=torch.float64, requires_grad=True)
    factor = torch.arange(1.0, num_experts + 1, dtype=torch.float64)  # what each expert multiplies by
    order, counts = order_of(experts, num_experts, keep)
    assert torch.equal(order.sort().values, torch.arange(tokens * k))
    assert bool(kept.flatten()[order[: counts.sum()]].all())
    order = order[: counts.sum()]
    sorted_experts = experts.flatten()[order]
    assert torch.equal(sorted_experts, sorted_experts.sort().values)
    assert torch.equal(counts, torch.bincount(experts[kept], minlength=num_experts))
    y = combine(permute(x, order, k) * factor[sorted_experts][:, None], order, weights)
    theirs = ((weights * factor[experts] * kept)[..., None] * x[:, None]).sum(1)
    assert torch.allclose(y, theirs, atol=1e-12)
    grad = torch.randn(tokens, 4, generator=draw, dtype=torch.float64)
    if tokens:
        mine = torch.autograd.grad(y, (x, weights), grad)
        for a, b in zip(mine, torch.autograd.grad(theirs, (x, weights), grad), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_unpermute_undoes_permute():
    order = torch.tensor([2, 0, 3, 1])
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(unpermute(permute(x, order, 1), order, 4), x)


def test_narrow_runs_of_any_length_meet_few_shapes_on_a_cpu(monkeypatch):
    """oneDNN would make code for each number of rows; the rows that are added change nothing."""
    seen = set()
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.add(tuple(a.shape)) or matmul(a, b))
    runs = Runs.of([1, 37, 64, 65, 0], torch.device("cpu"))
    x, w = torch.randn(167, 16).bfloat16(), torch.randn(5, 16, 8).bfloat16()
    y = loop_rows(x, w, runs)
    assert y.shape == (167, 8) and {shape[0] for shape in seen} == {0, 64, 128}
    plain = torch.cat([matmul(a, b) for a, b in zip(x.split(runs.sizes), w, strict=True)])
    assert (y - plain).abs().max() <= TOLERANCES[torch.bfloat16] * plain.abs().max()
