"""The chain as a whole: the same result at any number of workers and after kill -9, the ledger, bad input."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.errors import DataError, UsageError
from megallm.curate import run
from megallm.curate.config import CurateConfig, ExactConfig, InputConfig, PiiConfig, QualityConfig, ToxicityConfig

WORDS = [
    "the",
    "river",
    "of",
    "and",
    "to",
    "a",
    "in",
    "is",
    "that",
    "water",
    "stone",
    "mountain",
    "letter",
    "paper",
    "music",
    "garden",
    "winter",
    "summer",
    "morning",
    "evening",
    "people",
    "world",
    "answer",
    "question",
    "number",
    "house",
    "family",
    "story",
    "winter",
    "engine",
    "market",
    "harbour",
    "island",
    "forest",
    "bridge",
    "window",
]
STEPS = ("quality", "exact", "near", "pii")


def prose(seed: int, words: int = 120) -> str:
    """Sentences of random common words, a line each."""
    chance = random.Random(seed)
    lines = []
    while words > 0:
        size = chance.randint(8, 16)
        lines.append(" ".join(chance.choice(WORDS) for _ in range(size)).capitalize() + ".")
        words -= size
    return "\n".join(lines)


def write_jsonl(path: Path, rows: list[object]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def corpus(folder: Path) -> Path:
    """Six files with exact and near duplicates across them, poor texts, an address, bad lines."""
    raw = folder / "raw"
    raw.mkdir()
    for number in range(6):
        rows: list[object] = [{"text": prose(100 * number + k), "url": f"u{number}-{k}"} for k in range(12)]
        rows.append({"text": prose(5003)})  # again in every file
        rows.append({"text": prose(5007, 400).replace("river", "stream", 1 + number)})  # nearly the same
        rows.append({"text": "too short"})
        ending = (
            f"Write to reader{number}@mail.org today please, dear reader.\nPrinted by the museum for its summer guests."
        )
        rows.append({"text": f"{prose(900 + number)}\n{ending}"})
        rows.append("{broken")
        write_jsonl(raw / f"{number}.jsonl{'.gz' if number % 2 else ''}", rows)
    return raw


def config_of(raw: Path, **changes: object) -> CurateConfig:
    values: dict[str, object] = {
        "input": InputConfig(files=(str(raw),), keep_keys=("url",)), "steps": STEPS, "shard_mib": 0.001,
        "pii": PiiConfig(kinds=("email", "ip")),
        "quality": QualityConfig(limits={"newlines": 1.0, "mean_word_length_low": 2.0}, off=("top_2gram",)),
    }  # fmt: skip
    return CurateConfig(**(values | changes))  # type: ignore[arg-type]


def outputs(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in (run.STATS, run.LEDGER, run.REPORT)] + sorted((folder / run.KEPT).iterdir())
    return {path.name: path.read_bytes() for path in paths}


def kept(folder: Path) -> list[dict[str, object]]:
    rows = []
    for path in sorted((folder / run.KEPT).iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


def ledger(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / run.LEDGER).read_text("utf-8").splitlines()]


def test_every_document_has_its_row(tmp_path: Path) -> None:
    raw = corpus(tmp_path)
    stats = run.run(config_of(raw), tmp_path / "out")
    rows = ledger(tmp_path / "out")
    assert len(rows) == 6 * 17
    assert [(row["file"], row["line"]) for row in rows] == sorted((row["file"], row["line"]) for row in rows)
    reasons = {(row["step"], row["reason"]) for row in rows if row["action"] == "drop"}
    assert reasons == {
        ("quality", "too_few_words"), ("exact", "duplicate_document"), ("near", "near_duplicate"),
    }  # fmt: skip
    assert [row["line"] for row in rows if row["action"] == "reject"] == [17] * 6
    edited = [row for row in rows if row["action"] == "edit"]
    assert len(edited) == 6 and all(row["spans"][0][2:] == ["email", "pii"] for row in edited)  # type: ignore[index]
    assert (
        stats["totals"]["kept"] == len(kept(tmp_path / "out")) == sum(row["action"] in ("keep", "edit") for row in rows)
    )
    assert stats["steps"]["exact"]["dropped"] == {"duplicate_document": 5}
    assert stats["steps"]["near"]["dropped"] == {"near_duplicate": 5}
    assert all("@mail.org" not in str(row["text"]) for row in kept(tmp_path / "out"))
    assert sum("url" in row for row in kept(tmp_path / "out")) == 72
    # A dropped copy points at the document that stays.
    near = [row for row in rows if row["reason"] == "near_duplicate"]
    assert {row["note"]["of"] for row in near} <= {row["id"] for row in rows if row["action"] == "keep"}  # type: ignore[index]


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    raw = corpus(tmp_path)
    run.run(config_of(raw), tmp_path / "one")
    run.run(config_of(raw), tmp_path / "three", workers=3)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "three")
    assert not (tmp_path / "one" / "work").exists()


def test_small_memory_changes_nothing(tmp_path: Path) -> None:
    raw = corpus(tmp_path)
    steps = ExactConfig(paragraph=True, line=True, min_chars=20)
    order = ("quality", "near", "exact")
    run.run(config_of(raw, exact=steps, steps=order), tmp_path / "roomy")
    narrow = _Narrow(tmp_path)
    run.run(config_of(raw, exact=steps, steps=order, memory_mib=1), tmp_path / "tight")
    narrow.check()
    assert [row["text"] for row in kept(tmp_path / "roomy")] == [row["text"] for row in kept(tmp_path / "tight")]
    assert ledger(tmp_path / "roomy") == ledger(tmp_path / "tight")
    assert {"near_duplicate", "duplicate_line"} <= {str(row["reason"]) for row in ledger(tmp_path / "tight")}


class _Narrow:
    """Makes the scatter believe that memory is a thousandth of what it is told, and checks that it took many files."""

    def __init__(self, folder: Path) -> None:
        from megallm.curate import exact, external, near

        self.asked: list[int] = []
        self.patch = pytest.MonkeyPatch()
        real = external.parts_for

        def parts_for(total_bytes: int, memory_bytes: int) -> int:
            self.asked.append(real(total_bytes, memory_bytes // 1000))
            return self.asked[-1]

        self.patch.setattr(exact, "parts_for", parts_for)
        self.patch.setattr(near, "parts_for", parts_for)

    def check(self) -> None:
        self.patch.undo()
        assert max(self.asked) > 10


SCRIPT = """
import sys, time
from megallm.base import config as configs
from megallm.curate import run
from megallm.curate.config import CurateConfig
def slow(*_): time.sleep(0.2)
run.run(configs.load(CurateConfig, sys.argv[1]), sys.argv[2], workers=2, progress=slow)
"""


def test_kill_9_and_the_same_command_again(tmp_path: Path) -> None:
    from megallm.base import config as configs

    raw = corpus(tmp_path)
    config = config_of(raw)
    (tmp_path / "c.yaml").write_text(configs.to_yaml(config), "utf-8")
    run.run(config, tmp_path / "quiet")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c.yaml"), str(tmp_path / "killed")]
    work, kills = tmp_path / "killed" / "work", []
    for wanted in ("identity", "segment-0/000001", "decide-1", "segment-1/000001"):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 60
        while not (work / wanted).exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills.append(wanted)
        child.communicate()
    assert len(kills) >= 3, kills
    run.run(config, tmp_path / "killed")
    assert outputs(tmp_path / "quiet") == outputs(tmp_path / "killed")


def test_another_configuration_does_not_mix_in(tmp_path: Path) -> None:
    raw = corpus(tmp_path)
    first = run.run(config_of(raw), tmp_path / "out")
    assert run.run(config_of(raw), tmp_path / "out") == first
    with pytest.raises(UsageError, match="--overwrite"):
        run.run(config_of(raw, steps=("quality",)), tmp_path / "out")
    assert run.run(config_of(raw, steps=("quality",)), tmp_path / "out", fresh=True) != first
    (tmp_path / "part" / "work").mkdir(parents=True)
    (tmp_path / "part" / "work" / "identity").write_text("another")
    with pytest.raises(UsageError, match="unfinished run of another configuration"):
        run.run(config_of(raw), tmp_path / "part")


def test_unusable_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        run.run(config_of(tmp_path / "absent"), tmp_path / "out")
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "blank.jsonl", [{"text": ""}, {"text": "  \n"}])
    write_jsonl(tmp_path / "bad.jsonl", [{"text": prose(1)}, "{", "[]", "3"])
    for name, words in (
        ("empty", "no usable text"),
        ("blank", "2 empty documents"),
        ("bad", r"3 of 4 lines.*bad.jsonl:2"),
    ):
        with pytest.raises(DataError, match=words):
            run.run(config_of(tmp_path / f"{name}.jsonl"), tmp_path / name)
    stop = config_of(tmp_path, input=InputConfig(files=(str(tmp_path / "bad.jsonl"),), on_error="stop"))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not valid JSON"):
        run.run(stop, tmp_path / "stopped")


def test_configuration_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run.run(CurateConfig(steps=("quality", "nearly", "quality", "classifier", "perplexity")), tmp_path)
    text = str(caught.value)
    for words in ("'nearly' is not a step", "named twice", "classifier.model", "perplexity.model", "input.files"):
        assert words in text


def test_other_models_lists_and_sets_are_another_run(tmp_path: Path) -> None:
    raw, words = corpus(tmp_path), tmp_path / "words.txt"
    words.write_text("xyzzy\n")
    config = config_of(raw, steps=("toxicity",), toxicity=ToxicityConfig(words=str(words), score=False))
    first = run.run(config, tmp_path / "out")
    assert run.run(config, tmp_path / "out") == first
    words.write_text("harbour\n")
    with pytest.raises(UsageError, match="another configuration or input"):
        run.run(config, tmp_path / "out")


def test_a_kill_while_publishing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each renaming of the run: the same command ends with the same files and no others."""

    class Killed(BaseException):
        pass

    raw = tmp_path / "raw"
    raw.mkdir()
    write_jsonl(raw / "a.jsonl", [{"text": prose(1)}, {"text": prose(1)}, {"text": prose(2)}])
    config, replace, renamed = config_of(raw), os.replace, []
    rename = Path.replace

    def go(name: str, last: int = 0) -> None:
        def counted(do: object, *paths: object) -> object:
            renamed.append(paths)
            if len(renamed) == last:
                raise Killed
            return do(*paths)  # type: ignore[operator]

        renamed.clear()
        monkeypatch.setattr(os, "replace", lambda *paths: counted(replace, *paths))
        monkeypatch.setattr(Path, "replace", lambda *paths: counted(rename, *paths))
        run.run(config, tmp_path / name)

    def names(name: str) -> list[str]:
        return sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))

    go("quiet")
    total = len(renamed)
    assert total > 8
    for last in range(1, total + 1):
        with pytest.raises(Killed):
            go(f"k{last}", last)
        go(f"k{last}")
        assert outputs(tmp_path / f"k{last}") == outputs(tmp_path / "quiet") and names(f"k{last}") == names("quiet")
    (tmp_path / "quiet" / "work").mkdir()  # killed after its last file, before it tidied up
    (tmp_path / "quiet" / f"{run.LEDGER}.tmp-1-ab").write_text("half")
    go("quiet")
    assert names("quiet") == names("k1")
