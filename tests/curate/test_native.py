"""The C++ extension and its numpy twins give the same words, lines, n-grams, repetition, MinHash values and keys."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base import extension
from megallm.curate import chain, exact, near, quality, run
from megallm.curate.document import Document
from megallm.curate.text import Analysis

from .test_chain import config_of, corpus, outputs, prose

PARTS = [
    "the quick brown fox", "the quick brown fox jumps over it", "a", "...", "…", "#", "x.y.z", "é", "漢字かな", "ไทย",
    "Σ", "İ", "_", "12", "\t", " ", "  \r", "\n", "\n\n", "\n \n", "\x85", "\u2028", "\u3000", "\u00a0", "🙂", "- item",
    "end.", "\x1c", "e\u0301", '"', "\\", "\x08", "\x1f", "\x7f", "\ufeff",
]  # fmt: skip
TEXTS = st.lists(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), min_size=1, max_size=5)


@contextmanager
def using(module: ModuleType | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_load", lambda: (module, ""))
        yield


def both(module: ModuleType, function: Callable[[], object]) -> None:
    """The function's value is the same with and without the extension, types of integers aside."""
    with using(None):
        wanted = function()
    with using(module):
        found = function()
    np.testing.assert_equal(found, wanted)


def analysed(texts: list[str]) -> dict[str, object]:
    analysis = Analysis(texts)
    words, lines = analysis.words, analysis.lines
    pieces = {"words": words, "lines": lines, "paragraphs": analysis.paragraphs}
    found: dict[str, object] = {"classes": analysis.word_classes, "characters": analysis.characters}
    for name, piece in pieces.items():
        found |= {f"{name} {key}": getattr(piece, key) for key in ("begin", "end", "offsets", "hashes", "documents")}
    return found | {f"{size}-grams": words.ngrams(size) for size in (1, 2, 5, 13)}


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_pieces_and_metrics(compiled: ModuleType, texts: list[str]) -> None:
    both(compiled, lambda: analysed(texts))
    both(compiled, lambda: quality.measure(Analysis(texts), texts, [None] * len(texts)))


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_keys_and_rows(compiled: ModuleType, texts: list[str]) -> None:
    both(compiled, lambda: [exact.key_of(text) for text in texts])
    both(compiled, lambda: [chain.kept_row(Document("a\ud800", text, "f", 1, meta={"id": 5})) for text in texts])
    with using(compiled):
        rows = [json.loads(chain.kept_row(Document("d", text, "f", 1, meta={"id": 5, "k": [1]}))) for text in texts]
    assert rows == [{"id": "d", "text": text, "file": "f", "line": 1, "k": [1]} for text in texts]


def test_repetition_of_long_texts(compiled: ModuleType) -> None:
    chance = random.Random(4)
    words = [chance.choice(["red", "blue", "ok", "longer"]) for _ in range(3000)]
    texts = [" ".join(words[:size]) for size in (0, 1, 2, 9, 10, 11, 300, 3000)] + [prose(3), "x " * 500]
    both(compiled, lambda: quality.measure(Analysis(texts), texts, [None] * len(texts)))


def test_minhash(compiled: ModuleType) -> None:
    values = np.random.RandomState(0).randint(0, 2**32, 5000, dtype=np.uint64).astype(np.uint32)
    offsets = np.array([0, 1, 8, 9, 1000, 5000])
    both(compiled, lambda: near.band_hashes(values, offsets, 14, 8))
    with using(compiled):
        swapped = near.band_hashes(values[::-1].copy(), np.array([0, 4000, 4991, 4992, 4999, 5000]), 14, 8)
        assert (near.band_hashes(values, offsets, 14, 8)[::-1] == swapped).all()


def test_what_would_read_outside_is_refused(compiled: ModuleType) -> None:
    one, far = np.zeros(1, np.uint64), np.array([0, 9])
    for call in (
        lambda: compiled.words(np.zeros(2, np.uint32), np.zeros(1, np.uint8), 3),
        lambda: compiled.lines(np.zeros(2, np.uint32), np.zeros(1, np.uint8), far),
        lambda: compiled.characters(np.zeros(2, np.uint32), np.zeros(1, np.uint8), far),
        lambda: compiled.hashes(np.zeros(2, np.uint32), np.array([0]), np.array([3]), 3),
        lambda: compiled.ngrams(one, far, 2),
        lambda: compiled.repetition(one, np.array([0]), np.array([1]), far),
        lambda: compiled.duplicates(one, np.array([0]), np.array([1]), far),
        lambda: compiled.bands(np.zeros(1, np.uint32), far, np.ones((8, 2), np.uint32), 8),
    ):
        with pytest.raises(ValueError):
            call()


def test_a_whole_run(compiled: ModuleType, tmp_path: Path) -> None:
    config = config_of(corpus(tmp_path), exact=exact.ExactConfig(paragraph=True, line=True))
    for name, module in (("twin", None), ("native", compiled)):
        chain.chain_of.cache_clear()
        with using(module):
            run.run(config, tmp_path / name)
    assert outputs(tmp_path / "twin") == outputs(tmp_path / "native")
