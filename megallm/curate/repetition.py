"""How much of each document repeats itself: lines, paragraphs and word n-grams (Rae et al. 2021,
"Scaling Language Models: Methods, Analysis & Insights from Training Gopher", table A1).

A repetition is a second or later occurrence inside the document. Characters that several repeated
n-grams share are counted once. Shares are of the characters that are not space.
"""

from __future__ import annotations

import numpy as np

from megallm.base import extension
from megallm.curate.text import Analysis, Pieces, mix, segment_sums

TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)


def runs(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pieces that are equal inside one document, next to each other: their numbers in
    `order`, first occurrences first, and for each place of `order` whether it belongs to the run of
    the place before.
    """
    keys = mix(hashes + documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return order, np.concatenate([[False], same]) if len(keys) else same


def repeated(hashes: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Returns which pieces are second or later occurrences in their document, bool [n]."""
    order, same = runs(hashes, documents)
    later = np.zeros(len(hashes), bool)
    later[order[same]] = True
    return later


def duplicate_pieces(pieces: Pieces, ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of a document's lines (paragraphs) that are repeats, and the share of its
    characters in them.
    """
    native = extension.index()
    if native is not None:
        number, size = native.duplicates(pieces.hashes, pieces.begin, pieces.end, pieces.offsets)
        return number / np.maximum(pieces.counts, 1), np.minimum(size / np.maximum(ink, 1), 1.0)
    later = repeated(pieces.hashes, pieces.documents)
    count = segment_sums(later, pieces.offsets) / np.maximum(pieces.counts, 1)
    chars = segment_sums(np.where(later, pieces.lengths, 0), pieces.offsets) / np.maximum(ink, 1)
    return count, np.minimum(chars, 1.0)


def word_repetition(analysis: Analysis) -> dict[str, np.ndarray]:
    """Returns `top_{2,3,4}gram` and `dup_{5..10}gram` of every document, float64 [documents]."""
    words = analysis.words
    total = np.maximum(words.extent[0], 1)
    native = extension.index()
    if native is not None:
        names = [*(f"top_{size}gram" for size in TOP), *(f"dup_{size}gram" for size in DUPLICATE)]
        found = native.repetition(words.hashes, words.begin, words.end, words.offsets)
        return {name: np.minimum(row / total, 1.0) for name, row in zip(names, found, strict=True)}
    out: dict[str, np.ndarray] = {}
    ends = words.offsets[1:]
    first: np.ndarray | None = (
        None  # where an n-gram that occurs twice begins; a longer one begins nowhere else
    )
    for size in (*TOP, *DUPLICATE):
        if first is None:
            hashes, first = words.ngrams(size)
        else:
            first = first[first + size <= ends[words.documents[first]]]
            hashes = words.ngrams_at(first, size)
        order, same = runs(hashes, words.documents[first])
        shared = same.copy()
        shared[:-1] |= same[1:]
        if size in TOP:
            out[f"top_{size}gram"] = _top_share(
                words, size, first[order[shared]], ~same[shared], total
            )
        else:
            out[f"dup_{size}gram"] = _covered_share(words, size, first[order[same]], total)
        first = np.sort(first[order[shared]])
    return out


def _top_share(
    words: Pieces, size: int, first: np.ndarray, heads: np.ndarray, total: np.ndarray
) -> np.ndarray:
    """Returns the share of a document's word characters in its most frequent n-gram (that occurs at
    least twice); of equally frequent ones the longest. `first` are n-grams in runs of equal ones,
    `heads` marks where a run begins."""
    starts = np.flatnonzero(heads)
    counts = np.diff(np.append(starts, len(first)))
    begin = first[starts]
    chars = counts * sum(words.lengths[begin + k] for k in range(size))
    best = np.zeros(len(total), np.int64)
    np.maximum.at(best, words.documents[begin], counts << 32 | np.minimum(chars, (1 << 32) - 1))
    return np.minimum((best & (1 << 32) - 1) / total, 1.0)


def _covered_share(words: Pieces, size: int, first: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Returns the share of a document's word characters covered by the n-grams that begin at
    `first`.
    """
    if not len(first):
        return np.zeros(len(total))
    covered = np.zeros(len(words), bool)
    for k in range(size):
        covered[first + k] = True
    where = np.flatnonzero(covered)
    return np.bincount(words.documents[where], words.lengths[where], minlength=len(total)) / total
