"""Which rectangles of the attention matrix hold anything visible. Pure.

Causality, documents and a window leave most of the matrix empty. `plan_tiles` cuts what is left
into rectangles that a kernel runs without a mask (FULL), with the ordinary causal mask (CAUSAL),
with a band (BAND) or with a window to both sides (NEAR); a rectangle in which nothing is visible is
not in the plan, so nothing is computed for it.

Documents may share a prefix: a prompt that stands in the row once is seen by each of its answers,
which do not see each other. That is one more rectangle, queries of answers by keys of the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product

from megallm.base.errors import DataError

FULL, CAUSAL, BAND, NEAR = "full", "causal", "band", "near"
SHORTEST_STRIP = 64  # queries of a BAND tile, where the window is shorter
LONGEST_STRIP = 512  # and where it is longer: what is added to the scores of a strip is a tensor


@dataclass(frozen=True)
class MaskSpec:
    """What a query at token t of a row may see: keys `t - window < j <= t` of its own document.

    When not causal it sees its document whole, or what is less than `window` away to either side.
    Scores are capped softly, `cap * tanh(score / cap)` (Gemma 2, arXiv 2408.00118). Padding is a
    document of its own, which no other token sees. `documents` are the ends of the documents, first
    0 and last T (cu_seqlens); a row without packing is `(0, T)`.

    `prefix_of` names for each document the one that stands before it, -1 for none; empty: none has
    one. A document sees its prefix, and that one's prefix, as if they stood right before it.
    """

    documents: tuple[int, ...]
    window: int | None = None
    causal: bool = True
    cap: float | None = None
    prefix_of: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest text: of a document together with what stands before
        it.
        """
        texts: list[int] = []
        for number, (begin, end) in enumerate(pairwise(self.documents)):
            before = self.prefix_of[number] if self.prefix_of else -1
            texts.append(end - begin + (texts[before] if before >= 0 else 0))
        return max(texts)

    def seen(self, number: int) -> Iterator[tuple[int, int, int]]:
        """Yields (begin, end, distance) of a document and of all that stand before it: how far a
        key's token has to move to stand where the document's queries count from.
        """
        begin, end = self.documents[number : number + 2]
        yield begin, end, 0
        while self.prefix_of and self.prefix_of[number] >= 0:
            number = self.prefix_of[number]
            low, high = self.documents[number : number + 2]
            yield low, high, begin - high
            begin -= high - low


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
    length: int,
    cu_seqlens: Sequence[int] | None,
    window: int | None,
    causal: bool = True,
    prefix_of: Sequence[int] = (),
) -> MaskSpec:
    """Returns the mask of a row of `length` tokens; raises DataError when `cu_seqlens` does not
    divide up that row, or `prefix_of` does not name prefixes in it.
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
    if len(prefix_of):
        _check_prefixes(ends, prefix_of, causal)
        return MaskSpec(ends, window, causal, prefix_of=tuple(prefix_of))
    return MaskSpec(tuple(sorted(set(ends))), window, causal)


def _check_prefixes(ends: tuple[int, ...], prefix_of: Sequence[int], causal: bool) -> None:
    """Documents that share a prefix follow it: each is behind its own, the first of them at
    once.
    """
    if not causal:
        raise DataError(
            "prefix_of shares prefixes between documents, which needs a causal model: in this one "
            "a prompt sees its answer. Set shared_prefix to off."
        )
    first = {before: number for number, before in reversed([*enumerate(prefix_of)]) if before >= 0}
    follows = all(before + 1 == number for before, number in first.items())
    behind = all(-1 <= before < number for number, before in enumerate(prefix_of))
    if len(prefix_of) != len(ends) - 1 or len(set(ends)) < len(ends) or not (follows and behind):
        raise DataError(
            f"prefix_of {list(prefix_of[:8])} of the documents cu_seqlens {list(ends[:8])}: it "
            "names for each document, none of them empty, an earlier one that the first of its "
            "documents follows at once, or -1."
        )


@lru_cache(maxsize=256)
def plan_tiles(
    queries: tuple[Span, ...], keys: tuple[Span, ...], mask_spec: MaskSpec, strips: bool = True
) -> tuple[Tile, ...]:
    """Returns the tiles of these queries against these keys; together they hold each visible pair
    exactly once.

    Without `strips` a window is one BAND for each document, for kernels that leave out by
    themselves what it hides.
    """
    tiles: list[Tile] = []
    for q in queries:
        for number in _documents(mask_spec.documents, q):
            begin, end = mask_spec.documents[number : number + 2]
            mine = max(q.begin, begin), min(q.end, end)
            for (low, high, distance), k in product(mask_spec.seen(number), keys):
                there = Span(max(k.begin, low) + distance, min(k.end, high) + distance)
                cuts = (
                    _cut(*mine, there, low + distance, mask_spec.window, strips)
                    if mask_spec.causal
                    else _rectangle(mine, k, (begin, end), mask_spec.window)
                )
                for kind, (a, b), (c, d) in cuts:
                    q_at, k_at = a - q.begin + q.at, c - distance - k.begin + k.at
                    place = kind, q_at, q_at + b - a, k_at, k_at + d - c, a - c
                    tiles.append(Tile(*place, mask_spec.window, mask_spec.cap))
    return _joined(tiles) if mask_spec.prefix_of else tuple(tiles)


def _joined(tiles: list[Tile]) -> tuple[Tile, ...]:
    """The same with FULL tiles of the same keys whose queries follow each other as one: of all
    answers to a prompt.
    """
    made: list[Tile] = []
    last: dict[tuple[int, int, int], int] = {}  # by keys and the end of the queries
    for tile in tiles:
        before = tile.k_begin, tile.k_end, tile.q_begin
        if tile.kind == FULL and before in last:
            at = last.pop(before)
            made[at] = replace(made[at], q_end=tile.q_end)
        else:
            at = len(made)
            made.append(tile)
        if tile.kind == FULL:
            last[tile.k_begin, tile.k_end, tile.q_end] = at
    return tuple(made)


def _documents(ends: tuple[int, ...], span: Span) -> Iterator[int]:
    """The numbers of the documents that have tokens in the span."""
    n = bisect_right(ends, span.begin) - 1
    while n + 1 < len(ends) and ends[n] < span.end:
        yield n
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


def _cut(
    a: int, b: int, k: Span, document: int, window: int | None, strips: bool
) -> Iterator[Cut]:
    """Tiles of queries `[a, b)` of one document against the keys of it in `k`."""
    c, d = max(k.begin, document), min(k.end, b)
    a = max(a, c)
    if a >= b or c >= d:
        return
    if window is not None and b - 1 - c >= window:
        b, c = min(b, d - 1 + window), max(c, a - window + 1)  # who sees, and what is seen
        if a < b and c < d:
            yield from _strips(a, b, c, d, window) if strips else [(BAND, (a, b), (c, d))]
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
    size = min(max(window, SHORTEST_STRIP), LONGEST_STRIP)
    for x in range(a, b, size):
        low, high = max(c, x - window + 1), min(d, x + size, b)
        y = min(
            x + size, b, high - 1 + window
        )  # queries from y on are past the window of the last key
        if low < high and x < y:
            yield (FULL if high <= x + 1 and y - 1 - low < window else BAND), (x, y), (low, high)


def pieces_of(tile: Tile, limit: int) -> Iterator[Tile]:
    """Yields a tile as tiles of at most `limit` queries and keys, without those that show nothing.
    A query may see nothing of a piece.
    """
    if max(tile.q_end - tile.q_begin, tile.k_end - tile.k_begin) <= limit:
        yield tile
        return
    masked, near = tile.kind != FULL, tile.kind == NEAR
    for q in range(tile.q_begin, tile.q_end, limit):
        for k in range(tile.k_begin, tile.k_end, limit):
            q_end, k_end = min(q + limit, tile.q_end), min(k + limit, tile.k_end)
            shift = tile.shift + (q - tile.q_begin) - (k - tile.k_begin)
            least, most = shift - (k_end - k - 1), shift + (q_end - q - 1)  # query minus key
            window = tile.window if tile.kind in (BAND, NEAR) else None
            first = 1 - window if near else 0  # the least distance that is seen
            if masked and (most < first or (window is not None and least >= window)):
                continue
            whole = not masked or (least >= first and (window is None or most < window))
            kind = FULL if whole else NEAR if near else BAND
            if kind == BAND and window is None and shift == 0 and q_end - q == k_end - k:
                kind = CAUSAL
            yield Tile(kind, q, q_end, k, k_end, shift, window, tile.cap)


@dataclass(frozen=True)
class TileRun:
    """Tiles of which each begins where the one before ends: one call of a kernel for sequences of
    many lengths. `q_ends` and `k_ends` are cumulative, from 0.

    A query sees keys from `left` before to `right` after its own place, where the last query and
    the last key of a tile share one place; None: all.
    """

    first: Tile
    q_ends: tuple[int, ...]
    k_ends: tuple[int, ...]
    left: int | None
    right: int | None

    @property
    def rows(self) -> slice:
        """Returns the queries, as indices into what is stored."""
        return slice(self.first.q_begin, self.first.q_begin + self.q_ends[-1])

    @property
    def keys(self) -> slice:
        """Returns the keys, as indices into what is stored."""
        return slice(self.first.k_begin, self.first.k_begin + self.k_ends[-1])


@lru_cache(maxsize=256)
def runs_of(tiles: tuple[Tile, ...]) -> tuple[TileRun, ...]:
    """Returns the tiles as few runs."""
    runs: list[list[Tile]] = []
    for tile in tiles:
        last = runs[-1][-1] if runs else None
        joins = last is not None and (last.q_end, last.k_end) == (tile.q_begin, tile.k_begin)
        if joins and _sight(last) == _sight(tile):
            runs[-1].append(tile)
        else:
            runs.append([tile])
    return tuple(
        TileRun(
            run[0],
            (0, *(tile.q_end - run[0].q_begin for tile in run)),
            (0, *(tile.k_end - run[0].k_begin for tile in run)),
            *_sight(run[0]),
        )
        for run in runs
    )


def _sight(tile: Tile) -> tuple[int | None, int | None]:
    if tile.kind == FULL:
        return None, None
    behind = tile.shift - (tile.k_end - tile.k_begin) + (tile.q_end - tile.q_begin)
    return None if tile.window is None else tile.window - 1 - behind, behind
