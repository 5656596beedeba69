"""The CUDA kernels, emulated on a CPU: values and gradients beside the same operation in float64, at odd sizes, of no
rows, at addresses that are no multiple of 16 bytes. A race, a stray address, bits that depend on the order of threads
end a test: see `test_emulation.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megallm.ops import fp8
from megallm.ops.activation import swiglu
from megallm.ops.adam import AdamRule, FlatState, adamw_, adamw_lists_
from megallm.ops.cached_attention import Paged, attend_pages
from megallm.ops.cross_entropy import Softmax, Targets, Upstream, _gradient, soft_cap, statistics
from megallm.ops.kernels import KERNELS
from megallm.ops.moe_permute import combine, order_of, permute
from megallm.ops.nf4 import MatrixRange, Nf4
from megallm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megallm.ops.rope import apply_rope, norm_rope, rope_tables
from tests.ops.emulated import TOLERANCES, emulated, error, placed

EPS = 1e-5
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
F32 = torch.float32


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def check(function, inputs, dtypes, operations, offset=0, tolerance=None):
    worst, names = error(function, inputs, dtypes, offset)
    assert worst <= (tolerance or TOLERANCES[dtypes[0]]), worst
    assert set(operations) <= set(names), "no kernel was taken"


# Short rows take a warp each, long ones a block; the longest do not fit into its registers.
@DTYPES
@pytest.mark.parametrize(
    ("rows", "width", "offset"), [(5, 64, 0), (3, 33, 0), (2, 7, 0), (0, 8, 0), (3, 16, 1), (2, 1160, 0)]
)
def test_norms(rows, width, offset, dtype):
    x, residual, weight, bias = normal(rows, width), normal(rows, width) + 1, normal(width) + 1, normal(width)
    both = ["norm", "norm_backward"]
    for narrow in {dtype, F32}:  # of the weight
        check(lambda x, w: rms_norm(x, w, EPS), [x, weight], [dtype, narrow], both, offset)
        check(lambda x, w, b: layer_norm(x, w, b, EPS), [x, weight, bias], [dtype, narrow, narrow], both, offset)
    check(lambda x, r, w: add_rms_norm(x, r, w, EPS), [x, residual, weight], [dtype] * 3, both, offset)
    check(lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), [x, residual, weight, bias], [dtype] * 4, both, offset)


def test_norms_of_rows_that_no_block_keeps():
    x, weight = normal(2, 4100), normal(4100)  # one element a pack: the address is odd
    check(lambda x, w: rms_norm(x, w, EPS), [x, weight], [F32] * 2, ["norm_backward"], offset=1)
    check(lambda x, w: layer_norm(x, w, None, EPS), [x, weight], [F32] * 2, ["norm_backward"], offset=1)


# B, T, H, E, R: all features are rotated, some, an odd number of pairs.
@DTYPES
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 16, 16), (1, 5, 3, 32, 16), (2, 1, 1, 10, 6), (1, 0, 2, 8, 8), (1, 2, 3, 256, 128)], ids=str
)
def test_rope(shape, offset, dtype):
    *sizes, rotated = shape
    x, weight = normal(*sizes), normal(sizes[-1]) + 1
    tables = rope_tables(torch.arange(sizes[1])[None], rotated, 100.0, torch.float64)

    def rotate(x: Tensor) -> Tensor:
        return apply_rope(x, *(table.to(torch.promote_types(x.dtype, F32)) for table in tables))

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return norm_rope(x, weight, EPS, *(table.to(torch.promote_types(x.dtype, F32)) for table in tables))

    check(rotate, [x], [dtype], ["rope"], offset)
    check(normed, [x, weight], [dtype, F32], ["rope", "norm_rope_backward"], offset)
    # Heads of a matrix that holds more than them, and a batch with tables of its own.
    wider = normal(*sizes[:-2], 2 * sizes[-2], sizes[-1])
    check(lambda x: rotate(x[:, :, : sizes[-2]]), [wider], [dtype], ["rope"], offset)
    tables = [table.expand(sizes[0], -1, -1).contiguous() for table in tables]
    check(normed, [x, weight], [dtype, dtype], ["norm_rope_backward"], offset)


@DTYPES
@pytest.mark.parametrize(("shape", "offset"), [((3, 32), 0), ((2, 2, 10), 0), ((3, 32), 1), ((0, 8), 0), ((70, 64), 0)])
def test_swiglu(shape, offset, dtype):
    check(swiglu, [3 * normal(*shape)], [dtype], ["swiglu"], offset)
    big = torch.tensor([[-120.0, 120.0, -3e4, 1.0, 2.0, 3.0]]).double()
    check(swiglu, [big], [dtype], ["swiglu"])


def updated(sizes, dtype, rule, native, narrow=None, clip=None, skip=0.0, offset=0, steps=3):
    """Parameters, moments and copies after some steps."""
    kind = F32 if native else torch.float64
    states = []
    for n in sizes:
        parts = normal(n).to(kind), torch.empty(n, dtype=dtype), torch.zeros(n, dtype=kind), torch.zeros(n, dtype=kind)
        states.append(FlatState(*(placed(part, offset) for part in parts)))
    copies = [] if narrow is None else [placed(state.param.to(narrow), offset) for state in states]
    if not native:
        states = [state._replace(grad=state.grad.double()) for state in states]
    scalar = torch.tensor
    for step in range(steps):
        for i, state in enumerate(states):
            state.grad.copy_((normal(len(state.grad) + step + i)[: len(state.grad)] * 3).to(dtype))
        clock = scalar(float(step)), scalar(skip)
        if native:
            with emulated():
                adamw_lists_(states, rule, *clock, None if clip is None else scalar(clip), copies)
        else:
            adamw_lists_(states, rule, *clock, None if clip is None else scalar(clip, dtype=kind), copies)
    return [x.double() for s in states for x in (s.param, s.exp_avg, s.exp_avg_sq)], [x.double() for x in copies]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("grads", [F32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
def test_adamw(narrow, grads, offset):
    sizes = [64, 1, 0, 37]
    for decoupled in (True, False):
        rule = AdamRule(0.1, (0.9, 0.95), 1e-8, 0.1, decoupled)
        ours, copies = updated(sizes, grads, rule, True, narrow, 0.25, offset=offset)
        theirs, wanted = updated(sizes, grads, rule, False, narrow, 0.25, offset=offset)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-7)
        for one, other in zip(copies, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=8e-3, atol=1e-4)


def test_adamw_of_more_tensors_than_one_launch_takes_without_momentum():
    rule, sizes = AdamRule(0.1, (0.0, 0.999), 1e-8, 0.0), [3 + i % 5 for i in range(30)]
    for one, other in zip(updated(sizes, F32, rule, True)[0], updated(sizes, F32, rule, False)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-7)


def test_adamw_of_a_long_tensor_takes_several_blocks():
    rule = AdamRule(0.1, (0.9, 0.95), 1e-8, 0.1)
    for one, other in zip(
        updated([8200], F32, rule, True, steps=1)[0], updated([8200], F32, rule, False, steps=1)[0], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-7)


def test_a_skipped_update_changes_nothing():
    state = FlatState(torch.ones(5), torch.full((5,), torch.inf), torch.zeros(5), torch.zeros(5))
    with emulated():
        adamw_(state, AdamRule(0.1, (0.9, 0.95), 1e-8, 0.1), torch.tensor(0.0), torch.tensor(1.0))
    assert state.param.eq(1).all() and not state.exp_avg.any() and not state.exp_avg_sq.any()


def softmaxed(logits: Tensor, labels: Tensor, begin: int, temperature: float, cap: float | None) -> tuple[Tensor, ...]:
    """Log-prob, label's logit and entropy, by torch, of a vocabulary that is there as a whole."""
    z = soft_cap(logits, cap) / temperature
    here = (labels >= begin) & (labels < begin + z.shape[1])
    local = torch.where(here, labels - begin, 0)
    logit = z.gather(1, local[:, None])[:, 0] * here
    lse = z.logsumexp(1)
    return lse, logit, -(z.softmax(1) * z.log_softmax(1)).nan_to_num().sum(1)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "vocab", "offset"), [(3, 64, 0), (4, 37, 0), (2, 1, 0), (0, 8, 0), (3, 40, 1), (2, 4200, 3)]
)
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.7, 5.0)])
def test_cross_entropy(tokens, vocab, offset, temperature, cap, dtype):
    begin, labels = 5, torch.randint(0, vocab + 10, (tokens,), generator=torch.Generator().manual_seed(0))
    logits = placed((4 * normal(tokens, vocab)).to(dtype), offset)
    exact = logits.double().requires_grad_()
    lse, logit, entropy = softmaxed(exact, labels, begin, temperature, cap)
    with emulated():
        found = statistics(logits, Targets(labels, begin, temperature, cap), moment=True)
        plain = statistics(logits, Targets(labels, begin, temperature, cap))
    assert plain.moment is None and torch.equal(plain.top, found.top) and torch.equal(plain.total, found.total)
    torch.testing.assert_close(found.top.double() + found.total.double().log(), lse, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.label.double(), logit, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close((found.total.log() - found.moment / found.total).double(), entropy, rtol=1e-5, atol=1e-5)
    up = [normal(tokens, n + 1)[:, n].float() for n in range(3)]
    here = (labels >= begin) & (labels < begin + vocab)
    target = (up[0] * (logit * here - lse) + up[1] * entropy + up[2] * logit).sum()
    (wanted,) = torch.autograd.grad(target, exact)
    softmax = Softmax(lse.detach().float(), entropy.detach().float())
    for kind in {F32, dtype}:
        given = logits.clone() if offset == 0 else placed(logits, offset)
        with emulated():
            made = _gradient(given, Targets(labels, begin, temperature, cap), softmax, Upstream(*up), kind)
        assert made.dtype == kind
        if tokens:
            assert (made.data_ptr() == given.data_ptr()) == (kind == dtype)
            worst = (made.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            assert worst <= max(1e-5, TOLERANCES[kind]), worst


def test_logits_of_minus_infinity_have_no_share():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf, 0.5]])
    with emulated():
        found = statistics(logits, Targets(torch.tensor([2])), moment=True)
    assert torch.isfinite(found.total).all() and torch.isfinite(found.moment).all()
    torch.testing.assert_close(found.top + found.total.log(), logits.logsumexp(1))


@DTYPES
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("tokens", "copies", "width", "dropped"), [(5, 2, 32, 0), (4, 3, 9, 3), (3, 1, 8, 0), (0, 2, 8, 0)]
)
def test_moe_permute(tokens, copies, width, dropped, offset, dtype):
    draw = torch.Generator().manual_seed(2)
    experts = torch.randint(0, 4, (tokens, copies), generator=draw)
    keep = torch.ones(tokens, copies, dtype=torch.bool)
    keep.view(-1)[:dropped] = False
    order = order_of(experts, 4, keep)[0][: tokens * copies - dropped]
    x, weights = normal(tokens, width), normal(tokens, copies)
    check(lambda x: permute(x, order, copies), [x], [dtype], ["moe_gather", "moe_sum"], offset)

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        return combine(permute(x, order, copies), order, weights)

    check(there_and_back, [x, weights], [dtype, F32], ["moe_gather", "moe_sum", "moe_dot"], offset)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scaled", ["tensor", "row", "block", "square"])
@DTYPES
def test_fp8(dtype, scaled, form):
    """The bits of the reference, also of the transpose."""
    large = (130, 140) if scaled in ("block", "square") else (9, 140)
    shapes = (
        ((3, 128), 0, True, 0),
        (large, 0, False, 1),
        ((5, 33), 1, True, 0),
        ((0, 8), 0, False, 0),
        ((2, 0), 0, True, 0),
    )
    for shape, offset, powers, margin in shapes:
        x = placed((normal(*shape) * 10 ** (2 * normal(*shape))).to(dtype), offset)
        if x.numel() > 20:
            x[1] = 0
            x[0, 1] = -0.0
        transposed = scaled in ("tensor", "square")
        scaling = fp8.Quantisation(form, scaled, margin, powers)
        wanted, back = fp8.quantised(x, scaling, transposed)
        with emulated():
            found, turned = fp8.quantised(x, scaling, transposed)
        for one, other in ((found, wanted), (turned, back)):
            if one is None:
                assert other is None
                continue
            assert torch.equal(one.inverse, other.inverse.view_as(one.inverse))
            assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))


def test_fp8_of_what_is_not_finite():
    for values in ([1.0, torch.nan, -2.0], [torch.inf, 1.0, -3.0], [0.0, 0.0, -0.0], [1e-30, 2e-38, 0.0]):
        x = torch.tensor([values])
        for scaled in fp8.BLOCK_ROWS | {"tensor": 0}:
            wanted, _ = fp8.quantised(x, fp8.Quantisation("e4m3", scaled))
            with emulated():
                found, _ = fp8.quantised(x, fp8.Quantisation("e4m3", scaled))
                assert torch.equal(fp8.amax_of(x, "tensor"), x.abs().amax()) or x.isnan().any()
            assert torch.equal(found.inverse, wanted.inverse)
            assert torch.equal(found.data.float(), wanted.data.float()) or x.isnan().any()


def test_every_fp8_rounds_as_torch_does():
    """Every third bfloat16 that a format can hold."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for form, largest in fp8.LARGEST.items():
        x = bits[bits.abs() <= largest][None, ::3].contiguous()
        with emulated():
            found = fp8.quantise(x, form, torch.ones(()))
        assert torch.equal(found.data.view(torch.uint8), x.to(fp8.FORMATS[form]).view(torch.uint8))


@DTYPES
def test_nf4(dtype):
    """The bits of the reference, of a whole matrix and of pieces of it."""
    matrix = normal(6, 192).float()
    for rows, columns in (
        ((0, 6), (0, 192)),
        ((2, 5), (0, 192)),
        ((1, 4), (64, 128)),
        ((0, 6), (128, 192)),
        ((3, 3), (0, 192)),
    ):
        piece = MatrixRange(rows, columns, (6, 192))
        stored = Nf4.of(matrix, piece)
        with emulated():
            found = stored.dequantize(dtype)
        assert torch.equal(found, stored.dequantize(dtype))
    odd = Nf4.of(normal(5, 13).float(), MatrixRange((0, 5), (0, 13), (5, 13)))  # ends within a block
    with emulated():
        found = odd.dequantize(dtype)
    assert torch.equal(found, odd.dequantize(dtype))


# n, H, K, E and blocks of a row; the last takes single elements, 6 heads share keys.
@DTYPES
@pytest.mark.parametrize(
    ("shape", "offset"),
    [((2, 4, 2, 16, 3), 0), ((1, 6, 1, 64, 2), 0), ((3, 2, 2, 24, 2), 0), ((2, 4, 2, 16, 2), 1), ((0, 2, 2, 8, 1), 0)],
)
def test_paged_attention(shape, offset, dtype):
    rows, heads, kv_heads, size, blocks = shape
    draw = torch.Generator().manual_seed(3)
    table = torch.randperm(rows * blocks + 2, generator=draw)[: rows * blocks].view(rows, blocks)
    lengths = torch.tensor([1, 16 * blocks, 19][:rows], dtype=torch.int64).clamp(max=16 * blocks)
    q, sinks = normal(rows, heads, size), normal(heads)
    pools = [
        normal(kv_heads, 16 * (rows * blocks + 2), size),
        2 * normal(kv_heads, 16 * (rows * blocks + 2), size + 1)[..., :size],
    ]
    for window, cap, sink in ((None, None, None), (5, None, None), (None, 2.0, sinks), (1, None, sinks)):
        given = [placed(x.to(dtype), offset) for x in (q, *pools)]
        exact = [x.double() for x in given]
        with emulated():
            score = None if sink is None else sink.float()
            found = attend_pages(given[0], Paged(*given[1:], table, lengths), window, score, cap)
        if not rows:
            assert found.shape == q.shape
            continue
        wanted = attend_pages(exact[0], Paged(*exact[1:], table, lengths), window, sink, cap)
        assert (found.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


def test_long_texts_are_split(monkeypatch):
    monkeypatch.setattr("megallm.ops.cached_attention.SPLIT", 16)
    table, lengths = torch.arange(8).view(2, 4), torch.tensor([61, 2])
    q, pools = normal(2, 2, 16).float(), [normal(1, 128, 16).float(), normal(1, 128, 17)[..., :16].float()]
    with emulated():
        found = attend_pages(q, Paged(*(x.contiguous() for x in pools), table, lengths))
    wanted = attend_pages(q.double(), Paged(*(x.double() for x in pools), table, lengths))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    from tests.ops.emulated import library

    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="norm: weight and bias have an element for each of a row"):
        library().norm(x, None, torch.ones(7), None, EPS, x.clone(), None, None, torch.ones(2))
    with pytest.raises(RuntimeError, match="swiglu: a tensor is not contiguous"):
        library().swiglu(torch.ones(8, 2).t(), None, torch.ones(2, 4))


def test_float64_is_left_to_torch():
    with emulated():
        assert KERNELS.of(torch.ones(1, dtype=torch.float64)) is None
        assert KERNELS.of(torch.ones(1)) is not None
