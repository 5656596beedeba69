"""N-gram language models with interpolated modified Kneser-Ney smoothing, written as ARPA files.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), with
the adjusted counts and the closed form of the discounts as in Heafield et al., "Scalable Modified
Kneser-Ney Language Model Estimation" (2013). An n-gram is known by the number of its prefix and its
last word, so that counting is sorting; everything is held in memory, about 100 bytes a token at
order 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from megallm.base.errors import DataError, UsageError
from megallm.base.files import atomic_path, writing

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
_SPECIAL = (UNKNOWN, BEGIN, END)  # numbers 0, 1, 2
_MARKS = re.compile(r"([^\w\s])")
_DIGITS = re.compile(r"\d+")
_FALLBACK = (0.5, 1.0, 1.5)  # discounts of counts 1, 2, 3+ where the counts of counts give none
_MAX_ORDER = 6
_NO_PROBABILITY = -99.0  # of <s>, which is never predicted


def sentences(text: str) -> list[str]:
    """Returns the lines of a text as the model sees them: lower case, marks apart, every number
    0.
    """
    low = _MARKS.sub(r" \1 ", _DIGITS.sub("0", text.lower()))
    return [line for raw in low.split("\n") if (line := " ".join(raw.split()))]


@dataclass
class _Order:
    """The different n-grams of one length: number of the prefix and of the suffix among the shorter
    ones, last word, how often the n-gram occurs, and its adjusted count."""

    prefix: np.ndarray
    suffix: np.ndarray
    last: np.ndarray
    count: np.ndarray
    starts: np.ndarray  # does it begin with <s>
    adjusted: np.ndarray
    probability: np.ndarray
    backoff: np.ndarray


def train_ngrams(texts: Iterable[str], order: int = 3, min_count: int = 1) -> Model:
    """Count and smooth. Words seen fewer than `min_count` times become <unk>. Errors: `UsageError`,
    `DataError`.
    """
    if not 1 <= order <= _MAX_ORDER:
        raise UsageError(f"--order is {order}; it must be from 1 to {_MAX_ORDER}.")
    words, ids = _numbered(texts, min_count)
    if len(ids) < 4:
        raise DataError("There is no text to train a language model on.")
    levels = _count(ids, order, len(words))
    _adjust(levels)
    _smooth(levels, len(words))
    return Model(words, levels)


def _numbered(texts: Iterable[str], min_count: int) -> tuple[list[str], np.ndarray]:
    """Returns the vocabulary, and the corpus as word numbers with <s> and </s> around every
    line.
    """
    numbers: dict[str, int] = {word: number for number, word in enumerate(_SPECIAL)}
    pieces: list[np.ndarray] = []
    for text in texts:
        found: list[int] = []
        for line in sentences(text):
            found.append(1)
            found += [
                numbers.setdefault(word, len(numbers))
                for word in line.split()
                if word not in _SPECIAL
            ]
            found.append(2)
        pieces.append(np.array(found, np.int64))
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    counts = np.bincount(ids, minlength=len(numbers))
    kept = counts >= min_count
    kept[:3] = True
    new = np.where(kept, np.cumsum(kept) - 1, 0)
    return [word for word, number in numbers.items() if kept[number]], new[ids]


def _count(ids: np.ndarray, order: int, vocabulary: int) -> list[_Order]:
    inside = np.cumsum(ids == 1)  # the number of the sentence
    at = ids.copy()  # the number of the n-gram that begins here, among those of its length
    levels = []
    for size in range(1, order + 1):
        first = np.arange(len(ids) - size + 1)
        first = first[inside[first] == inside[first + size - 1]]
        if size == 1:
            keys, here = ids[first], np.arange(vocabulary)
            count = np.bincount(keys, minlength=vocabulary)
            prefix, suffix, last = (
                np.zeros(vocabulary, np.int64),
                np.zeros(vocabulary, np.int64),
                here,
            )
            starts = here == 1
            numbers = keys
        else:
            keys = at[first] * vocabulary + ids[first + size - 1]
            unique, example, numbers, count = np.unique(
                keys, return_index=True, return_inverse=True, return_counts=True
            )
            prefix, last = unique // vocabulary, unique % vocabulary
            suffix, starts = at[first[example] + 1], ids[first[example]] == 1
        at = np.full(len(ids), -1, np.int64)
        at[first] = numbers
        zeros = np.zeros(len(count))
        levels.append(
            _Order(prefix, suffix, last, count, starts, count.copy(), zeros, zeros.copy())
        )
    return levels


def _adjust(levels: list[_Order]) -> None:
    """Below the highest order a count is of different words to the left, but for what begins a
    sentence.
    """
    for level, above in zip(levels[:-1], levels[1:], strict=True):
        left = np.bincount(above.suffix, minlength=len(level.count))
        level.adjusted = np.where(level.starts, level.count, left)
    levels[0].adjusted[1] = 0  # <s> is given, never predicted


def _discounts(adjusted: np.ndarray) -> np.ndarray:
    """Discounts of the adjusted counts 0, 1, 2, 3 and more, float64 [4]."""
    t = [int((adjusted == k).sum()) for k in range(5)]
    if min(t[1:5]) == 0:
        return np.array([0.0, *_FALLBACK])
    y = t[1] / (t[1] + 2 * t[2])
    found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
    bad = any(not 0 < value <= k for k, value in enumerate(found, start=1))
    return np.array([0.0, *(_FALLBACK if bad else found)])


def _smooth(levels: list[_Order], vocabulary: int) -> None:
    lower: _Order | None = None
    for level in levels:
        discount = _discounts(level.adjusted)[np.minimum(level.adjusted, 3)]
        contexts = 1 if lower is None else len(lower.count)
        total = np.bincount(level.prefix, level.adjusted, minlength=contexts)
        freed = np.bincount(level.prefix, discount, minlength=contexts) / np.maximum(total, 1)
        own = (level.adjusted - discount) / np.maximum(total, 1)[level.prefix]
        if lower is None:
            level.probability = own + freed[0] / (vocabulary - 1)  # uniform over all words but <s>
            level.probability[1] = 0.0
        else:
            lower.backoff = np.where(total > 0, freed, 1.0)
            level.probability = own + freed[level.prefix] * lower.probability[level.suffix]
        lower = level


class Model:
    """A trained model: `words` by number and one `_Order` for each length."""

    def __init__(self, words: list[str], levels: list[_Order]) -> None:
        self.words, self.levels = words, levels

    def save(self, path: str | Path) -> None:
        """Write an ARPA file, whole or not at all: log10 probabilities and backoffs."""
        with (
            writing(path),
            atomic_path(path) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            file.write("\\data\\\n")
            for size, level in enumerate(self.levels, start=1):
                file.write(f"ngram {size}={len(level.count)}\n")
            texts: list[str] = []
            for size, level in enumerate(self.levels, start=1):
                texts = self._write(file, size, level, texts)
            file.write("\n\\end\\\n")

    def _write(self, file: TextIO, size: int, level: _Order, shorter: list[str]) -> list[str]:
        last = [self.words[number] for number in level.last.tolist()]
        if size == 1:
            texts = last
        else:
            texts = [
                f"{shorter[p]} {word}" for p, word in zip(level.prefix.tolist(), last, strict=True)
            ]
        file.write(f"\n\\{size}-grams:\n")
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log10(level.probability), _NO_PROBABILITY).tolist()
            backs = np.log10(level.backoff).tolist() if size < len(self.levels) else None
        if backs is None:
            file.writelines(f"{log:.7f}\t{text}\n" for log, text in zip(logs, texts, strict=True))
        else:
            backs = [0.0 if not np.isfinite(value) else value for value in backs]
            file.writelines(
                f"{log:.7f}\t{text}\t{back:.7f}\n"
                for log, text, back in zip(logs, texts, backs, strict=True)
            )
        return texts
