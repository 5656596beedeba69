"""Issue R, A.6: going on under another run. What makes it another one is refused, all the rest is said in one table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from megallm.base.config import load
from megallm.base.errors import UsageError
from megallm.data.indexed import content, split_merge
from megallm.data.indexed import dataset as indexed
from megallm.parallel.mesh import Mesh
from megallm.run.changes import Change, table_of
from megallm.run.runfolder import RunFolder
from megallm.training import pretrain
from megallm.training.config import PretrainConfig
from megallm.training.pretrain_identity import PretrainIdentity
from megallm.training.resuming import check_allowed
from megallm.training.validate import check
from tests.system.commands import make_corpus, rows_of, write_config


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, str]:
    """Two corpora."""
    return tuple(make_corpus(tmp_path_factory.mktemp(f"corpus{seed}"), seed) for seed in (0, 1))


def copy_corpus(source: str, target: Path) -> str:
    for suffix in ("bin", "idx", "meta.json"):
        shutil.copy2(f"{source}.{suffix}", f"{target}.{suffix}")
    return str(target)


@pytest.fixture
def config(tmp_path, made) -> Path:
    """A run of 3 steps out of 24 on its own copy of the data."""
    prefix = copy_corpus(made[0], tmp_path / "d")
    run = {"dir": str(tmp_path / "run")}
    path = write_config(tmp_path / "c.yaml", prefix, run=run, train={"steps": 24}, checkpoint={"every": 0})
    train(path, "train.stop_at=3")
    return path


def train(path: Path, *overrides: str, allowed: tuple[str, ...] = ()) -> None:
    settings = check(load(PretrainConfig, str(path), list(overrides)), None, None)
    pretrain.run(settings, Mesh.single(), "auto", allowed=allowed)


def last_event(path: Path, kind: str) -> dict:
    rows = map(json.loads, (path.parent / "run/events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == kind][-1]


def last_step(path: Path) -> int:
    return rows_of(path.parent / "run")[-1]["step"]


def test_a6_everything_that_changed_stands_in_one_table_and_in_the_events(config, capsys):
    """seq_len, batch, steps 24 -> 1000, lr x100, weight decay: said, not silent."""
    capsys.readouterr()
    train(config, "data.seq_len=16", "train.global_batch=8", "train.steps=1000", "optim.lr=0.3",
          "optim.weight_decay=0.5", "log.every=2", "train.stop_at=5")  # fmt: skip
    shown = capsys.readouterr().out
    wanted = {
        "data.seq_len": (32, 16), "train.global_batch": (4, 8), "train.steps": (24, 1000), "optim.lr": (0.003, 0.3),
        "optim.weight_decay": (0.1, 0.5), "log.every": (1, 2), "train.stop_at": (3, 5),
    }  # fmt: skip
    table = shown[shown.index("changed since the last start") :]
    for key, (before, now) in wanted.items():
        assert f"  {key}: run.yaml {before!r}, configuration {now!r}" in table
    told = {change["key"]: (change["before"], change["now"]) for change in last_event(config, "changed")["changes"]}
    assert {key: list(value) for key, value in wanted.items()} == {key: list(value) for key, value in told.items()}
    assert last_step(config) == 5
    train(config, "data.seq_len=16", "train.global_batch=8", "train.steps=1000", "optim.lr=0.3",
          "optim.weight_decay=0.5", "log.every=2", "train.stop_at=5")  # fmt: skip
    assert "changed since" not in capsys.readouterr().out, "nothing changed this time"


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a6_one_changed_token_is_noticed(config, place):
    """Sampling 64 blocks missed it in 173 of 200 tries; the hash covers all bytes."""
    path = config.parent / "d.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[place] ^= 1
    tokens.tofile(path)
    with pytest.raises(UsageError, match=r"(?s)\* data\.content of .*--allow-change data\.content\.") as caught:
        train(config)
    assert "the rest may change" in str(caught.value).lower() and last_step(config) == 3
    train(config, "train.stop_at=4", allowed=("data.content",))
    assert last_event(config, "changed")["changes"][0]["key"].startswith("data.content of ")
    train(config, "train.stop_at=5")
    assert last_step(config) == 5, "the new content is this run's from now on"


def test_a6_other_files_moved_over_the_old_with_an_older_time(config, made):
    """Same prefix, other text; the time of change is that of the other files, before the run began."""
    for suffix in ("bin", "idx"):
        shutil.copy2(f"{made[1]}.{suffix}", config.parent / f"d.{suffix}")
    with pytest.raises(UsageError, match=r"data\.content"):
        train(config)
    train(config, "train.stop_at=5", allowed=("data",))
    assert last_step(config) == 5


def test_a6_files_that_were_touched_moved_or_rewritten_alike_are_the_same(config, tmp_path):
    os.utime(config.parent / "d.bin", (1, 1))
    train(config, "train.stop_at=4")
    for suffix in ("bin", "idx", "meta.json"):
        (config.parent / f"d.{suffix}").rename(tmp_path / f"moved.{suffix}")
    text = config.read_text().replace(str(config.parent / "d"), str(tmp_path / "moved"))
    config.write_text(text)
    train(config, "train.stop_at=5")
    assert last_step(config) == 5 and [c["key"] for c in last_event(config, "changed")["changes"]] == [
        "data.sources", "train.stop_at",
    ]  # fmt: skip


def test_a6_another_tokenizer_of_data_without_a_side_car(config, tmp_path):
    """Files of Megatron-LM tell nothing: the run remembers which tokenizer it was begun with."""
    (config.parent / "d.meta.json").unlink()
    folder = tmp_path / "other"
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"\* data\.tokenizer: checkpoint 'bytes-257'"):
        train(config, f"data.tokenizer={folder}")
    train(config, f"data.tokenizer={folder}", "train.stop_at=4", allowed=("data.tokenizer",))
    assert (config.parent / "run/tokenizer/tokenizer.json").exists() and last_step(config) == 4


def test_a6_seed_split_and_precision_are_refused_and_pass_when_allowed(config):
    changed = ("data.seed=7", "data.split='80,20,0'", "train.precision=bf16", "run.seed=5")
    with pytest.raises(UsageError) as caught:
        train(config, *changed)
    starred = [line.split(":")[0][2:] for line in str(caught.value).splitlines() if line.startswith("* ")]
    assert starred == ["train.precision", "run.seed", "data.split", "data.seed"]
    assert "--allow-change train.precision" in str(caught.value)
    train(config, *changed[:2], "train.stop_at=5", allowed=("data.seed", "data.split"))
    assert last_step(config) == 5


@pytest.mark.parametrize(
    "change", ["model.num_layers=3", "model.vocab_size=300", "train.precision=bf16", "optim.rule=muon"]
)
def test_a6_a_change_that_the_checkpoint_cannot_follow_is_blamed_on_the_change(config, change):
    """It was called an unreadable checkpoint (74), as if it were damaged."""
    key = change.partition("=")[0]
    with pytest.raises(UsageError, match=rf"(?s)that --allow-change let pass: .*  {key}: .*start anew") as caught:
        train(config, change, allowed=(key,))
    assert "* " not in str(caught.value)
    train(config, "train.stop_at=4")
    assert last_step(config) == 4, "nothing of it stays"


def test_a6_a_key_that_does_not_exist_cannot_be_allowed():
    check_allowed(["optim", "optim.lr", "data.content", "data.samples"], PretrainConfig, PretrainIdentity)
    with pytest.raises(UsageError, match=r"--allow-change data\.contents: .* Did you mean 'data\.content'\?"):
        check_allowed(["data.contents"], PretrainConfig, PretrainIdentity)
    changes = [Change("a", 1, 2, "checkpoint", True), Change("b", 1, 2, "run.yaml", False)]
    assert table_of(changes, ["a"]) == "  a: checkpoint 1, configuration 2\n  b: run.yaml 1, configuration 2"
    assert table_of(changes, []).startswith("* a:")


# --- what it costs


def test_a6_what_preprocess_merge_and_split_hashed_is_not_read_again(tmp_path, made, monkeypatch):
    prefix = str(tmp_path / "merged")
    indexed.merge_datasets(list(made), prefix)
    parts = [part["prefix"] for part in split_merge.split_dataset(prefix, str(tmp_path / "part"), [1, 1])]
    truth = {one: content.records_of({s: f"{one}.{s}" for s in content.SUFFIXES}) for one in (made[0], prefix, *parts)}
    read = []
    real = content.record_of
    monkeypatch.setattr(content, "record_of", lambda path: read.append(path) or real(path))
    for one, records in truth.items():
        memory = RunFolder(tmp_path).path / "data.json"
        wanted = "-".join(records[suffix]["xxh3_128"] for suffix in content.SUFFIXES)
        assert content.contents([one], memory) == {one: wanted} and not read
    os.utime(f"{prefix}.bin", ns=(1, 1))
    for _ in range(2):
        assert content.contents([prefix], memory)[prefix].startswith(truth[prefix]["bin"]["xxh3_128"])
    assert read == [f"{prefix}.bin"], "read once more, then remembered by the run"
    for change in (made[0], None):  # another run, whose first start finds that the side-car is of other files
        read.clear()
        if change is None:
            os.utime(f"{parts[0]}.bin")  # changed after the side-car was written
        else:
            shutil.copy2(f"{change}.bin", f"{prefix}.bin")
        wrong = parts[0] if change is None else prefix
        content.contents([wrong], tmp_path / f"other-{change is None}.json")
        assert read == [f"{wrong}.bin"]
