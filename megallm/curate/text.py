"""Words, lines and paragraphs of a batch of texts as numpy arrays, and 64-bit hashes of any of
them.

All texts of a batch are laid end to end as code points, so that one array operation serves them
all. They are folded first (folding.py), so that what looks alike compares alike in every step. A
word is a maximal run of letters, digits, marks and underscores (none at its ends); in scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) every character is a word. The hash of
a run of characters is a polynomial modulo 2^64 read off prefix sums (Karp and Rabin, "Efficient
randomized pattern-matching algorithms", 1987), then mixed. Where the C++ extension is built, it
does the same work with the same results (csrc/index/text.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from megallm.base import extension
from megallm.curate.folding import DIGIT, SOLO, SPACE, STOP, SYMBOL, WORD, fold

_NEWLINE = 10
_UNDERSCORE = ord("_")
_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_NGRAM_BASE = 0xD6E8FEB86659FD93
_MIN_POWERS = 1 << 16


@lru_cache(maxsize=2)  # one size of each base: the tables of a huge document do not stay
def _powers_of(base: int, count: int) -> np.ndarray:
    """base^0 .. base^(count-1) modulo 2^64."""
    out = np.full(count, base, np.uint64)
    out[0] = 1
    with np.errstate(over="ignore"):
        return np.multiply.accumulate(out)


def _powers(base: int, count: int) -> np.ndarray:
    size = _MIN_POWERS
    while size < count:
        size *= 2
    return _powers_of(base, size)[:count]


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of MurmurHash3); a bijection of uint64."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def lowered(text: str) -> str:
    """Returns lower case, one code point for one code point, so that positions stay."""
    return text.replace("İ", "i").lower()  # the only letter whose lower case is longer


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of values[offsets[i]:offsets[i+1]], empty segments included; of flags the counts of true
    ones.
    """
    if values.dtype == bool:
        bounds = offsets.tolist()
        return np.array(
            [
                np.count_nonzero(values[low:high])
                for low, high in zip(bounds[:-1], bounds[1:], strict=True)
            ],
            np.int64,
        )
    out = np.zeros(len(offsets) - 1, values.dtype)
    used = np.flatnonzero(np.diff(offsets))
    if len(used):
        out[used] = np.add.reduceat(values[: offsets[-1]], offsets[:-1][used])
    return out


def sorted_set(values: np.ndarray) -> np.ndarray:
    """Returns the different values in order (numpy's own goes through a hash table, which is slower
    here).
    """
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


class Hasher:
    """Hashes of any runs of characters of a text. (Apart from `Analysis`, so that nothing refers to
    it in a circle: what does waits for the garbage collector, with all its arrays.)"""

    def __init__(self, codes: np.ndarray) -> None:
        self._codes = codes

    @cached_property
    def _prefix(self) -> np.ndarray:
        out = np.zeros(len(self._codes) + 1, np.uint64)
        values = (self._codes.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(self._codes))
        np.cumsum(values, out=out[1:])
        return out

    def hash(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Returns uint64 hashes of the runs [begin, end)."""
        native = extension.index()
        if native is not None:
            return native.hashes(self._codes, begin, end, _BASE)
        shift = _powers(_INVERSE, len(self._codes) + 1)
        return mix((self._prefix[end] - self._prefix[begin]) * shift[begin])


class Pieces:
    """Some runs of characters [begin, end) in order, and for each document the range of its runs in
    `offsets`.
    """

    def __init__(
        self,
        begin: np.ndarray,
        end: np.ndarray,
        document_starts: np.ndarray,
        hasher: Hasher,
        hashes: np.ndarray | None = None,
    ) -> None:
        self.begin, self.end, self._hasher, self._hashes = begin, end, hasher, hashes
        self.offsets = np.searchsorted(begin, document_starts)

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def counts(self) -> np.ndarray:
        """Returns how many runs each document has, int64 [documents]."""
        return np.diff(self.offsets)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.end - self.begin

    @cached_property
    def extent(self) -> np.ndarray:
        """Returns the characters of each document's runs together, and of its longest run, int64
        [2, documents].
        """
        native = extension.index()
        if native is not None:
            return native.lengths(self.begin, self.end, self.offsets)
        longest = np.zeros(len(self.counts), np.int64)
        used = np.flatnonzero(self.counts)
        if len(used):
            longest[used] = np.maximum.reduceat(self.lengths, self.offsets[:-1][used])
        return np.stack([segment_sums(self.lengths, self.offsets), longest])

    @cached_property
    def documents(self) -> np.ndarray:
        """Returns the document of every run."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    @cached_property
    def hashes(self) -> np.ndarray:
        """Returns uint64, equal for equal (folded) runs wherever they stand."""
        return self._hasher.hash(self.begin, self.end) if self._hashes is None else self._hashes

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of `size` consecutive runs inside one document, and the number of the first run of
        each.
        """
        native = extension.index()
        if native is not None:
            return native.ngrams(self.hashes, self.offsets, size)
        count = len(self) - size + 1
        if count <= 0:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        inside = self.documents[:count] == self.documents[size - 1 :]
        first = np.flatnonzero(inside)
        return self.ngrams_at(first, size), first

    def ngrams_at(self, first: np.ndarray, size: int) -> np.ndarray:
        """Hashes of the n-grams that begin at the given runs; the caller knows that they stay
        inside a document.
        """
        total = np.zeros(len(first), np.uint64)
        power = 1
        for k in range(size):
            total += self.hashes[first + k] * np.uint64(power)
            power = power * _NGRAM_BASE % (1 << 64)
        return mix(total)


class Analysis:
    """A batch of texts, folded and laid end to end with a newline after each.

    `starts` int64 [documents + 1]: where each text begins; the last is the end. `codes` uint32 and
    `kinds` uint8 [characters].
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.codes, self.kinds, self.starts = fold(texts)
        self._hasher = Hasher(self.codes)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def around(self, at: int, reach: int) -> tuple[int, int]:
        """Returns the range of characters at most `reach` away from the one at `at`, inside its
        text.
        """
        document = int(np.searchsorted(self.starts, at, side="right")) - 1
        low, high = self.starts[document : document + 2].tolist()
        return max(low, at - reach), min(high - 1, at + reach)

    def text(self, begin: int, end: int) -> str:
        """Returns the folded characters [begin, end)."""
        return self.codes[begin:end].tobytes().decode("utf-32-le", "surrogatepass")

    @property
    def words(self) -> Pieces:
        """Returns the words, folded."""
        return self._words[0]

    @property
    def word_classes(self) -> np.ndarray:
        """Returns the classes of the characters of each word together, uint8 [words]."""
        return self._words[1]

    @cached_property
    def _words(self) -> tuple[Pieces, np.ndarray]:
        native = extension.index()
        if native is not None:
            begin, end, hashes, found = native.words(self.codes, self.kinds, _BASE)
            return self._pieces(begin, end, hashes), found
        if not len(self.codes):
            return self._pieces(np.zeros(0, np.int64), np.zeros(0, np.int64)), self.kinds
        word, solo = (self.kinds & WORD) > 0, (self.kinds & SOLO) > 0
        border = np.ones(len(word) + 1, bool)  # between character i - 1 and i
        border[1:-1] = (word[1:] != word[:-1]) | solo[1:] | solo[:-1]
        begin, end = np.flatnonzero(word & border[:-1]), np.flatnonzero(word & border[1:]) + 1
        words = self._pieces(*self._trimmed(begin, end))
        kinds = np.where(self.kinds & WORD, self.kinds, 0)  # what stands between two words has none
        return words, np.bitwise_or.reduceat(kinds, words.begin) if len(words) else kinds[:0]

    def _trimmed(self, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words without the underscores around them, which are punctuation: _so_."""
        while (low := (begin < end) & (self.codes[begin] == _UNDERSCORE)).any():
            begin = begin + low
        while (low := (begin < end) & (self.codes[end - 1] == _UNDERSCORE)).any():
            end = end - low
        return begin[begin < end], end[begin < end]

    @cached_property
    def characters(self) -> np.ndarray:
        """Returns of each text the characters that are not space, those of words, digits, symbols
        (# and an ellipsis), places where three dots begin, and ends of sentences, int64 [6,
        documents].
        """
        native = extension.index()
        if native is not None:
            return native.characters(self.codes, self.kinds, self.starts)
        codes, kinds = self.codes, self.kinds
        dots = codes == ord(".")
        dots[:-2] &= dots[1:-1] & dots[2:]
        dots[-2:] = False
        following = np.append(kinds[1:], kinds[-1:])
        found = (
            (kinds & SPACE) == 0, (kinds & WORD) > 0, (kinds & DIGIT) > 0, (kinds & SYMBOL) > 0, dots,
            ((kinds & STOP) > 0) & ((following & WORD) == 0),
        )  # fmt: skip
        return np.stack([segment_sums(flags, self.starts) for flags in found])

    @cached_property
    def ink(self) -> np.ndarray:
        """Returns positions of the characters that are not space."""
        return np.flatnonzero((self.kinds & SPACE) == 0)

    @property
    def lines(self) -> Pieces:
        """Returns the lines that are not blank, without the space around them."""
        return self._lines[0]

    @property
    def newlines(self) -> np.ndarray:
        """Newlines of each document, the one that ends it not counted."""
        return self._lines[2]

    @cached_property
    def _lines(self) -> tuple[Pieces, np.ndarray, np.ndarray]:
        """`lines`, which of them follow a blank one or begin a text (uint8 [lines]), and
        `newlines`.
        """
        native = extension.index()
        if native is not None:
            begin, end, after_blank, newlines = native.lines(self.codes, self.kinds, self.starts)
            return self._pieces(begin, end), after_blank, newlines
        ends = np.flatnonzero(self.codes == _NEWLINE)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        first, last = np.searchsorted(self.ink, starts), np.searchsorted(self.ink, ends)
        used = last > first
        lines = self._pieces(self.ink[first[used]], self.ink[last[used] - 1] + 1)
        # Two newlines between the end of a line and the start of the next make a blank line.
        gap = np.searchsorted(ends, lines.begin[1:]) - np.searchsorted(ends, lines.end[:-1]) > 1
        new = np.concatenate([[True], gap | (lines.documents[1:] != lines.documents[:-1])])[
            : len(lines)
        ]
        return lines, new.astype(np.uint8), np.diff(np.searchsorted(ends, self.starts)) - 1

    @cached_property
    def paragraphs(self) -> Pieces:
        """Runs of lines between blank lines, from the first to the last character that is not
        space.
        """
        lines = self.lines
        if not len(lines):
            return lines
        new = self._lines[1] > 0
        last = np.concatenate([new[1:], [True]])
        return self._pieces(lines.begin[new], lines.end[last])

    def _pieces(
        self, begin: np.ndarray, end: np.ndarray, hashes: np.ndarray | None = None
    ) -> Pieces:
        return Pieces(begin, end, self.starts, self._hasher, hashes)
