"""D.27: 60 evaluation items planted into running text, disguised or edited, are all found, and
clean text is left."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megallm.base.errors import UsageError
from megallm.curate.config import CurateConfig, DecontaminateConfig, InputConfig, check_config
from megallm.curate.decontaminate import Decontaminate, _in_order
from megallm.curate.document import Document, DocumentBatch, Verdict

from .test_chain import prose
from .test_folding import DISGUISES, PUNCTUATION

ITEMS = 60


def items_of(words: int) -> list[str]:
    return [prose(7000 + number, words).replace("\n", " ") for number in range(ITEMS)]


def step_of(folder: Path, items: list[str], **changes: float) -> Decontaminate:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    return Decontaminate(DecontaminateConfig(sets=(str(path),), **changes))  # type: ignore[arg-type]


def judged(step: Decontaminate, texts: list[str]) -> list[Verdict]:
    return step.judge(DocumentBatch([Document(str(k), text, "f", k + 1, k) for k, text in enumerate(texts)]))


def planted(texts: list[str]) -> list[str]:
    return [f"{prose(2 * k, 60)}\n{text}\n{prose(2 * k + 1, 60)}" for k, text in enumerate(texts)]


@pytest.mark.parametrize("name", [*DISGUISES, *PUNCTUATION])
def test_disguised_items(name: str, tmp_path: Path) -> None:
    items = items_of(16)
    disguise = (DISGUISES | PUNCTUATION)[name]
    verdicts = judged(step_of(tmp_path, items), planted([disguise(item) for item in items]))
    assert sum(verdict.action == "drop" for verdict in verdicts) == ITEMS
    reverse = judged(step_of(tmp_path, [disguise(item) for item in items]), planted(items))  # the set is written so
    assert sum(verdict.action == "drop" for verdict in reverse) == ITEMS


def changed(item: str, places: list[int]) -> str:
    words = item.split()
    for place in places:
        words[place] = "zebra"
    return " ".join(words)


EDITS: dict[str, Callable[[str], str]] = {
    "one middle word": lambda item: changed(item, [len(item.split()) // 2]),
    "two words": lambda item: changed(item, [len(item.split()) // 3, 2 * len(item.split()) // 3]),
    "a word put in": lambda item: item.replace(" ", " indeed ", 9).replace(" indeed ", " ", 8),
    "a word left out": lambda item: " ".join(item.split()[:8] + item.split()[9:]),
    "two words swapped": lambda item: " ".join([*item.split()[:8], *item.split()[9:7:-1], *item.split()[10:]]),
    "the end left out": lambda item: " ".join(item.split()[: int(0.9 * len(item.split()))]),
}


@pytest.mark.parametrize("name", list(EDITS))
def test_edited_items(name: str, tmp_path: Path) -> None:
    """With one changed middle word 19 of 60 were found."""
    items = items_of(18)
    verdicts = judged(step_of(tmp_path, items), planted([EDITS[name](item) for item in items]))
    assert sum(verdict.action == "drop" for verdict in verdicts) == ITEMS
    for number, verdict in enumerate(verdicts):
        assert any(name.endswith(f":{number + 1}:question") for name in verdict.note["items"])
    off = judged(step_of(tmp_path, items, edited=0.0), planted([EDITS["one middle word"](item) for item in items]))
    assert sum(verdict.action == "drop" for verdict in off) < ITEMS // 2


def test_clean_text_and_other_questions_are_left(tmp_path: Path) -> None:
    """Text of the same 36 words, items with half of their words changed, and questions that only
    begin alike."""
    items = items_of(18)
    step = step_of(tmp_path, items)
    clean = [prose(20_000 + number, 300) for number in range(100)]
    half = [changed(item, list(range(0, len(item.split()), 2))) for item in items]
    alike = [" ".join(item.split()[:8]) + " " + prose(900 + k, 14) for k, item in enumerate(items)]
    for texts in (clean, planted(half), planted(alike)):
        assert [verdict.action for verdict in judged(step, texts)] == ["keep"] * len(texts)


def test_the_longest_common_subsequence() -> None:
    chance = random.Random(0)
    for _ in range(200):
        one = chance.choices(range(6), k=chance.randint(1, 90))
        two = chance.choices(range(6), k=chance.randint(0, 90))
        row = [0] * (len(two) + 1)
        for a in one:
            before = row[:]
            for k, b in enumerate(two):
                row[k + 1] = before[k] + 1 if a == b else max(before[k + 1], row[k])
        assert _in_order(one, two) == row[-1]


def test_the_share_is_checked(tmp_path: Path) -> None:
    for value in (-1.0, 0.2, 1.5):
        config = CurateConfig(InputConfig((str(tmp_path),)), decontaminate=DecontaminateConfig(edited=value))
        with pytest.raises(UsageError, match=r"decontaminate\.edited is .* from 0\.5 to 1\.0"):
            check_config(config)
    check_config(CurateConfig(InputConfig((str(tmp_path),)), decontaminate=DecontaminateConfig(edited=0.0)))
