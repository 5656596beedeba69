"""Issue R, B.13 and B.14: a damaged newest checkpoint is passed over, and a job that lost its lease writes nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.config import load
from megallm.base.errors import CheckpointError, LeaseLost
from megallm.checkpoint import retention, store, tools
from megallm.checkpoint.reader import step_name
from megallm.convert import convert
from megallm.inference.generate import find_step
from megallm.parallel.mesh import Mesh
from megallm.run import lease as leases
from megallm.run.lease import Holder, Lease
from megallm.run.rows import Events, Metrics
from megallm.run.runfolder import RunFolder
from megallm.training import pretrain
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.system.commands import _environment, listing, losses_of, make_corpus, rows_of, write_config


@pytest.fixture(autouse=True)
def lines_reach_the_test(monkeypatch):
    """Whatever an earlier test did to logging."""
    monkeypatch.setattr(logging.getLogger("megallm"), "propagate", True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    """A run of 6 steps out of 8, saved at 2, 4 and 6."""
    run, every = {"dir": str(tmp_path / "run")}, {"every": 2, "keep": 3}
    path = write_config(tmp_path / "c.yaml", corpus, run=run, train={"steps": 8}, checkpoint=every)
    train(path, "train.stop_at=6")
    return path


def train(path: Path, *overrides: str) -> None:
    settings = check(load(PretrainConfig, str(path), list(overrides)), None, None)
    pretrain.run(settings, Mesh.single(), "auto")


def flip(folder: Path, name: str = "weights-00000.safetensors", place: float = 0.5) -> None:
    """One bit of a file, its size and times kept."""
    path = folder / name
    data, times = bytearray(path.read_bytes()), path.stat()
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- B.13


@pytest.mark.parametrize("place", [0.001, 0.5, 1.0])
def test_b13_a_flipped_bit_in_the_newest_shard_costs_two_steps_and_is_said(config, corpus, caplog, place):
    """In the header, in the middle, in the last byte; the run ends with the losses of the quiet one."""
    root = config.parent / "run/checkpoints"
    before = losses_of(config.parent / "run")
    flip(root / step_name(6), place=place)
    train(config)
    assert "step-00000006 is damaged and passed over" in caplog.text and "goes on from step 4" in caplog.text
    events = [json.loads(line) for line in (config.parent / "run/events.jsonl").read_text().splitlines()]
    damaged = next(event for event in events if event["event"] == "damaged")
    assert damaged["step"] == 4 and damaged["set_aside"] == ["step-00000006.damaged"]
    assert losses_of(config.parent / "run")[:6] == before and len(losses_of(config.parent / "run")) == 8
    assert tools.verify_checkpoint(root / step_name(6))["ok"], "the step is written anew, not taken for the damaged one"


def test_b13_two_damaged_ones_and_all_damaged(config, caplog):
    root = config.parent / "run/checkpoints"
    flip(root / step_name(6), place=0.001)
    (root / step_name(4) / "manifest.json").write_text("{")
    assert store.latest_whole(root)[0] == root / step_name(2)
    found, warnings = store.latest_whole(root)
    assert [text.split()[0] for text in warnings] == ["step-00000006", "step-00000004"]
    flip(root / step_name(2), place=0.001)
    with pytest.raises(CheckpointError, match="No checkpoint under .* is usable: .*step-00000002"):
        train(config)
    assert sorted(path.name for path in root.iterdir()) == [step_name(step) for step in (2, 4, 6)], "nothing renamed"
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        find_step(str(config.parent / "run"))


def test_b13_every_use_of_the_newest_falls_back_and_says_so(config, tmp_path, caplog):
    run = config.parent / "run"
    newest = run / "checkpoints" / step_name(6)
    flip(newest)
    for use, wanted in (
        (lambda: tools.dump(run, tmp_path / "dump.safetensors")["step"], 4),
        (lambda: tools.diff(run, run / "checkpoints" / step_name(4))["same"], True),
        (lambda: int(find_step(str(run)).name[5:]) in (4, 6), True),
        (lambda: tools.verify_checkpoint(run)["ok"], False),
    ):
        assert use() == wanted
    assert caplog.text.count("step-00000006 is damaged and passed over") >= 2
    with pytest.raises(CheckpointError, match="is damaged in"):
        tools.dump(newest, tmp_path / "dump.safetensors")  # a step that is named is taken as it is


def damage_weights_only(step: Path, optimizer: bool) -> None:
    """Flip a bit of a weight, or of the optimizer's state."""
    manifest = tools.load_manifest(step)
    name = next(n for n in sorted(manifest.tensors) if n.startswith("optim.exp") == optimizer)
    piece = manifest.tensors[name].pieces[0]
    path = step / piece.file
    data = bytearray(path.read_bytes())
    data[piece.offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("optimizer", [False, True])
def test_b13_generate_and_convert_ask_for_the_weights_only(config, tmp_path, caplog, optimizer):
    run = config.parent / "run"
    damage_weights_only(run / "checkpoints" / step_name(6), optimizer)
    step = 6 if optimizer else 4
    assert find_step(str(run)) == run / "checkpoints" / step_name(step)
    convert.run(convert.ConvertRequest("hf", str(run), str(tmp_path / "hf")))
    assert ("step-00000006 is damaged" in caplog.text) == (not optimizer)
    train(config)
    assert "goes on from step 4" in caplog.text


def whole_on_ranks(root: str) -> str:
    from megallm.parallel.layout import Layout

    found, warnings = store.latest_whole(root, Mesh.start(Layout(dp=2)))
    return f"{found.name} {len(warnings)}"


def test_b13_ranks_share_the_reading_and_agree(config):
    root = config.parent / "run/checkpoints"
    flip(root / step_name(6), place=1.0)
    assert run_ranks(2, whole_on_ranks, str(root)) == [f"{step_name(4)} 1"] * 2


# --- B.14


def steal(folder: RunFolder) -> Holder:
    """Another job on another machine takes the folder over, as after 300 s of silence."""
    thief = dataclasses.replace(Holder.me(), host="other-host", pid=4711, machine="another boot")
    folder.lock.write_text(json.dumps(vars(thief)))
    return thief


def test_b14_a_frozen_job_writes_nothing_after_it_lost_its_folder(tmp_path, corpus):
    """Rank 0 is stopped by SIGSTOP, the folder taken over, rank 0 woken: not a row, not a checkpoint, not a byte."""
    config = write_config(
        tmp_path / "c.yaml", corpus, train={"steps": 5000}, checkpoint={"every": 1, "keep": 2}, log={"plot": True}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "megallm", "pretrain", str(config)],
        cwd=tmp_path, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run, end = tmp_path / "run", time.monotonic() + 60
    while len(rows_of(run)) < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    rank = leases.read_holder(run / "LOCK").pid
    os.kill(rank, signal.SIGSTOP)
    time.sleep(0.2)
    steal(RunFolder(run))
    before = {name: size for name, size in listing(run).items() if "tmp-" not in name}
    os.kill(rank, signal.SIGCONT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 73
    assert "was taken over by host other-host, process 4711" in err and "megallm: error:" in err
    after = {name: size for name, size in listing(run).items() if "tmp-" not in name}
    assert after == before
    assert leases.read_holder(run / "LOCK").host == "other-host"


def test_b14_every_write_asks_first(tmp_path, config):
    """Rows, events, saves, the removal of old steps: each for itself, at once, without waiting for a heartbeat."""
    folder = RunFolder(tmp_path / "run")
    with Lease(folder, beat_seconds=3600) as lease:
        metrics, events = Metrics(folder.metrics, 6, lease.check), Events(folder.events, lease.check)
        metrics.append({"step": 7})
        steal(folder)
        before = listing(folder.path)
        keeping = store.RetentionPolicy(1, None, lease.check)
        for write in (
            lambda: metrics.append({"step": 8}),
            lambda: events.add("saved", step=8),
            lambda: store.save(folder.checkpoints, 8, [], {}, Mesh.single(), keeping),
            lease.check,
        ):
            with pytest.raises(LeaseLost, match="taken over by host other-host, process 4711"):
                write()
        metrics.abandon()
        events.abandon()
        assert listing(folder.path) == before


def test_b14_a_lease_lost_while_a_save_was_written_is_not_committed(tmp_path, config, monkeypatch):
    """The freeze falls between the shards and the manifest, or between the commit and the removal of old steps."""
    root = tmp_path / "run/checkpoints"
    lost: list[bool] = []

    def guard() -> None:
        if lost:
            raise LeaseLost("taken over")

    def losing(function):
        def call(*args):
            result = function(*args)
            lost.append(True)
            return result

        return call

    names = sorted(path.name for path in root.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(store, "assemble", losing(store.assemble))
        with pytest.raises(LeaseLost):
            store.save(root, 8, [], {}, Mesh.single(), store.RetentionPolicy(1, None, guard))
    assert sorted(path.name for path in root.iterdir()) == names
    lost.clear()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_commit", losing(store._commit))
        with pytest.raises(LeaseLost):
            store.save(root, 8, [], {}, Mesh.single(), store.RetentionPolicy(1, None, guard))
    assert sorted(path.name for path in root.iterdir()) == [*names, step_name(8)], "no old step was removed"


def test_b14_the_lock_of_a_job_that_has_ended_is_gone(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    lease = Lease(folder, beat_seconds=3600)
    folder.lock.unlink()
    with pytest.raises(LeaseLost, match="another job, which has ended meanwhile"):
        lease.check()
    lease.release()


def test_the_proven_step_survives_retention(tmp_path, config):
    root = tmp_path / "run/checkpoints"
    assert [path.name for path in retention.retire(root, 1, 6, proven=2)] == [step_name(4)]
