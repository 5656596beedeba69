"""Modified Kneser-Ney against a second implementation written straight from the formulas, and against kenlm."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from megallm.base.errors import DataError, UsageError
from megallm.curate import kneser_ney
from megallm.curate.arpa import ArpaModel
from megallm.curate.config import PerplexityConfig
from megallm.curate.document import Document, DocumentBatch, Verdict
from megallm.curate.perplexity import Perplexity, load_scorer

LETTERS = "a b c d e f g".split()  # noqa: SIM905


def corpus(seed: int, lines: int) -> list[str]:
    chance = random.Random(seed)
    return ["\n".join(" ".join(chance.choices(LETTERS, range(7, 0, -1), k=chance.randint(1, 9))) for _ in range(lines))]


class Reference:
    """p(w | h) by recursion over dictionaries: Chen and Goodman 1998, section 3."""

    def __init__(self, texts: list[str], order: int) -> None:
        self.order = order
        sentences = [["<s>", *line.split(), "</s>"] for text in texts for line in text.split("\n") if line]
        raw: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
        for words in sentences:
            for size in range(1, order + 1):
                raw[size].update(tuple(words[k : k + size]) for k in range(len(words) - size + 1))
        self.counts: list[Counter[tuple[str, ...]]] = [Counter(), *raw[1:]]
        for size in range(1, order):
            left = Counter(gram[1:] for gram in raw[size + 1])
            self.counts[size] = Counter({g: raw[size][g] if g[0] == "<s>" else left[g] for g in raw[size]})
        del self.counts[1][("<s>",)]
        self.words = {gram[0] for gram in raw[1]} - {"<s>"} | {"<unk>"}
        self.discounts = [[0.0] * 4, *(self._discounts(self.counts[size]) for size in range(1, order + 1))]

    @staticmethod
    def _discounts(counts: Counter[tuple[str, ...]]) -> list[float]:
        t = Counter(counts.values())
        if not all(t[k] for k in (1, 2, 3, 4)):
            return [0.0, 0.5, 1.0, 1.5]
        y = t[1] / (t[1] + 2 * t[2])
        found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
        good = all(0 < value <= k for k, value in enumerate(found, 1))
        return [0.0, *(found if good else (0.5, 1.0, 1.5))]

    def p(self, word: str, history: tuple[str, ...]) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        size = len(history) + 1
        followers = {g[-1]: c for g, c in self.counts[size].items() if g[:-1] == history and c}
        lower = self.p(word, history[1:]) if history else 1 / len(self.words)
        total = sum(followers.values())
        if not total:
            return lower
        d = self.discounts[size]
        freed = sum(d[min(count, 3)] for count in followers.values()) / total
        count = followers.get(word, 0)
        return max(count - d[min(count, 3)], 0) / total + freed * lower


@pytest.mark.parametrize(("order", "lines", "seed"), [(1, 30, 1), (2, 40, 2), (3, 200, 3), (4, 60, 4), (3, 2, 5)])
def test_probabilities_equal_the_formulas_and_sum_to_one(tmp_path: Path, order: int, lines: int, seed: int) -> None:
    texts = corpus(seed, lines)
    kneser_ney.train_ngrams(texts, order).save(tmp_path / "m.arpa")
    model, reference = ArpaModel(tmp_path / "m.arpa"), Reference(texts, order)
    histories = [(), ("<s>",), ("a",), ("<s>", "a"), ("a", "b"), ("g", "g"), ("a", "b", "c"), ("<s>", "b", "a")]
    for history in histories:
        got = {word: 10 ** model.word(history, word) for word in reference.words}
        assert sum(got.values()) == pytest.approx(1, abs=1e-5)
        for word, value in got.items():
            assert value == pytest.approx(reference.p(word, history), rel=2e-5), (history, word)


def test_the_comparison_sees_a_wrong_discount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(3, 200)
    right = kneser_ney._discounts
    monkeypatch.setattr(kneser_ney, "_discounts", lambda adjusted: right(adjusted) * 0.5)
    kneser_ney.train_ngrams(texts, 3).save(tmp_path / "m.arpa")
    reference = Reference(texts, 3)
    model = ArpaModel(tmp_path / "m.arpa")
    worst = max(abs(10 ** model.word(("g", "a"), word) / reference.p(word, ("g", "a")) - 1) for word in reference.words)
    assert worst > 1e-2


def test_kenlm_reads_the_file_and_agrees(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm", reason="kenlm is not installed: pip install 'megallm[data]'")
    kneser_ney.train_ngrams(corpus(3, 200), 3).save(tmp_path / "m.arpa")
    ours, theirs = ArpaModel(tmp_path / "m.arpa"), kenlm.Model(str(tmp_path / "m.arpa"))
    assert theirs.order == 3
    for sentence in ("a b c", "g f e d", "", "a zebra b", "c c c c c c"):
        assert ours.score(sentence) == pytest.approx(theirs.score(sentence), abs=1e-4)


def test_rare_words_become_unknown(tmp_path: Path) -> None:
    kneser_ney.train_ngrams(["a a b b c\na b zzz"], 2, min_count=2).save(tmp_path / "m.arpa")
    words = {key[0] for key in ArpaModel(tmp_path / "m.arpa").table if len(key) == 1}
    assert words == {"<unk>", "<s>", "</s>", "a", "b"}
    with pytest.raises(UsageError, match="from 1 to 6"):
        kneser_ney.train_ngrams(["a"], 9)
    with pytest.raises(DataError, match="no text"):
        kneser_ney.train_ngrams([], 3)
    (tmp_path / "bad.arpa").write_text("nothing\n")
    with pytest.raises(DataError, match="no n-grams"):
        ArpaModel(tmp_path / "bad.arpa")


def test_the_step_tells_text_from_noise(tmp_path: Path) -> None:
    kneser_ney.train_ngrams(["the cat sat on the mat .\nthe dog sat on the log .\n" * 20], 3).save(tmp_path / "m.arpa")
    step = Perplexity(PerplexityConfig(model=str(tmp_path / "m.arpa"), max_perplexity=35, min_perplexity=1.01))
    texts = ["The cat sat on the log.", "log the the on mat dog", "qqq xxx www"]
    batch = DocumentBatch([Document(str(k), text, "f", k) for k, text in enumerate(texts)])
    verdicts = step.judge(batch)
    values = batch.metrics["perplexity.per_word"]
    assert values[0] < 4 < values[1] < 35 < values[2]
    assert [verdict.action for verdict in verdicts] == ["keep", "keep", "drop"]
    assert verdicts[2].reason == "perplexity_high"


def test_a_scorer_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(texts):\n    return [float(len(text)) for text in texts]\n")
    spec = f"{tmp_path}/mine.py:score"
    step = Perplexity(PerplexityConfig(scorer=spec, max_perplexity=5, min_perplexity=2))
    verdicts = step.judge(
        DocumentBatch([Document("a", "1234", "f", 1), Document("b", "123456", "f", 2), Document("c", "1", "f", 3)])
    )
    assert [verdict.reason for verdict in verdicts] == ["", "perplexity_high", "perplexity_low"]
    for wrong in ("mine.py", f"{tmp_path}/absent.py:score", f"{tmp_path}/mine.py:absent"):
        with pytest.raises(UsageError):
            load_scorer(wrong)
    (tmp_path / "short.py").write_text("def score(texts):\n    return [math.nan]\nimport math\n")
    with pytest.raises(DataError, match="one number a text"):
        Perplexity(PerplexityConfig(scorer=f"{tmp_path}/short.py:score")).judge(
            DocumentBatch([Document("a", "x", "f", 1)] * 2)
        )
    assert math.isnan(load_scorer(f"{tmp_path}/short.py:score")([])[0])


def scored(path: Path) -> list[Verdict]:
    step = Perplexity(PerplexityConfig(scorer=f"{path}:f"))
    return step.judge(DocumentBatch([Document("a", "one", "f", 1), Document("b", "two", "f", 2)]))


def test_a_scorer_that_fails_is_told_with_its_line(tmp_path: Path) -> None:
    """In its file, in its call, or by what it returns; infinity is a number that JSON cannot hold."""
    for number, (text, words) in enumerate(
        (
            ("def f(t:\n", "cannot be loaded: SyntaxError"),
            ("raise SystemExit(3)", r"SystemExit: 3 at .*\.py:1"), ("def g(t): return 1", "no function 'f'"),
            ("def f(t):\n    return t[99]", r"failed: IndexError: .* at .*\.py:2"),
            ("def f(t): return ['x'] * len(t)", "must return one number a text"),
            ("def f(t): return [[1], [2, 3]]", "must return one number"),
            ("def f(t): return []", "must return one number"),
            ("def f(t): return [float('nan')] * len(t)", "none that is NaN"),
        )
    ):  # fmt: skip
        path = tmp_path / f"s{number}.py"
        path.write_text(text)
        with pytest.raises((UsageError, DataError), match=words):
            scored(path)
    (tmp_path / "inf.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: float\n"
        "def f(t):\n    yield from [float('inf')] * len(t)\n"
    )
    verdict = scored(tmp_path / "inf.py")[0]
    assert verdict.reason == "perplexity_high"
    json.dumps(verdict.note, allow_nan=False)
