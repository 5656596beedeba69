"""Runs that save beside training: the same states as runs that stop to save, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megallm.base.errors import CannotWrite, Diverged
from megallm.checkpoint import async_save, store
from megallm.checkpoint.reader import CheckpointReader, step_folders
from megallm.engine.engine import Engine
from tests.system.commands import Started, dump, make_corpus, megallm, rows_of, start, wait_for, write_config
from tests.system.test_resume import (
    SLOW_SAVE,
    assert_same_run,
    batter,
    kill_during_save,
    kill_during_training,
    quiet_run,
    train_here,
)

BESIDE = SLOW_SAVE | {"checkpoint": {"every": 2, "keep": 2, "async_save": True}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    sections = {"train": {"steps": 8}, "checkpoint": {"every": 2, "keep": 0, "async_save": True}}
    return write_config(tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "run")}, **sections)


def read_events(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def events(config: Path, kind: str) -> list[dict]:
    return [event for event in read_events(config.parent / "run") if event["event"] == kind]


def kill_writer(running: Started) -> None:
    """SIGKILL to the writer of one rank, which trains on."""
    for rank in running.ranks():
        for task in Path(f"/proc/{rank}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"checkpoint.writer" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
                    return


def test_killed_during_saves_it_ends_as_the_run_that_stops_to_save(tmp_path, corpus):
    quiet = quiet_run(tmp_path, corpus, **SLOW_SAVE)
    config = write_config(tmp_path / "killed.yaml", corpus, run={"dir": "killed"}, **BESIDE)
    run, hits = batter(tmp_path, config, [(kill_during_save, "all"), (kill_during_training, "rank")], random.Random(5))
    assert hits
    assert_same_run(run, quiet)


def test_a_run_goes_on_without_its_writer(tmp_path, corpus):
    config = write_config(tmp_path / "c.yaml", corpus, run={"dir": "run"}, **BESIDE)
    running = start("pretrain", config, cwd=tmp_path)
    assert wait_for(lambda: any(e["event"] == "saved" for e in read_events(tmp_path / "run")), running)
    kill_writer(running)
    done = running.wait()
    assert done.code == 0, done.err
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    assert kinds.count("saved") >= 3 and kinds.count("save_failed") <= 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, SLOW_SAVE["train"]["steps"] + 1))


def test_states_and_events_are_those_of_saves_at_once(config, tmp_path):
    train_here(config, "checkpoint.async_save=false", "run.dir=" + str(tmp_path / "once"))
    train_here(config)
    newest, at_once = dump(tmp_path / "run"), dump(tmp_path / "once")
    assert newest.keys() == at_once.keys() and all(newest[name].equal(at_once[name]) for name in newest)
    saved = events(config, "saved")
    skipped = [event["step"] for event in events(config, "not_saved")]
    assert sorted([event["step"] for event in saved] + skipped) == [2, 4, 6, 8]
    assert all(0 < event["ckpt/stall_seconds"] <= event["ckpt/save_seconds"] for event in saved)
    for step, folder in step_folders(tmp_path / "run" / "checkpoints"):
        with CheckpointReader(folder) as reader:
            assert reader.meta["ledger"]["step"] == step and not list(reader.problems())


def test_a_save_that_is_not_done_is_waited_for_by_none_but_the_last(config, monkeypatch):
    """Never more than one under way: the next is left out, and the end waits."""
    real = async_save._write

    def slow(save, writer):
        time.sleep(1.5)
        return real(save, writer)

    monkeypatch.setattr(async_save, "_write", slow)
    train_here(config)
    left_out = events(config, "not_saved")
    assert [event["step"] for event in left_out] and "still under way" in left_out[0]["reason"]
    assert {event["step"] for event in events(config, "saved")} >= {2, 8}


def test_the_third_failure_in_a_row_ends_the_run(config, monkeypatch):
    def fail(save, writer):
        return store.failure(CannotWrite("Cannot write it: the disk is full."))

    monkeypatch.setattr(async_save, "_write", fail)
    monkeypatch.setattr(async_save.AsyncSaver, "busy", property(lambda self: self.wait() or False))
    with pytest.raises(CannotWrite, match="the disk is full"):
        train_here(config, "train.steps=20")
    assert [event["step"] for event in events(config, "save_failed")] == [2, 4, 6]


def test_a_state_that_is_not_finite_ends_it_and_is_not_there(config, monkeypatch):
    real = Engine.parts

    def parts(self):
        for part in real(self):
            if self.optimizer.updates == 4 and part.name == "final_norm.weight":
                part = replace(part, tensor=part.tensor * float("nan"))
            yield part

    monkeypatch.setattr(Engine, "parts", parts)
    monkeypatch.setattr(async_save.AsyncSaver, "busy", property(lambda self: self.wait() or False))
    with pytest.raises(Diverged, match=r"after step 4 is not finite, as in final_norm\.weight"):
        train_here(config)
    assert [step for step, _ in step_folders(config.parent / "run" / "checkpoints")] == [2]


def test_an_end_by_signal_waits_for_the_save(tmp_path, corpus):
    config = write_config(tmp_path / "c.yaml", corpus, run={"dir": "run"}, **BESIDE)
    running = start("pretrain", config, cwd=tmp_path)
    assert wait_for(lambda: len(rows_of(tmp_path / "run")) >= 3, running)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.wait().code == 75
    done = megallm("pretrain", config, cwd=tmp_path)
    assert done.code == 0, done.err
