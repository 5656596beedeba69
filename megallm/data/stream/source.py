"""One source of the training stream: its documents in keyed order, epoch after epoch, in windows of
packed rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megallm.base import rng
from megallm.base.errors import DataError
from megallm.data.indexed.dataset import IndexedDataset, check_tokens
from megallm.data.megatron.order import split_range
from megallm.data.stream import fim, packing
from megallm.data.stream.permute import Permutation
from megallm.data.stream.plan import BEST_FIT, CONCAT, CONTEXT, SINGLE, Reading, StreamPlan

_AT_ONCE = 512  # documents looked up together
_MARGIN = 16  # tokens that rearranging a piece may add: three sentinels, and words cut in two
_SAMPLED, _SAMPLE_TOKENS = 64, 2048  # blocks of .bin in the fingerprint
_OPEN = (
    ""  # the form of a document of which nothing was read yet: decided when its window is packed
)
# Before a form: what was rearranged is the piece alone, and begin and end count its own tokens.
_PIECE = "piece-"


class RowItem(NamedTuple):
    """Tokens begin to end of a document read in a form; `size` is what they take of a row.

    In the forms of a whole rearranged document, begin and end count the rearranged tokens.
    """

    document: int
    begin: int
    end: int
    form: str
    size: int


@dataclass(frozen=True)
class PackedRow:
    """What one row holds: items of one epoch of one source."""

    prefix: str
    epoch: int
    seq_len: int
    items: tuple[RowItem, ...]

    @property
    def spans(self) -> list[list[int]]:
        """[document, begin, end] of each item."""
        return [[item.document, item.begin, item.end] for item in self.items]


@dataclass
class Cursor:
    """Where a source stands: `position` documents were drawn by the windows before this one, `held`
    is what they left over (see `DocumentSource.hold`), and `row` rows of this window are taken.
    `rows` and `tokens` are totals."""

    position: int = 0
    epoch: int = 0  # of `held`
    held: list[list[Any]] = field(default_factory=list)  # [document, begin, end, form]
    reading: list[Any] = field(default_factory=list)  # what this window was packed for
    row: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Window:
    """Rows packed together, in the order they are read, and where the next window begins."""

    epoch: int
    rows: list[tuple[RowItem, ...]]
    position: int
    held: list[list[Any]]


FEW_DOCUMENTS = 20  # so few are usually whole files that were meant to be split


def documents_of(data: IndexedDataset, split: str, which: str) -> tuple[int, int]:
    """Returns (first, how many) of the whole documents of a split. Errors: `DataError` when they
    hold no token.
    """
    low, high = split_range(split, which, len(data))
    first = int(np.searchsorted(data.document_indices, low, side="left"))
    count = int(np.searchsorted(data.document_indices, high, side="right")) - 1 - first
    begin, end = data.document_starts(np.array([first, max(first, first + count)])).tolist()
    if begin < end:
        return first, count
    remedy = "Give this source more, or the split a larger share."
    if data.num_documents < FEW_DOCUMENTS:
        remedy = (
            "A plain text file is one document unless it is split: preprocess again with "
            "--split-text paragraphs "
        )
        remedy += "(or lines), or give the split a larger share."
    raise DataError(
        f"{data.prefix}: the split '{which}' of {split} holds no whole document with tokens (the "
        f"dataset has {data.num_documents} documents). {remedy}"
    )


class DocumentSource:
    """The documents of one split of a dataset. A window is a pure function of (files, seed, cursor,
    reading).

    Errors: `DataError` for bad files and for a split without a token.
    """

    def __init__(
        self,
        prefix: str,
        plan: StreamPlan,
        vocab_size: int | None = None,
        rearranger: fim.Rearranger | None = None,
    ) -> None:
        self.prefix, self.data = prefix, IndexedDataset(prefix)
        self.vocab_size, self.rearranger = vocab_size, rearranger
        self.first, self.count = documents_of(self.data, plan.split, plan.which)
        self.fingerprint = dataset_fingerprint(self.data)
        self._seed = plan.seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)
        self._made: dict[tuple[Any, ...], np.ndarray | None] = {}

    # Windows

    def open(self, cursor: Cursor, reading: Reading) -> Window:
        """Returns the window that begins at the cursor (its `row` aside); without rows where only
        empty documents are left.
        """
        self._made.clear()
        epoch = cursor.epoch if cursor.held else cursor.position // self.count
        pool, position = [list(entry) for entry in cursor.held], cursor.position
        missing = reading.window * reading.seq_len - sum(end - begin for _, begin, end, _ in pool)
        while missing > 0 and position // self.count == epoch:
            drawn = self._draw(epoch, position, missing)
            position += len(drawn)
            missing -= sum(end for _, _, end, _ in drawn)
            pool += [entry for entry in drawn if entry[2]]
        last = position // self.count > epoch
        rows, held = _INTO_ROWS[reading.packing](self._items(pool, epoch, reading), reading, last)
        place = [cursor.position, *(cursor.held[0][:2] if cursor.held else [])]
        order = rng.permutation(
            rng.key_of(self._seed, "rows", self.fingerprint, epoch, *place), len(rows)
        )
        return Window(epoch, [rows[i] for i in order.tolist()], position, held)

    def hold(self, window: Window, row: int) -> list[list[Any]]:
        """Returns what rows `row` and later of a window hold, neighbours joined: the pool that
        another reading begins with.
        """
        entries: list[list[Any]] = [list(entry) for entry in window.held]
        for items in window.rows[row:]:
            entries += [
                [item.document, item.begin, item.end, _held_form(item.form)] for item in items
            ]
        joined: list[list[Any]] = []
        for entry in sorted(entries, key=lambda entry: entry[:2]):
            if joined and joined[-1][0] == entry[0] and joined[-1][2] == entry[1]:
                joined[-1][2] = entry[2]
            else:
                joined.append(entry)
        for entry in joined:
            document, begin, end, form = entry
            if begin == 0 and form != _OPEN and end == self._length(document, window.epoch, form):
                entry[2:] = [self._length(document, window.epoch, fim.PLAIN), _OPEN]
        return joined

    def _draw(self, epoch: int, position: int, missing: int) -> list[list[Any]]:
        """Returns the next documents of an epoch, until `missing` tokens are there or some hundreds
        were looked at.
        """
        at = position - epoch * self.count
        documents = self.first + self._permutation(epoch).at(at, min(_AT_ONCE, self.count - at))
        lengths = self.data.document_starts(documents + 1) - self.data.document_starts(documents)
        enough = int(np.searchsorted(np.cumsum(lengths), missing)) + 1
        return [
            [d, 0, n, _OPEN]
            for d, n in zip(documents[:enough].tolist(), lengths[:enough].tolist(), strict=True)
        ]

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(rng.key_of(self._seed, "documents", self.fingerprint, epoch), self.count)

    # Items

    def _items(self, pool: list[list[Any]], epoch: int, reading: Reading) -> Iterable[RowItem]:
        """Returns the entries of a pool with their form decided, cut where `reading` rearranges
        pieces.
        """
        for document, begin, end, form in pool:
            if reading.fim_rate > 0 and reading.fim_form == CONTEXT and form in (_OPEN, fim.PLAIN):
                yield from self._rearranged_pieces(document, begin, end, epoch, reading)
                continue
            if form == _OPEN:
                key = self._key(document, epoch)
                form = (
                    fim.choose_form(key, reading.fim_rate, reading.fim_spm)
                    if reading.fim_rate > 0
                    else fim.PLAIN
                )
                if form != fim.PLAIN and self._rearranged(document, epoch, form) is None:
                    form = fim.PLAIN
                end = self._length(document, epoch, form)
            yield RowItem(document, begin, end, form, end - begin)

    def _rearranged_pieces(
        self, document: int, begin: int, end: int, epoch: int, reading: Reading
    ) -> Iterable[RowItem]:
        room = reading.seq_len
        if end - begin > room and room > 4 * _MARGIN:
            room -= _MARGIN
        for low, high in packing.split_document(end - begin, room):
            low, high = begin + low, begin + high
            form = fim.choose_form(
                self._key(document, epoch, low), reading.fim_rate, reading.fim_spm
            )
            made = (
                None if form == fim.PLAIN else self._rearranged(document, epoch, form, (low, high))
            )
            if made is None or len(made) > reading.seq_len:
                yield RowItem(document, low, high, fim.PLAIN, high - low)
            else:
                yield RowItem(document, low, high, _PIECE + form, len(made))

    def _key(self, document: int, epoch: int, *place: int) -> int:
        return rng.key_of(self._seed, "fim", self.fingerprint, document, epoch, *place)

    def _length(self, document: int, epoch: int, form: str) -> int:
        if form in (fim.PSM, fim.SPM):
            return len(self._rearranged(document, epoch, form))
        begin, end = self.data.document_starts(np.array([document, document + 1])).tolist()
        return end - begin

    def _rearranged(
        self, document: int, epoch: int, form: str, piece: tuple[int, ...] = ()
    ) -> np.ndarray | None:
        """Tokens of a document (or of the piece [begin, end) of it) in PSM or SPM; None when they
        are no text.
        """
        name = (document, epoch, form, *piece)
        if name not in self._made:
            if self.rearranger is None:
                raise ValueError("A plan with fill-in-the-middle needs a rearranger.")
            tokens = self._plain(
                document, *(piece or (0, self._length(document, epoch, fim.PLAIN)))
            )
            self._made[name] = self.rearranger(tokens, form, self._key(document, epoch, *piece[:1]))
        return self._made[name]

    def _plain(self, document: int, begin: int, end: int) -> np.ndarray:
        start = int(self.data.document_starts(np.array([document]))[0]) + begin
        tokens = self.data.tokens(start, end - begin)
        if self.vocab_size is not None:
            check_tokens(self.data, start, tokens, self.vocab_size)
        return tokens

    def read(self, item: RowItem, epoch: int) -> tuple[np.ndarray, int | None]:
        """Returns tokens of an item [size], and the token that follows them in the same document
        (None at its end).

        Errors: `DataError` for an id outside the vocabulary.
        """
        document, begin, end, form, _ = item
        if form.startswith(_PIECE):
            return self._rearranged(document, epoch, form.removeprefix(_PIECE), (begin, end)), None
        if form in (fim.PSM, fim.SPM):
            made = self._rearranged(document, epoch, form)
            return made[begin:end], int(made[end]) if end < len(made) else None
        more = end < self._length(document, epoch, form)
        tokens = self._plain(document, begin, end + more)
        return tokens[: end - begin], int(tokens[-1]) if more else None


def dataset_fingerprint(data: IndexedDataset) -> str:
    """Hash of the whole index and of 64 blocks of the tokens: tells whether the files are still the
    same.
    """
    digest = xxhash.xxh3_128()
    for array in (data.lengths, data.document_indices):
        digest.update(np.ascontiguousarray(array).data)
    last = max(0, data.num_tokens - _SAMPLE_TOKENS)
    for begin in np.linspace(0, last, _SAMPLED).astype(np.int64).tolist():
        digest.update(data.tokens(begin, min(_SAMPLE_TOKENS, data.num_tokens)).data)
    return f"{data.dtype.name}-{digest.hexdigest()}"


def _held_form(form: str) -> str:
    return fim.PLAIN if form.startswith(_PIECE) else form


def _fitted(
    items: Iterable[RowItem], reading: Reading, last: bool
) -> tuple[list[tuple[RowItem, ...]], list[list[Any]]]:
    """Rows by best fit; nothing is left over."""
    pieces = []
    for item in items:
        if item.form.startswith(_PIECE):
            pieces.append(item)
            continue
        for low, high in packing.split_document(item.size, reading.seq_len):
            pieces.append(
                item._replace(begin=item.begin + low, end=item.begin + high, size=high - low)
            )
    rows = packing.best_fit([piece.size for piece in pieces], reading.seq_len)
    return [tuple(pieces[i] for i in row) for row in rows], []


def _chunked(
    items: Iterable[RowItem], reading: Reading, last: bool
) -> tuple[list[tuple[RowItem, ...]], list[list[Any]]]:
    """Full rows back to back; what does not fill one is left over, except at the end of an
    epoch.
    """
    items = list(items)
    rows = [
        tuple(
            items[i]._replace(
                begin=items[i].begin + low, end=items[i].begin + high, size=high - low
            )
            for i, low, high in row
        )
        for row in packing.concatenate([item.size for item in items], reading.seq_len)
    ]
    if last or not rows:
        return rows, []
    whole = min(len(rows), reading.window)
    whole -= whole == len(rows) and sum(item.size for item in rows[-1]) < reading.seq_len
    return rows[:whole], [[d, b, e, f] for row in rows[whole:] for d, b, e, f, _ in row]


def _single(
    items: Iterable[RowItem], reading: Reading, last: bool
) -> tuple[list[tuple[RowItem, ...]], list[list[Any]]]:
    """A row for each; nothing is left over."""
    return [(item,) for item in items], []


_INTO_ROWS = {BEST_FIT: _fitted, CONCAT: _chunked, SINGLE: _single}
