"""How much of each document repeats itself: lines, paragraphs and word n-grams (Rae et al. 2021, "Scaling Language
Models: Methods, Analysis & Insights from Training Gopher", table A1).

A repetition is a second or later occurrence inside the document. Characters that several repeated
n-grams share are counted once. Shares are of the characters that are not space.
"""

from __future__ import annotations

import numpy as np

from megallm.curate.text import SPACE, Analysis, Pieces, mix, segment_sums

TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
_POSITION_BITS = 20  # a batch has fewer pieces than this; the other 44 bits of the sorted word are hash


def repeated(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each piece: is it a second or later occurrence in its document, and does it occur twice at all. Two bool [n].

    The place of a piece rides in the low bits of the sorted word, so one plain sort does it.
    """
    size = len(hashes)
    later, shared = np.zeros(size, bool), np.zeros(size, bool)
    if size < 2:
        return later, shared
    keys = mix(hashes + documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    if size >= 1 << _POSITION_BITS:
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
    else:
        packed = np.sort((keys & ~np.uint64((1 << _POSITION_BITS) - 1)) | np.arange(size, dtype=np.uint64))
        order = (packed & np.uint64((1 << _POSITION_BITS) - 1)).astype(np.int64)
        same = (packed[1:] ^ packed[:-1]) < np.uint64(1 << _POSITION_BITS)
    later[order[1:][same]] = True
    shared[order[1:][same]] = True
    shared[order[:-1][same]] = True
    return later, shared


def duplicate_pieces(pieces: Pieces, ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of a document's lines (paragraphs) that are repeats, and the share of its characters in them."""
    later, _ = repeated(pieces.hashes, pieces.documents)
    count = segment_sums(later, pieces.offsets) / np.maximum(pieces.counts, 1)
    chars = segment_sums(np.where(later, pieces.lengths, 0), pieces.offsets) / np.maximum(ink, 1)
    return count, np.minimum(chars, 1.0)


def word_repetition(analysis: Analysis) -> dict[str, np.ndarray]:
    """`top_{2,3,4}gram` and `dup_{5..10}gram` of every document, float64 [documents]."""
    words = analysis.words
    total = np.maximum(segment_sums(words.lengths, words.offsets), 1)
    out: dict[str, np.ndarray] = {}
    first: np.ndarray | None = None  # where an n-gram that occurs twice begins; a longer one begins nowhere else
    for size in (*TOP, *DUPLICATE):
        if first is None:
            hashes, first = words.ngrams(size)
        else:
            inside = first + size - 1 < len(words)
            first = first[inside]
            first = first[words.documents[first] == words.documents[first + size - 1]]
            hashes = words.ngrams_at(first, size)
        documents = words.documents[first]
        later, shared = repeated(hashes, documents)
        if size in TOP:
            out[f"top_{size}gram"] = _top_share(words, size, first[shared], hashes[shared], total)
        else:
            out[f"dup_{size}gram"] = _covered_share(words, size, first[later], total)
        first = first[shared]
    return out


def _top_share(words: Pieces, size: int, first: np.ndarray, hashes: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The share of a document's word characters in its most frequent n-gram (that occurs at least twice)."""
    out = np.zeros(len(total))
    if not len(first):
        return out
    documents = words.documents[first]
    keys = mix(hashes + documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    _, example, count = np.unique(keys, return_index=True, return_counts=True)
    begin = first[example]
    length = sum(words.lengths[begin + k] for k in range(size))
    chars = length * count
    # Of two equally frequent n-grams the longer counts.
    order = np.lexsort((chars, count, documents[example]))
    document = documents[example][order]
    last = np.concatenate([document[1:] != document[:-1], [True]])
    out[document[last]] = chars[order][last]
    return np.minimum(out / total, 1.0)


def _covered_share(words: Pieces, size: int, first: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The share of a document's word characters covered by the n-grams that begin at `first`."""
    depth = np.zeros(len(words) + 1, np.int32)
    np.add.at(depth, first, 1)
    np.subtract.at(depth, first + size, 1)
    covered = np.cumsum(depth[:-1]) > 0
    return segment_sums(np.where(covered, words.lengths, 0), words.offsets) / total


def ink_counts(analysis: Analysis) -> np.ndarray:
    """Characters of each document that are not space."""
    return segment_sums((analysis.kinds & SPACE) == 0, analysis.starts)
