"""Which rectangles of the attention matrix hold anything visible. Pure.

Causality, documents and a window leave most of the matrix empty. `plan_tiles` cuts what is left
into rectangles that a kernel runs without a mask (FULL), with the ordinary causal mask (CAUSAL),
with a band (BAND) or with a window to both sides (NEAR); a rectangle in which nothing is visible is
not in the plan, so nothing is computed for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megallm.base.errors import DataError

FULL, CAUSAL, BAND, NEAR = "full", "causal", "band", "near"
SHORTEST_STRIP = 64  # queries of a BAND tile, where the window is shorter


@dataclass(frozen=True)
class MaskSpec:
    """What a query at token t of a row may see: keys `t - window < j <= t` of its own document.

    When not causal it sees its document whole, or what is less than `window` away to either side.
    Scores are capped softly, `cap * tanh(score / cap)` (Gemma 2, arXiv 2408.00118). Padding is a
    document of its own, which no other token sees. `documents` are the ends of the documents, first
    0 and last T (cu_seqlens); a row without packing is `(0, T)`.
    """

    documents: tuple[int, ...]
    window: int | None = None
    causal: bool = True
    cap: float | None = None


@dataclass(frozen=True)
class Span:
    """Tokens `begin <= t < end` of the row, stored from index `at` on."""

    begin: int
    end: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `[q_begin, q_end)` against keys `[k_begin, k_end)`, as indices into what is stored.

    `shift` is the token of the first query minus the token of the first key; with `window` it says
    what is visible in a BAND tile. Every query of a tile sees at least one of its keys.
    """

    kind: str
    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    shift: int
    window: int | None = None
    cap: float | None = None  # of the scores

    @property
    def work(self) -> int:
        """Scores computed: the whole rectangle, or its lower triangle."""
        queries, keys = self.q_end - self.q_begin, self.k_end - self.k_begin
        return queries * (queries + 1) // 2 if self.kind == CAUSAL else queries * keys


def row_mask_spec(
    length: int, cu_seqlens: Sequence[int] | None, window: int | None, causal: bool = True
) -> MaskSpec:
    """Returns the mask of a row of `length` tokens; raises DataError when `cu_seqlens` does not
    divide up that row.
    """
    if cu_seqlens is None:
        return MaskSpec((0, length), window, causal)
    ends = tuple(cu_seqlens)
    if (
        len(ends) < 2
        or ends[0] != 0
        or ends[-1] != length
        or any(a > b for a, b in zip(ends, ends[1:], strict=False))
    ):
        raise DataError(
            f"cu_seqlens {list(ends[:8])}{'...' if len(ends) > 8 else ''} do not divide up a row "
            f"of {length} tokens: they must rise from 0 to {length}."
        )
    return MaskSpec(tuple(sorted(set(ends))), window, causal)


@lru_cache(maxsize=256)
def plan_tiles(
    queries: tuple[Span, ...], keys: tuple[Span, ...], mask_spec: MaskSpec
) -> tuple[Tile, ...]:
    """Returns the tiles of these queries against these keys; together they hold each visible pair
    exactly once.
    """
    tiles: list[Tile] = []
    for q in queries:
        for begin, end in _documents(mask_spec.documents, q):
            mine = max(q.begin, begin), min(q.end, end)
            for k in keys:
                cuts = (
                    _cut(*mine, k, begin, mask_spec.window)
                    if mask_spec.causal
                    else _rectangle(mine, k, (begin, end), mask_spec.window)
                )
                for kind, (a, b), (c, d) in cuts:
                    q_at, k_at = a - q.begin + q.at, c - k.begin + k.at
                    place = kind, q_at, q_at + b - a, k_at, k_at + d - c, a - c
                    tiles.append(Tile(*place, mask_spec.window, mask_spec.cap))
    return tuple(tiles)


def _documents(ends: tuple[int, ...], span: Span) -> Iterator[tuple[int, int]]:
    """The documents that have tokens in the span."""
    n = bisect_right(ends, span.begin) - 1
    while n + 1 < len(ends) and ends[n] < span.end:
        yield ends[n], ends[n + 1]
        n += 1


Cut = tuple[str, tuple[int, int], tuple[int, int]]  # kind, queries and keys as tokens of the row


def _rectangle(
    queries: tuple[int, int], k: Span, document: tuple[int, int], window: int | None
) -> Iterator[Cut]:
    """The one tile of some queries of a document that sees itself whole, against the keys of it in
    `k`; with a window strips of the queries that it reaches.
    """
    begin, end = max(k.begin, document[0]), min(k.end, document[1])
    if window is None:
        if begin < end:
            yield FULL, queries, (begin, end)
        return
    size = max(window, SHORTEST_STRIP)
    for x in range(*queries, size):
        y = min(x + size, queries[1])
        low, high = max(begin, x - window + 1), min(end, y - 1 + window)
        x, y = max(x, low - window + 1), min(y, high - 1 + window)
        if low < high and x < y:
            whole = max(y - 1 - low, high - 1 - x) < window
            yield FULL if whole else NEAR, (x, y), (low, high)


def _cut(a: int, b: int, k: Span, document: int, window: int | None) -> Iterator[Cut]:
    """Tiles of queries `[a, b)` of one document against the keys of it in `k`."""
    c, d = max(k.begin, document), min(k.end, b)
    a = max(a, c)
    if a >= b or c >= d:
        return
    if window is not None and b - 1 - c >= window:
        yield from _strips(a, b, c, d, window)
        return
    if c < a:
        yield FULL, (a, b), (c, min(d, a))
    if a < d:
        yield CAUSAL, (a, d), (a, d)
        if d < b:
            yield FULL, (d, b), (a, d)


def _strips(a: int, b: int, c: int, d: int, window: int) -> Iterator[Cut]:
    """Short strips of queries, each against the keys that its window reaches: work grows as T x
    window.
    """
    size = max(window, SHORTEST_STRIP)
    for x in range(a, b, size):
        low, high = max(c, x - window + 1), min(d, x + size, b)
        y = min(
            x + size, b, high - 1 + window
        )  # queries from y on are past the window of the last key
        if low < high and x < y:
            yield (FULL if high <= x + 1 and y - 1 - low < window else BAND), (x, y), (low, high)
