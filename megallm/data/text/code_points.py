"""Which code points gigatoken and `tokenizers` treat alike: each is tried with both at its first
sight.

How a text is split hangs on the class of each code point (letter, number, space, mark, capital,
...) in the tables of Unicode that a library was built with, and how it is normalised on its class
of combining. So both libraries get a tokenizer with the same normaliser and the same splitting, but
a vocabulary of bytes and of pairs in which every border between the code point and its neighbours
shows in the ids, and encode the code point in all contexts that tell classes apart. Nothing is
sampled: a code point that was not tried is tried before the text that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from megallm.data.text.byte_level import BYTE_SYMBOLS
from megallm.data.text.definition import dumps

_UNKNOWN, _ALIKE, _UNLIKE = 0, 1, 2
_ASCII = 128
_SURROGATES, _ASTRAL = 0xD800, 0x10000
# Beside a letter, itself, a digit, spaces, punctuation and line ends, in a contraction, before and
# behind a capital.
_CONTEXT = "a{c}a{c}{c}1{c}1 {c} {c}.{c}.\n{c}\n'{c}A{c}A"
_BESIDE = b"a1 .'\nA"
# Where text is normalised also before and behind combining marks of low and of high class, and what
# composes.
_MARKED = "\n{c}\u0301{c}\u0327\u0301a a\u0327{c} a\u0301{c} \u0345{c}\u0334 {c}a"


class SameSplits:
    """Tells texts on which the two libraries agree, as far as tables of code points go, from
    others.

    definition: of a BPE tokenizer. Errors: whatever the libraries raise for one that they cannot
    read.
    """

    def __init__(self, definition: dict[str, Any], module: Any) -> None:
        bare = dumps(
            {
                **definition,
                "added_tokens": [],
                "post_processor": None,
                "model": _small(definition["model"]),
            }
        )
        self._theirs, self._fast = (
            tokenizers.Tokenizer.from_str(bare),
            module.Tokenizer.from_json(bare),
        )
        self._context = _CONTEXT + _MARKED if definition.get("normalizer") else _CONTEXT
        self._theirs.no_truncation()
        self._theirs.no_padding()
        self._known = np.zeros(0x110000, np.uint8)
        self._try(np.arange(_ASCII))

    def unlike(self, texts: Sequence[str]) -> list[int]:
        """Returns the texts, by number, that hold a code point on which the two differ."""
        wide = [i for i, text in enumerate(texts) if not text.isascii()]
        if not wide:
            return [*range(len(texts))] if self._known[:_ASCII].max() > _ALIKE else []
        if self._worst("".join([texts[i] for i in wide])) == _ALIKE:
            return []
        return [i for i in wide if self._worst(texts[i]) != _ALIKE]

    def _worst(self, text: str) -> int:
        points = _points(text)
        known = self._known[points]
        if known.min(initial=_ALIKE) == _UNKNOWN:
            self._try(np.unique(points[known == _UNKNOWN]))
            known = self._known[points]
        return int(known.max(initial=_ALIKE))

    def _try(self, points: np.ndarray) -> None:
        tried = [self._context.replace("{c}", chr(point)) for point in points.tolist()]
        for point, text in zip(points.tolist(), tried, strict=True):
            theirs = self._theirs.encode(text, add_special_tokens=False).ids
            self._known[point] = _ALIKE if theirs == self._fast.encode(text).tolist() else _UNLIKE


def _points(text: str) -> np.ndarray:
    """Returns the code points of a text that are not ASCII, in their order."""
    units = np.frombuffer(text.encode("utf-16-le"), "<u2")
    units = units[units >= _ASCII]
    high = (units & 0xFC00) == _SURROGATES
    if not high.any():
        return units
    points = units.astype(np.int32)
    first = np.flatnonzero(high)
    points[first] = _ASTRAL + ((points[first] & 0x3FF) << 10) + (points[first + 1] & 0x3FF)
    return np.delete(points, first + 1)


def _small(model: dict[str, Any]) -> dict[str, Any]:
    """Returns a model of the same kind that shows every border: each byte, and each pair of one
    with a byte of a context.
    """
    fallback = bool(model.get("byte_fallback"))
    if fallback:  # there the vocabulary has whole characters
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        beside = ["▁", *map(chr, _BESIDE)]
        vocab = {
            name: i
            for i, name in enumerate([str(model.get("unk_token") or "<unk>"), *names, *beside])
        }
        pairs = [(a, b) for a in beside for b in beside]
    else:
        vocab = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
        beside = [BYTE_SYMBOLS[byte] for byte in _BESIDE]
        pairs = [pair for a in beside for b in BYTE_SYMBOLS for pair in ((a, b), (b, a))]
    merges = []
    for a, b in pairs:
        if a + b not in vocab:
            vocab[a + b] = len(vocab)
            merges.append([a, b])
    return {**model, "vocab": vocab, "merges": merges, "ignore_merges": False}
