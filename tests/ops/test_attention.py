"""ops.attention and ops.tiles: tiles hold each visible pair once; merged blocks equal plain attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.base.errors import DataError
from megallm.ops import attention, flash
from megallm.ops.attention import Gradients, Partial, Queries, causal_attention, packed_attention, visible
from megallm.ops.cached_attention import attend_rows, length_bias
from megallm.ops.tiles import CAUSAL, FULL, NEAR, MaskSpec, Span, Tile, pieces_of, plan_tiles, row_mask_spec, runs_of
from tests.ops import flash_of_gpus

ATOL = 1e-12


def dense_mask(mask_spec: MaskSpec) -> Tensor:
    """Bool [T, T] written from the definition."""
    length = mask_spec.documents[-1]
    document = torch.zeros(length, dtype=torch.long)
    for end in mask_spec.documents[1:-1]:
        document[end:] += 1
    place, own = torch.arange(length), document[:, None] == document[None]
    if mask_spec.prefix_of:
        before = torch.tensor(mask_spec.prefix_of)
        sizes, starts = document.bincount(), torch.tensor(mask_spec.documents[:-1])
        for number, parent in enumerate(mask_spec.prefix_of):
            while parent >= 0:
                own |= (document == number)[:, None] & (document == parent)[None]
                parent = mask_spec.prefix_of[parent]
        first = torch.zeros(len(before), dtype=torch.long)  # position of each document's first token
        for number, parent in enumerate(mask_spec.prefix_of):
            first[number] = first[parent] + sizes[parent] if parent >= 0 else 0
        place = place - starts[document] + first[document]
    gap = place[:, None] - place[None]
    seen = ((gap >= 0) | (not mask_spec.causal)) & own
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


def random_groups(draw: random.Random, length: int) -> MaskSpec:
    """Documents of which some share a prefix, down to prefixes of prefixes."""
    ends = sorted(draw.sample(range(1, length), draw.randint(1, min(9, length - 1))))
    before: list[int] = []
    for number in range(len(ends) + 1):
        chain = [-1]  # what may stand before it: the document just before, and what stands before that
        at = number - 1
        while at >= 0:
            chain.append(at)
            at = before[at]
        before.append(draw.choice(chain))
    window = draw.choice([None, None, 1, 2, 7, length // 2 + 1, 3 * length])
    return row_mask_spec(length, [0, *ends, length], window, prefix_of=before)


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


@pytest.mark.parametrize("made", [random_sight, random_groups])
@pytest.mark.parametrize("seed", range(40))
def test_tiles_hold_each_visible_pair_once(seed: int, made: Callable[..., MaskSpec]) -> None:
    draw = random.Random(seed)
    length = draw.randint(2, 300)
    mask_spec = made(draw, length)
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


def test_a_group_is_one_rectangle_and_the_diagonals() -> None:
    row = (Span(0, 20),)
    tiles = plan_tiles(row, row, row_mask_spec(20, [0, 8, 11, 15, 18, 20], None, prefix_of=[-1, 0, 0, 0, -1]))
    assert sorted((t.kind, t.q_begin, t.q_end, t.k_begin, t.k_end) for t in tiles) == [
        (CAUSAL, 0, 8, 0, 8), (CAUSAL, 8, 11, 8, 11), (CAUSAL, 11, 15, 11, 15), (CAUSAL, 15, 18, 15, 18),
        (CAUSAL, 18, 20, 18, 20), (FULL, 8, 18, 0, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ends, before",
    [
        ([0, 4, 8], [-1]), ([0, 4, 8], [0, -1]), ([0, 4, 8], [-1, 1]), ([0, 4, 4, 8], [-1, 0, 0]),
        ([0, 4, 6, 8], [-1, -1, 0]),
    ],  # fmt: skip
)
def test_prefixes_that_are_none_are_refused(ends: list[int], before: list[int]) -> None:
    with pytest.raises(DataError, match="follows at once"):
        row_mask_spec(8, ends, None, prefix_of=before)
    with pytest.raises(DataError, match="causal"):
        row_mask_spec(8, [0, 4, 8], None, causal=False, prefix_of=[-1, 0])


@pytest.mark.parametrize("window, sinks", [(None, False), (7, False), (5, True)])
def test_a_group_equals_its_sequences(window: int | None, sinks: bool) -> None:
    """Keys, values and gradients of answers behind a shared prompt: those of whole sequences, added up."""
    q, k, v = tensors(30, 4, 2)
    q, k, v = (x.detach()[:1].requires_grad_() for x in (q, k, v))
    sunk = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_() if sinks else None
    leaves = [q, k, v, *([sunk] if sinks else [])]
    prompt, answers = slice(0, 11), [slice(11, 17), slice(17, 20), slice(20, 30)]
    spec = row_mask_spec(30, [0, 11, 17, 20, 30], window, prefix_of=[-1, 0, 0, 0])
    found = packed_attention(q, k, v, spec, sunk)
    want = [packed_attention(q[:, prompt], k[:, prompt], v[:, prompt], MaskSpec((0, 11), window), sunk)]
    for answer in answers:
        whole = [torch.cat((x[:, prompt], x[:, answer]), 1) for x in (q, k, v)]
        length = whole[0].shape[1]
        want.append(packed_attention(*whole, MaskSpec((0, length), window), sunk)[:, 11:])
    assert (found - torch.cat(want, 1)).abs().max() < 1e-12
    for mine, theirs in zip(gradients(found, leaves), gradients(torch.cat(want, 1), leaves), strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    each_other = MaskSpec((0, 11, 30), window, True, prefix_of=(-1, 0))
    assert (packed_attention(q, k, v, each_other, sunk) - found).abs().max() > 1e-3


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


PATHS = ["flash", "written out", "runs"]


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the blocks be computed by the CPU's kernel, written out in small pieces, or in runs as on a GPU."""
    if path == "written out":
        monkeypatch.setattr(flash, "executor_of", lambda *_: flash.WRITTEN_OUT)
        monkeypatch.setattr(attention, "PIECE", 7)
    if path == "runs":
        flash_of_gpus.install()
        monkeypatch.setattr(flash, "executor_of", lambda *_: flash.RUNS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("seed", range(3))
def test_packed_attention_equals_plain(seed: int, kv_heads: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
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
@pytest.mark.parametrize("path", PATHS)
def test_narrow_types_stay_within_their_precision(
    path: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, monkeypatch)
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mask_spec", [MaskSpec((0, 40)), MaskSpec((0, 9, 40), 7)])
def test_sinks_equal_a_column_of_scores(mask_spec: MaskSpec, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
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


# Cost, and who computes


class Counting(TorchDispatchMode):
    """Counts operations, and remembers the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        made = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


LONG = 2048
LONG_ROWS = {
    "plain": None, "window": MaskSpec((0, LONG), 1000), "documents": MaskSpec((0, 1500, LONG)),
    "whole": MaskSpec((0, LONG), None, False),
}  # fmt: skip


# "plain" and "whole" are torch's own attention where it has a kernel. fp16 has none on CPUs.
LONG_CASES = [(row, "no kernel") for row in LONG_ROWS] + [("plain", "flash"), ("whole", "flash")]
LONG_CASES += [(row, path) for row in ("window", "documents") for path in PATHS]


@pytest.mark.parametrize(("row", "path"), LONG_CASES)
def test_no_path_makes_a_matrix_of_scores(row: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "no kernel":
        take(path, monkeypatch)
        monkeypatch.setattr(attention, "PIECE", 512)
    dtype = torch.float16 if path == "no kernel" else torch.float32
    q, k, v = (torch.randn(1, LONG, heads, 8, dtype=dtype, requires_grad=True) for heads in (2, 1, 1))
    with Counting() as count:
        mask_spec = LONG_ROWS[row]
        out = causal_attention(q, k, v) if mask_spec is None else packed_attention(q, k, v, mask_spec)
        out.sum().backward()
    assert count.largest <= 1024 * 1024 < LONG * LONG  # 2 heads of a piece; a strip of 512 queries, 1,511 keys


def test_operations_of_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU two calls, whatever the number of documents; one after the other elsewhere."""
    found = {}
    for path in ("runs", "flash"):
        with monkeypatch.context() as patch:
            take(path, patch)
            q, k, v = tensors(320, 4, 2)
            for documents in (2, 32):
                mask_spec = MaskSpec(tuple(range(0, 321, 320 // documents)), 7)
                with Counting() as forward:
                    out = packed_attention(q, k, v, mask_spec)
                with Counting() as backward:
                    gradients(out, [q, k, v])
                found[path, documents] = forward.operations, backward.operations
    assert found["runs", 2] == found["runs", 32]
    assert max(found["runs", 32]) <= 40 and min(found["flash", 32]) > 150


def test_who_computes_is_a_function_of_device_and_shape() -> None:
    half, wide = torch.bfloat16, torch.float32
    choose = flash.executor_of
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        assert choose("cuda", capability, half, (128, 128)) == flash.RUNS
        assert choose("cuda", capability, half, (192, 128)) == flash.RUNS  # latent attention
        assert choose("cuda", capability, wide, (128, 128)) == flash.TRITON
        assert choose("cuda", capability, half, (36, 36)) == choose("cuda", capability, half, (64, 128)) == flash.TRITON
    assert choose("cuda", (7, 5), half, (128, 128)) == flash.WRITTEN_OUT  # Turing has no such kernel
    assert choose("cuda", (9, 0), wide, (128, 128), triton=False) == flash.WRITTEN_OUT
    assert choose("cuda", (9, 0), half, (320, 320)) == flash.WRITTEN_OUT
    assert choose("cuda", (9, 0), torch.float64, (64, 64)) == flash.WRITTEN_OUT
    assert choose("cpu", (0, 0), wide, (64, 64)) == choose("cpu", (0, 0), torch.float64, (6, 4)) == flash.CPU
    assert choose("cpu", (0, 0), wide, (6, 10)) == choose("cpu", (0, 0), torch.float16, (64, 64)) == flash.WRITTEN_OUT
    assert flash.sdpa_order((9, 0))[0] == flash.sdpa_order((10, 3))[0] == "CUDNN_ATTENTION"
    assert "MATH" not in flash.sdpa_order((8, 0)) and flash.sdpa_order((8, 0))[0] == "FLASH_ATTENTION"


def test_torch_has_the_operations_as_they_are_called() -> None:
    """Names and places of what `ops.flash` gives: a release that changes them fails here, without a GPU."""
    forward = [x.name for x in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    backward = [x.name for x in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    further = ["scale", "window_size_left", "window_size_right"]
    assert forward[:13] == ["query", "key", "value", *lengths, "return_debug_mask", *further]
    made = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert backward == [*made, *lengths, "rng_state", "unused", *further]
    assert {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"} <= SDPBackend.__members__.keys()


@pytest.mark.parametrize("seed", range(6))
def test_pieces_and_runs_hold_what_their_tiles_hold(seed: int) -> None:
    """Each visible pair once: cut small, and joined."""
    draw = random.Random(seed)
    mask_spec, row = random_sight(draw, 60), (Span(0, 60),)
    seen = dense_mask(mask_spec)
    for tiles in (plan_tiles(row, row, mask_spec), plan_tiles(row, row, mask_spec, False)):
        for pieces in (tiles, [piece for tile in tiles for piece in pieces_of(tile, draw.choice((4, 9)))]):
            held = torch.zeros(60, 60, dtype=torch.int64)
            for tile in pieces:
                shown = attention._seen(tile, torch.device("cpu"))
                held[tile.q_begin : tile.q_end, tile.k_begin : tile.k_end] += 1 if shown is None else shown
            assert torch.equal(held, seen.long())
        assert sum(len(run.q_ends) - 1 for run in runs_of(tiles)) == len(tiles)
    if mask_spec.causal or mask_spec.window is None:
        assert len(runs_of(tiles)) == 1, "without strips one call"
