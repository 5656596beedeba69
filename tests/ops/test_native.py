"""The kernels for CPUs (csrc/ops) beside the torch forms in float64, for every instruction set that this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megallm.base import extension
from megallm.base.errors import UsageError
from megallm.ops import attention, cross_entropy, flash, native, product
from megallm.ops.activation import swiglu
from megallm.ops.cross_entropy import Softmax, Targets, Upstream
from megallm.ops.norm import rms_norm
from megallm.ops.rope import apply_rope
from megallm.ops.tiles import BAND, FULL, MaskSpec, Span, Tile, plan_tiles

pytestmark = pytest.mark.skipif(extension.ops() is None, reason="megallm._ops was NOT built: no kernel is tested")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.use_kernels(request.param)
    except UsageError as error:
        pytest.skip(f"NOT TESTED on this machine: {error}")
    yield request.param
    native.use_kernels("auto")
    torch.set_num_threads(1)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        size = max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted).abs().max().item() <= TOLERANCE[dtype] * size


def compare(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients in `dtype` beside those of the same numbers in float64, which no kernel takes."""
    narrow = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    found, wanted = function(*narrow), function(*exact)
    assert found.dtype == dtype and wanted.dtype == torch.float64
    grad = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    close(found, wanted, dtype)
    mine_all, all_wanted = torch.autograd.grad(found, narrow, grad), torch.autograd.grad(wanted, exact, grad.double())
    for mine, reference in zip(mine_all, all_wanted, strict=True):
        close(mine, reference, dtype)


def test_the_kernels_are_used(isa: str) -> None:
    x = torch.ones(1, 4, 2, 8)
    assert extension.ops().isa() == isa and attention.executor(x, x) == flash.NATIVE
    for other in (x.double(), x.half(), x.to("meta")):
        assert native.kernels(other) is None
    native.use_kernels("reference")
    assert native.kernels(x) is None and attention.executor(x, x) == flash.CPU


MASKS = {
    "causal": MaskSpec((0, 150)),
    "one token": MaskSpec((0, 1)),
    "documents at the edges of blocks": MaskSpec((0, 1, 63, 64, 65, 128, 150)),
    "window": MaskSpec((0, 150), window=20),
    "window in documents": MaskSpec((0, 70, 150), window=64),
    "both sides": MaskSpec((0, 40, 150), causal=False),
    "window to both sides": MaskSpec((0, 40, 150), window=17, causal=False),
    "shared prefix": MaskSpec((0, 50, 100, 150), prefix_of=(-1, 0, 0)),
}


@DTYPES
@pytest.mark.parametrize("name", MASKS)
def test_attention(isa: str, name: str, dtype: torch.dtype) -> None:
    spec, draw = MASKS[name], torch.manual_seed(1)
    tokens, (size, value) = spec.documents[-1], (20, 33) if "documents" in name else (48, 16)
    shapes = (1, tokens, 4, size), (1, tokens, 2, size), (1, tokens, 2, value), (4,)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    compare(lambda q, k, v, sinks: attention.packed_attention(q, k, v, spec, sinks), inputs, dtype)


@DTYPES
def test_attention_of_views_with_a_prefix_and_last_queries(isa: str, dtype: torch.dtype) -> None:
    draw = torch.manual_seed(2)
    shapes = (1, 37, 4, 24), (1, 90, 2, 2, 24), (5, 2, 24), (5, 2, 24)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]

    def last(q: Tensor, kv: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        k, v = kv.unbind(2)  # not contiguous
        return attention.causal_attention(q, k, v, None, None, (prefix_k, prefix_v))

    compare(last, inputs, dtype)


def test_blocks_merge_in_any_order_as_a_ring_needs_them(isa: str) -> None:
    torch.manual_seed(3)
    spec, ends = MaskSpec((0, 40, 130)), (0, 33, 97, 130)
    q, k, v = (torch.randn(1, 130, heads, 32) for heads in (4, 2, 2))
    whole = attention.packed_attention(*(x.double() for x in (q, k, v)), spec)
    partial = attention.Partial.empty(q, v)
    for begin, end in reversed(list(pairwise(ends))):
        tiles = plan_tiles((Span(0, 130),), (Span(begin, end),), spec)
        partial.add(q, k[:, begin:end], v[:, begin:end], tiles)
    close(partial.finish(None), whole, torch.float32)
    assert partial.lse.isfinite().all()


def test_a_query_that_sees_nothing_stays_empty_and_a_nan_goes_on(isa: str) -> None:
    q, k, v = (torch.randn(1, 80, 2, 16) for _ in range(3))
    tile = Tile(BAND, 0, 80, 0, 80, -30)  # the first 30 queries stand before every key
    partial = attention.Partial.empty(q, v)
    partial.add(q, k, v, (tile,))
    assert (partial.lse[:, :30] == -torch.inf).all() and not partial.out[:, :30].any()
    assert partial.lse[:, 30:].isfinite().all()
    sums = attention.Gradients.zeros(q, k, v)
    sums.add(attention.Queries(q, partial.out, partial.lse, torch.ones_like(q)), k, v, (tile,))
    assert all(x.isfinite().all() for x in (sums.q, sums.k, sums.v)) and not sums.q[:, :30].any()
    q[0, 40, 0, 3] = torch.nan
    out = attention.causal_attention(q, k, v)
    assert out[0, 40, 0].isnan().all() and out.isnan().sum() == 16


def test_tiles_outside_of_the_tensors_are_refused(isa: str) -> None:
    q = torch.randn(1, 8, 2, 16)
    partial = attention.Partial.empty(q, q)
    with pytest.raises(ValueError, match="outside"):
        partial.add(q, q, q, (Tile(FULL, 0, 8, 0, 9, 0),))


def test_results_do_not_depend_on_threads(isa: str) -> None:
    """Bit for bit forwards; sums of gradients are divided among threads."""
    torch.manual_seed(4)
    spec, found = MaskSpec((0, 100, 300)), []
    q, k, v = (torch.randn(1, 300, heads, 32).requires_grad_() for heads in (2, 1, 1))
    x, w = torch.randn(300, 200).requires_grad_(), torch.randn(170, 200).requires_grad_()
    gain = torch.randn(200).requires_grad_()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert extension.ops().num_threads() == threads
        out = attention.packed_attention(q, k, v, spec)
        norm = rms_norm(x, gain, 1e-6)
        made = native.matrix_product(x.detach(), w.detach().mT)
        grads = torch.autograd.grad(out.square().sum() + norm.square().sum(), (q, k, v, x, gain))
        found.append(((out, norm, made), grads))
    torch.set_num_threads(1)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        close(a, b.double(), torch.float32)


@DTYPES
@pytest.mark.parametrize("size", [1, 7, 24, 48, 130])
def test_operations_on_rows(isa: str, size: int, dtype: torch.dtype) -> None:
    draw = torch.manual_seed(size)
    x = torch.randn(3, 5, size, generator=draw, dtype=torch.float64)
    compare(lambda x, w: rms_norm(x, w, 1e-5), [x, torch.randn(size, generator=draw).double()], dtype)
    compare(swiglu, [4 * torch.randn(3, 5, 2 * size, generator=draw, dtype=torch.float64)], dtype)
    angles = torch.randn(3, 5, size, generator=draw)
    heads = torch.randn(3, 5, 2, 2 * size + 3, generator=draw, dtype=torch.float64)
    compare(lambda x: apply_rope(x, angles.cos(), angles.sin()), [heads], dtype)


def test_rows_of_nothing(isa: str) -> None:
    for x in (torch.empty(0, 8), torch.empty(2, 0, 8)):
        x.requires_grad_()
        weight = torch.ones(8, requires_grad=True)
        (rms_norm(x, weight, 1e-6).sum() + swiglu(x).sum()).backward()
        assert x.grad.shape == x.shape and not weight.grad.any()


@DTYPES
@pytest.mark.parametrize("vocab", [1, 17, 64, 1000])
def test_the_softmax_of_a_vocabulary(isa: str, vocab: int, dtype: torch.dtype) -> None:
    draw = torch.manual_seed(vocab)
    logits = (5 * torch.randn(9, vocab, generator=draw)).to(dtype)
    labels = torch.randint(vocab + 20, (9,), generator=draw)  # some stand in other pieces
    targets = Targets(labels, 10, 0.7)
    found = cross_entropy.statistics(logits, targets, moment=True, best=True)
    wanted = cross_entropy.statistics(logits.double(), targets, moment=True, best=True)
    for mine, reference in zip(found[:4], wanted[:4], strict=True):
        close(mine, reference, torch.float32)
    assert torch.equal(logits.gather(-1, found.best[:, None]), logits.amax(-1, keepdim=True))
    lse = wanted.top + wanted.total.log()
    upstream = [torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(3)]
    for given in (upstream[:1], upstream):
        exact = logits.double()
        reference = cross_entropy.logit_gradient_(exact, targets, Softmax(lse, lse / 2), Upstream(*given))
        softmax, narrow = Softmax(lse.float(), lse.float() / 2), Upstream(*(x.float() for x in given))
        close(cross_entropy.logit_gradient_(logits.clone(), targets, softmax, narrow), reference, dtype)
        wide = cross_entropy._gradient(logits.clone(), targets, softmax, narrow, torch.float32)
        close(wide, reference, torch.float32)


def test_products(isa: str) -> None:
    draw = torch.manual_seed(5)
    for m, k, n in ((1, 1, 1), (13, 300, 70), (12, 16, 32), (100, 1, 33), (241, 500, 530), (5, 0, 3)):
        a, b, start = (torch.randn(shape, generator=draw) for shape in ((m, k), (k, n), (m, n)))
        wanted = a.double() @ b.double()
        forms = (a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (a[:, ::1], b.repeat(1, 2)[:, :n])
        for left, right in forms:
            found = native.matrix_product(left, right)
            assert (found - wanted).abs().max() <= 2e-6 * max(1.0, k**0.5)
            again = native.matrix_product(left, right, start.clone(), add=True)
            assert (again - start - wanted).abs().max() <= 4e-6 * max(1.0, k**0.5)


def test_a_linear(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "takes", lambda *sizes: sizes[-1].dtype == torch.float32)
    draw = torch.manual_seed(6)
    shapes = (2, 9, 40), (50, 40), (50,)
    compare(product.dense, [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes], torch.float32)


def test_a_broken_kernel_is_noticed(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with keys that are one place off, or a factor of 1.001, the comparison fails."""
    described = native._described
    monkeypatch.setattr(native, "_described", lambda tiles: described(tiles) - torch.tensor([0, 0, 0, 0, 1, 0, 0]))
    with pytest.raises(AssertionError):
        test_attention(isa, "window", torch.float32)
    monkeypatch.setattr(native, "swiglu_forward", lambda x, swiglu=native.swiglu_forward: swiglu(x) * 1.001)
    with pytest.raises(AssertionError):
        test_operations_on_rows(isa, 24, torch.float32)


def test_the_environment_variable_names_the_kernels() -> None:
    command = [sys.executable, "-c", "import megallm._ops as ops; print(ops.isa())"]
    for name in ("portable", "reference"):
        done = subprocess.run(
            command, env={**os.environ, "MEGALLM_OPS_ISA": name}, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == name, done.stderr


def test_kernels_that_are_not_there_are_an_error() -> None:
    with pytest.raises(UsageError, match="auto, native, reference"):
        native.use_kernels("sse9")


def test_a_strided_gradient_of_a_norm_is_kept_while_it_is_read(isa: str) -> None:
    """Its dense copy was freed before the kernel read it: the allocator had written into it by then."""
    for _ in range(20):
        x, weight = torch.randn(9, 33, dtype=torch.float64), torch.rand(33, dtype=torch.float64)
        compare(lambda x, w: rms_norm(x, w, 1e-6).mT, [x, weight], torch.float32)


@pytest.mark.parametrize(("size", "finite"), [(1e10, True), (1e18, True), (3e19, False)])
def test_large_scores_overflow_where_a_sum_of_float32_does(isa: str, size: float, finite: bool) -> None:
    """torch's attention on CPUs gives gradients of NaN long before (tests/system/test_diverged.py)."""
    q, k, v = (torch.randn(1, 70, 2, 8) for _ in range(3))
    inputs = [(q * size).requires_grad_(), (k * size).requires_grad_(), v.requires_grad_()]
    out = attention.causal_attention(*inputs)
    numbers = [out, *torch.autograd.grad(out.sum(), inputs)]
    assert all(x.isfinite().all() == finite for x in numbers)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(isa: str, which: int, number: float) -> None:
    """The same elements as in float64 are not finite, over several tiles of keys."""
    inputs = [torch.randn(1, 600, 2, 8) for _ in range(3)]
    inputs[which][0, 5, 0, 0] = number
    found = attention.causal_attention(*inputs)
    wanted = attention.causal_attention(*(x.double() for x in inputs))
    assert not wanted.isfinite().all() and torch.equal(found.isfinite(), wanted.isfinite())
