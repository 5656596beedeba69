"""ops.attention and ops.tiles: tiles hold each visible pair once; merged blocks equal plain attention."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megallm.base.errors import DataError
from megallm.ops import attention
from megallm.ops.attention import Gradients, Partial, Queries, causal_attention, packed_attention, visible
from megallm.ops.cached_attention import attend_rows, length_bias
from megallm.ops.tiles import CAUSAL, FULL, NEAR, MaskSpec, Span, Tile, plan_tiles, row_mask_spec

ATOL = 1e-12


def dense_mask(mask_spec: MaskSpec) -> Tensor:
    """Bool [T, T] written from the definition."""
    length = mask_spec.documents[-1]
    document = torch.zeros(length, dtype=torch.long)
    for end in mask_spec.documents[1:-1]:
        document[end:] += 1
    gap = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = ((gap >= 0) | (not mask_spec.causal)) & (document[:, None] == document[None])
    near = gap if mask_spec.causal else gap.abs()
    return seen if mask_spec.window is None else seen & (near < mask_spec.window)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float | None = None) -> Tensor:
    """Softmax attention over `[B, T, H, E]` by the textbook."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihe,bjhe->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def random_sight(draw: random.Random, length: int) -> MaskSpec:
    ends = sorted(draw.sample(range(1, length), draw.randint(0, min(5, length - 1))))
    window = draw.choice([None, None, 1, 2, 7, length // 2 + 1, 3 * length])
    return MaskSpec((0, *ends, length), window, causal=draw.random() < 0.5)


def tensors(length: int, heads: int, kv_heads: int, size: int = 6, value_size: int = 6, dtype=torch.float64):
    make = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, size), (2, length, kv_heads, size), (2, length, kv_heads, value_size))
    return [torch.randn(s, generator=make, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(torch.autograd.grad(out, leaves, direction.to(out.dtype)))


# Tiles


def covered(tiles: tuple[Tile, ...], rows: int, keys: int) -> Tensor:
    """How often each pair is computed, and seen, by the tiles."""
    count = torch.zeros(rows, keys, dtype=torch.long)
    for tile in tiles:
        block = count[tile.q_begin : tile.q_end, tile.k_begin : tile.k_end]
        i = torch.arange(block.shape[0])[:, None] + tile.shift
        seen = (
            torch.ones(block.shape, dtype=torch.bool)
            if tile.kind == FULL
            else (i - torch.arange(block.shape[1])).abs() < tile.window
            if tile.kind == NEAR
            else visible(i[:, 0], torch.arange(block.shape[1]), tile.window)
        )
        assert seen.any(1).all(), f"a query of {tile} sees nothing"
        block += seen
    return count


@pytest.mark.parametrize("seed", range(40))
def test_tiles_hold_each_visible_pair_once(seed: int) -> None:
    draw = random.Random(seed)
    length = draw.randint(2, 300)
    mask_spec = random_sight(draw, length)
    cuts = sorted({0, length, *draw.choices(range(length), k=draw.randint(0, 4))})
    runs = [Span(a, b) for a, b in pairwise(cuts)]
    draw.shuffle(runs)
    stored, at = [], 0
    for run in runs:
        stored.append(Span(run.begin, run.end, at))
        at += run.end - run.begin
    order = [token for span in stored for token in range(span.begin, span.end)]
    mask = dense_mask(mask_spec)
    queries, keys = tuple(stored), (Span(0, length),)
    assert torch.equal(covered(plan_tiles(queries, keys, mask_spec), length, length), mask[order].long())
    assert torch.equal(covered(plan_tiles(keys, queries, mask_spec), length, length), mask[:, order].long())
    assert torch.equal(covered(plan_tiles(queries, queries, mask_spec), length, length), mask[order][:, order].long())


def test_full_sight_is_one_rectangle_for_each_document_and_padding_is_one() -> None:
    row = (Span(0, 12),)
    tiles = plan_tiles(row, row, row_mask_spec(12, [0, 5, 9, 12], None, causal=False))  # three places of padding
    assert [(t.kind, t.q_begin, t.q_end, t.k_begin, t.k_end) for t in tiles] == [
        (FULL, 0, 5, 0, 5), (FULL, 5, 9, 5, 9), (FULL, 9, 12, 9, 12),
    ]  # fmt: skip
    halves = plan_tiles((Span(0, 4),), (Span(4, 12),), MaskSpec((0, 12), causal=False))
    assert [(t.q_begin, t.q_end, t.k_begin, t.k_end) for t in halves] == [(0, 4, 0, 8)]


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_a_row_that_sees_itself_whole(kv_heads: int) -> None:
    q, k, v = tensors(33, 6, kv_heads)
    mask_spec = MaskSpec((0, 33), causal=False)
    want, got = plain_attention(q, k, v, dense_mask(mask_spec)), packed_attention(q, k, v, mask_spec)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ATOL)
    causal = packed_attention(q, k, v, MaskSpec((0, 33)))
    assert (causal - want).abs().max() > 0.1


def test_masked_tiles_are_not_computed() -> None:
    row = (Span(0, 4096),)
    whole = sum(tile.work for tile in plan_tiles(row, row, MaskSpec((0, 4096))))
    packed = sum(tile.work for tile in plan_tiles(row, row, MaskSpec(tuple(range(0, 4097, 256)))))
    windowed = sum(tile.work for tile in plan_tiles(row, row, MaskSpec((0, 4096), 128)))
    assert whole == 4096 * 4097 // 2
    assert packed == 16 * 256 * 257 // 2
    assert windowed < 4096 * 128 * 2
    later = (Span(8, 16),)
    assert plan_tiles((Span(0, 8),), later, MaskSpec((0, 16))) == ()
    assert plan_tiles(later, (Span(0, 8),), MaskSpec((0, 8, 16))) == ()
    assert [tile.kind for tile in plan_tiles(later, (Span(0, 8),), MaskSpec((0, 16)))] == [FULL]


@pytest.mark.parametrize("ends", [[0, 3, 9], [1, 8], [0, 5, 4, 8], [8], []])
def test_documents_that_do_not_divide_the_row_are_refused(ends: list[int]) -> None:
    with pytest.raises(DataError, match="must rise from 0 to 8"):
        row_mask_spec(8, ends, None)
    assert row_mask_spec(8, [0, 3, 3, 8], None) == MaskSpec((0, 3, 8))


# Attention of one rank


def test_documents_of_many_lengths_reach_the_kernel_in_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of bf16 do; here in float64, where the zeros behind a document can be seen to change nothing."""
    monkeypatch.setattr(attention, "_LENGTHS", {torch.float64: 16})
    lengths: dict[str, set[int]] = {"_FLASH": set(), "_FLASH_BACKWARD": set()}
    for name, met in lengths.items():
        kernel = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *x, k=kernel, m=met, **y: m.add(x[1].shape[2]) or k(*x, **y))
    mask_spec = MaskSpec((0, 1, 6, 16, 47, 80, 90))
    q, k, v = tensors(90, 6, 2, value_size=4)
    want, got = plain_attention(q, k, v, dense_mask(mask_spec)), packed_attention(q, k, v, mask_spec)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ATOL)
    assert lengths == {"_FLASH": {16, 32, 48}, "_FLASH_BACKWARD": {16, 32, 48}}


@pytest.mark.parametrize("path", ["flash", "written out"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("seed", range(3))
def test_packed_attention_equals_plain(seed: int, kv_heads: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "written out":
        monkeypatch.setattr(attention, "_flash_fits", lambda *_: False)
    draw = random.Random(seed)
    mask_spec = random_sight(draw, 90)
    q, k, v = tensors(90, 6, kv_heads)
    want, got = plain_attention(q, k, v, dense_mask(mask_spec)), packed_attention(q, k, v, mask_spec)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("value_size", [10, 4])
def test_values_of_another_size_than_keys(value_size: int) -> None:
    q, k, v = tensors(40, 4, 2, size=6, value_size=value_size)
    row = plain_attention(q, k, v, dense_mask(MaskSpec((0, 40))))
    torch.testing.assert_close(causal_attention(q, k, v), row, rtol=0, atol=ATOL)
    mask_spec = MaskSpec((0, 13, 40))
    want, got = plain_attention(q, k, v, dense_mask(mask_spec)), packed_attention(q, k, v, mask_spec)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("queries", [1, 4, 20])
def test_causal_attention_of_the_last_queries(queries: int, window: int | None) -> None:
    q, k, v = tensors(20, 6, 2)
    want = plain_attention(q, k, v, dense_mask(MaskSpec((0, 20), window)))[:, -queries:]
    got = causal_attention(q[:, -queries:], k, v, window)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("path", ["flash", "written out"])
def test_narrow_types_stay_within_their_precision(
    path: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "written out":
        monkeypatch.setattr(attention, "_flash_fits", lambda *_: False)
    mask_spec = MaskSpec((0, 21, 64), 17)
    q, k, v = tensors(64, 4, 2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, got = plain_attention(*exact, dense_mask(mask_spec)), packed_attention(q, k, v, mask_spec)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(gradients(got, [q, k, v]), gradients(want, exact), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=4 * tolerance)


def sunk_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor) -> Tensor:
    """Attention sinks by the textbook: a column of scores before the softmax, dropped after it."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihe,bjhe->bhij", q, k) * q.shape[-1] ** -0.5
    column = sinks[:, None, None].expand(q.shape[0], -1, scores.shape[2], 1)
    weights = torch.cat((scores.masked_fill(~seen, -torch.inf), column), -1).softmax(-1)[..., :-1]
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.parametrize("path", ["flash", "written out"])
@pytest.mark.parametrize("mask_spec", [MaskSpec((0, 40)), MaskSpec((0, 9, 40), 7)])
def test_sinks_equal_a_column_of_scores(mask_spec: MaskSpec, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "written out":
        monkeypatch.setattr(attention, "_flash_fits", lambda *_: False)
    q, k, v = tensors(40, 4, 2, value_size=5)
    sinks = torch.tensor([-3.0, 0.0, 1.5, 4.0], dtype=torch.float64, requires_grad=True)
    want = sunk_attention(q, k, v, dense_mask(mask_spec), sinks)
    got = packed_attention(q, k, v, mask_spec, sinks)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, [q, k, v, sinks]), gradients(want, [q, k, v, sinks]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ATOL)
    assert (packed_attention(q, k, v, mask_spec) - want).abs().max() > 0.1


def test_sinks_equal_those_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = (x.detach() for x in tensors(20, 6, 2))
    layer = SimpleNamespace(sinks=torch.linspace(-1, 2, 6).double(), num_key_value_groups=3, training=False)
    mask = torch.full((20, 20), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    theirs, _ = module.eager_attention_forward(layer, *(x.transpose(1, 2) for x in (q, k, v)), mask, 6**-0.5)
    torch.testing.assert_close(causal_attention(q, k, v, None, layer.sinks), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 4, 20])
def test_sinks_of_the_last_queries(queries: int, window: int | None) -> None:
    q, k, v = tensors(20, 6, 2)
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64)
    want = sunk_attention(q, k, v, dense_mask(MaskSpec((0, 20), window)), sinks)[:, -queries:]
    torch.testing.assert_close(causal_attention(q[:, -queries:], k, v, window, sinks), want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_rows_of_a_cache_see_their_own_lengths(with_sinks: bool, window: int | None) -> None:
    q, k, v = (x.detach() for x in tensors(20, 6, 2, value_size=4))
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64) if with_sinks else None
    lengths = torch.tensor([20, 7])
    bias = length_bias(lengths, 20, window, q.dtype)
    got = attend_rows(torch.stack([q[0, 19:20], q[1, 6:7]]), k, v, bias, sinks)
    for row, length in enumerate(lengths.tolist()):
        part = [x[row : row + 1, :length] for x in (q, k, v)]
        seen = dense_mask(MaskSpec((0, length), window))
        want = sunk_attention(*part, seen, sinks) if with_sinks else plain_attention(*part, seen)
        torch.testing.assert_close(got[row], want[0, -1:], rtol=0, atol=ATOL)


# Negative controls: the comparison sees what is left out


def test_a_block_ignored_in_the_merge_is_seen() -> None:
    q, k, v = (x.detach() for x in tensors(32, 4, 2))
    row = (Span(16, 32),)
    full = MaskSpec((0, 32))
    tiles = plan_tiles(row, (Span(0, 32),), full)
    assert [tile.kind for tile in tiles] == [FULL, CAUSAL]
    want = plain_attention(q, k, v, dense_mask(full))[:, 16:]
    for order in (tiles, tiles[::-1]):
        partial = Partial.empty(q[:, 16:], v)
        partial.add(q[:, 16:], k, v, order)
        torch.testing.assert_close(partial.out, want, rtol=0, atol=ATOL)
    lost = Partial.empty(q[:, 16:], v)
    lost.add(q[:, 16:], k, v, tiles[1:])
    assert (lost.out - want).abs().max() > 0.1


def test_gradients_need_the_log_sum_exp_of_the_whole() -> None:
    q, k, v = tensors(32, 4, 2)
    row, mask_spec = (Span(0, 32),), MaskSpec((0, 32))
    out = plain_attention(q, k, v, dense_mask(mask_spec))
    want = gradients(out, [q, k, v])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    partial = Partial.empty(q, v)
    with torch.no_grad():
        partial.add(q, k, v, plan_tiles(row, row, mask_spec))
        for shift, equal in ((0.0, True), (0.1, False)):
            grads = Gradients.zeros(q, k, v)
            grads.add(Queries(q, partial.out, partial.lse + shift, grad), k, v, plan_tiles(row, row, mask_spec))
            errors = [(a - b).abs().max() for a, b in zip((grads.q, grads.k, grads.v), want, strict=True)]
            assert (max(errors) < ATOL) == equal


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_a_soft_cap_bends_scores_and_their_gradients(window, causal):
    """Packed documents against the textbook, a prefix that all see, and cached keys; without the cap it is another."""
    q, k, v = tensors(21, 4, 2)
    mask_spec, cap = MaskSpec((0, 9, 21), window, causal, 0.8), 0.8
    leaves, dense = [q, k, v], dense_mask(mask_spec)
    want, got = plain_attention(q, k, v, dense, cap), packed_attention(q, k, v, mask_spec)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=10 * ATOL)
    assert (plain_attention(q, k, v, dense) - want).abs().max() > 1e-2
    keys, values = (x[0, :3].detach().requires_grad_() for x in (k, v))
    whole = [torch.cat((p.expand(2, -1, -1, -1), x), 1) for p, x in ((keys, k), (values, v))]
    seen = torch.cat((torch.ones(21, 3, dtype=torch.bool), dense), 1)
    want, got = plain_attention(q, *whole, seen, cap), packed_attention(q, k, v, mask_spec, None, (keys, values))
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    leaves = [q, k, v, keys, values]
    for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=10 * ATOL)


def test_a_soft_cap_of_one_new_token_a_row():
    q, k, v = tensors(20, 4, 2)
    bias = length_bias(torch.tensor([20, 7]), 20, 5, torch.float64)
    for row, length in enumerate((20, 7)):
        mask_spec = MaskSpec((0, length), 5, True, 0.8)
        want = packed_attention(*(x[row : row + 1, :length] for x in (q, k, v)), mask_spec)
        new = torch.stack([q[0, 19:20], q[1, 6:7]])
        got = attend_rows(new, k, v, bias, None, 0.8)
        torch.testing.assert_close(got[row, 0], want[0, -1], rtol=0, atol=ATOL)
        assert (attend_rows(new, k, v, bias) - got).abs().max() > 1e-3
