"""Decontamination: drops documents that hold texts of evaluation sets.

A document is contaminated by a text of a set when they share one n-gram of 13 words, or when it
holds 70 % of the text's different n-grams of 8 words (Brown et al. 2020, C; Touvron et al. 2023,
A.6), or when a passage of it is an edited copy: it has most of the text's words in the same order.
Words are compared folded (folding.py), punctuation and space do not matter. N-grams that many items
share are the set's template and prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base.errors import DataError
from megallm.curate.config import DecontaminateConfig, InputConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop
from megallm.curate.external import contains
from megallm.curate.readers import Reject, file_units, parse_unit
from megallm.curate.text import Analysis, Pieces
from megallm.data.text.readers import ReadOptions, bytes_of, chunks

_TEMPLATE_ITEMS = 10  # an n-gram of so many items, and of TEMPLATE_SHARE of them, is a template
_TEMPLATE_SHARE = 0.05
_FILTER_BITS = 22
_MAX_EXAMPLES = 5  # documents named for each text found
_SEED_WORDS = 5  # what is left between two edits of a copy
_SEED_SHARE = 0.15  # of an item's seeds that a document must hold, so that few pairs are aligned


class _Grams:
    """Sorted n-gram hashes, and for each the items that have it."""

    def __init__(self, texts: list[str], size: int) -> None:
        words = Analysis(texts).words
        hashes, first = words.ngrams(size)
        pairs = np.unique(
            np.stack([hashes, words.documents[first].astype(np.uint64)], axis=1), axis=0
        )
        hashes, counts = np.unique(pairs[:, 0], return_counts=True)
        template = hashes[(counts >= _TEMPLATE_ITEMS) & (counts >= _TEMPLATE_SHARE * len(texts))]
        pairs = pairs[~contains(template, pairs[:, 0])]
        self.hashes, self.begin, self.counts = np.unique(
            pairs[:, 0], return_index=True, return_counts=True
        )
        self.items = pairs[:, 1].astype(np.int64)
        self.sizes = np.bincount(self.items, minlength=len(texts))
        self._filter = np.zeros(
            1 << _FILTER_BITS, bool
        )  # says no to nearly every n-gram of clean text
        self._filter[self.hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions in `hashes`, numbers in `self.hashes`) of those that are ours."""
        maybe = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        maybe = maybe[contains(self.hashes, hashes[maybe])]
        return maybe, np.searchsorted(self.hashes, hashes[maybe])

    def owners(self, numbers: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns every (document, item) of n-grams found in documents."""
        counts = self.counts[numbers]
        shift = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(documents, counts), self.items[
            np.repeat(self.begin[numbers], counts) + shift
        ]


class _Passages:
    """Finds edited copies: seeds (n-grams between two edits) tell where to look, the longest
    common subsequence of words decides."""

    def __init__(self, texts: list[str], share: float) -> None:
        words = Analysis(texts).words
        self._words = np.split(words.hashes, words.offsets[1:-1])
        self._seeds = _Grams(texts, _SEED_WORDS)
        self._share = share

    def find(self, words: Pieces, known: dict[int, dict[int, str]]) -> Iterator[tuple[int, int]]:
        """Yields (document, item) of the copies that are not `known`."""
        hashes, first = words.ngrams(_SEED_WORDS)
        at, numbers = self._seeds.find(hashes)
        place, item = self._seeds.owners(numbers, first[at])
        seed = np.repeat(numbers, self._seeds.counts[numbers])
        pairs = np.stack([words.documents[place], item], axis=1)
        different = np.unique(np.column_stack([pairs, seed]), axis=0)[:, :2]
        both, counts = np.unique(different, axis=0, return_counts=True)
        for row, number in both[counts >= _SEED_SHARE * self._seeds.sizes[both[:, 1]]].tolist():
            if number not in known.get(row, {}):
                own = place[(pairs[:, 0] == row) & (pairs[:, 1] == number)]
                if self._is_copy(words, row, self._words[number], own):
                    yield row, number

    def _is_copy(self, words: Pieces, row: int, item: np.ndarray, places: np.ndarray) -> bool:
        """Returns whether the passage with the most seeds, which begin at `places`, has enough of
        the item's words in order."""
        size = len(item)
        last = np.searchsorted(places, places + size)
        begin = int((last - np.arange(len(places))).argmax())
        slack = max(2, size // 8)
        low = max(
            int(words.offsets[row]), int(places[last[begin] - 1]) + _SEED_WORDS - size - slack
        )
        high = min(int(words.offsets[row + 1]), int(places[begin]) + size + slack)
        return _in_order(item.tolist(), words.hashes[low:high].tolist()) >= self._share * size


def _in_order(item: list[int], passage: list[int]) -> int:
    """Returns the length of the longest common subsequence, 64 words and more at a time (Hyyrö
    2004, "Bit-parallel LCS-length computation revisited")."""
    masks: dict[int, int] = {}
    for place, word in enumerate(item):
        masks[word] = masks.get(word, 0) | 1 << place
    row = full = (1 << len(item)) - 1
    for word in passage:
        met = row & masks.get(word, 0)
        row = (row + met | row - met) & full
    return len(item) - row.bit_count()


class Decontaminate:
    """The step `decontaminate`; `names` are the texts of the sets as set:line:key."""

    name = "decontaminate"

    def __init__(self, config: DecontaminateConfig) -> None:
        self.config = config
        self.marks = {"decontaminate.coverage": (config.coverage,)}
        found = [
            (f"{path}:{line}:{key}", text)
            for path in config.sets
            for line, key, text in items(path, config.keys)
        ]
        lengths = Analysis([text for _, text in found]).words.counts
        self.num_texts = len(found)
        self.short = [
            name
            for (name, _), size in zip(found, lengths, strict=True)
            if size < config.coverage_ngram
        ]
        used = [
            pair for pair, size in zip(found, lengths, strict=True) if size >= config.coverage_ngram
        ]
        if not used:
            raise DataError(
                f"decontaminate.sets: no text of {', '.join(config.sets)} has the "
                f"{config.coverage_ngram} words that it takes to recognise it."
            )
        self.names = [name for name, _ in used]
        self._short_grams = _Grams([text for _, text in used], config.coverage_ngram)
        self._long_grams = _Grams([text for _, text in used], config.ngram)
        self._passages = (
            _Passages([text for _, text in used], config.edited) if config.edited else None
        )

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        words = batch.analysis.words
        hashes, first = words.ngrams(self.config.coverage_ngram)
        at, numbers = self._short_grams.find(hashes)
        coverage = np.zeros(len(batch))
        hits: dict[int, dict[int, str]] = {}
        if len(at):
            documents = words.documents[first[at]]
            pairs = np.unique(np.stack([documents, numbers], axis=1), axis=0)
            owner, item = self._short_grams.owners(pairs[:, 1], pairs[:, 0])
            both, counts = np.unique(np.stack([owner, item], axis=1), axis=0, return_counts=True)
            shares = counts / self._short_grams.sizes[both[:, 1]]
            np.maximum.at(coverage, both[:, 0], shares)
            for (row, number), share in zip(both.tolist(), shares.tolist(), strict=True):
                if share >= self.config.coverage:
                    hits.setdefault(row, {})[number] = "coverage"
            for row, number in self._long_hits(words, first[at]):
                hits.setdefault(row, {})[number] = "ngram"
        if self._passages is not None:
            for row, number in list(self._passages.find(words, hits)):
                hits.setdefault(row, {})[number] = "edited"
        batch.record("decontaminate.coverage", coverage)
        return [self._verdict(hits.get(row)) for row in range(len(batch))]

    def _long_hits(self, words: Pieces, first: np.ndarray) -> Iterator[tuple[int, int]]:
        """(document, item) that share a long n-gram; one can begin only where a short one was
        found.
        """
        size = self.config.ngram
        first = first[first + size <= len(words)]
        first = first[words.documents[first] == words.documents[first + size - 1]]
        at, numbers = self._long_grams.find(words.ngrams_at(first, size))
        owner, item = self._long_grams.owners(numbers, words.documents[first[at]])
        yield from sorted(set(zip(owner.tolist(), item.tolist(), strict=True)))

    def _verdict(self, hits: dict[int, str] | None) -> Verdict:
        if not hits:
            return KEEP
        reason = next(kind for kind in ("ngram", "coverage", "edited") if kind in hits.values())
        reason = f"contaminated_{reason}"
        return drop(reason, items=[self.names[number] for number in sorted(hits)])


def items(path: str, keys: tuple[str, ...]) -> Iterator[tuple[int, str, str]]:
    """Yields (line, key, text) of every text of a JSONL file of evaluation items. Errors:
    `DataError` with file:line.
    """
    if not Path(path).is_file():
        what = "is a pipe or a device" if Path(path).exists() else "does not exist"
        raise DataError(f"decontaminate.sets: {path} {what}; give JSONL files.")
    line = 0
    for chunk in chunks(path, ReadOptions(keys=("-",))):
        if chunk.rows is not None or chunk.too_long:
            raise DataError(
                f"decontaminate.sets: {path} must be JSONL (also .gz, .zst) with lines of at most "
                "64 MiB."
            )
        data = bytes_of(chunk)
        for raw in data.split(b"\n"):
            line += 1
            if raw.strip():
                yield from (
                    (line, key, text) for key, text in _texts_of(raw, keys, f"{path}:{line}")
                )
        line -= data.endswith(b"\n")


def _texts_of(raw: bytes, keys: tuple[str, ...], where: str) -> list[tuple[str, str]]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: an evaluation item is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: an evaluation item must be a JSON object.")
    missing = [key for key in keys if key not in value]
    if missing:
        raise DataError(f"{where}: the item has no key '{missing[0]}'; it has: {', '.join(value)}.")
    found: list[tuple[str, str]] = []
    stack: list[tuple[str, Any]] = [(key, value[key]) for key in reversed(keys or tuple(value))]
    while stack:
        key, one = stack.pop()
        if isinstance(one, str):
            found.append((key, one))
        elif isinstance(one, list):
            stack += [
                (f"{key}[{number}]", inner) for number, inner in reversed(list(enumerate(one)))
            ]
        elif isinstance(one, dict):
            stack += [(f"{key}.{name}", inner) for name, inner in reversed(list(one.items()))]
    return found


def report_of(step: Decontaminate, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns contamination.json: how many texts were looked for, which were too short, and where
    each was found.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in row["note"]["items"]:
            entry = found.setdefault(name, {"documents": 0, "examples": []})
            entry["documents"] += 1
            if len(entry["examples"]) < _MAX_EXAMPLES:
                entry["examples"].append(row["id"])
    return {
        "texts": step.num_texts, "too_short": step.short, "contaminated": len(found),
        "found": [{"text": name, **found[name]} for name in sorted(found)],
    }  # fmt: skip


def avoid_texts(names: Iterable[str]) -> Iterator[str]:
    """Yields the texts of JSONL files of any keys, for generators that must not repeat them."""
    config = InputConfig()
    for name in names:
        if Path(name).suffix in (".txt", ".md"):
            for item in (
                item for unit in file_units(name, config) for item in parse_unit(unit, config)
            ):
                if isinstance(item, Reject):
                    raise DataError(
                        f"{item.file}:{item.line}: {item.reason}: such texts could not be avoided."
                    )
                yield item.text
        else:
            yield from (text for _, _, text in items(name, ()))
