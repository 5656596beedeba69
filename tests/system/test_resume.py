"""Runs that are killed, stopped or moved to another layout end with the state of the run that nobody disturbed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.base.config import load
from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.reader import CheckpointReader, step_name
from megallm.data import batches as data_batches
from megallm.engine.engine import Engine
from megallm.parallel.mesh import Mesh
from megallm.training import pretrain, supervised
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.system.commands import (
    Started,
    dump,
    losses_of,
    make_corpus,
    megallm,
    rows_of,
    start,
    wait_for,
    write_config,
)

STEPS = 45
# Big enough that a save of 5 MB takes as long as a step or two of some 30 ms.
SLOW_SAVE: dict[str, Any] = {
    "layout": {"pp": 2},
    "train": {"steps": STEPS},
    "model": {"hidden_size": 128, "ffn_hidden_size": 384},
    "checkpoint": {"every": 2, "keep": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, corpus) -> Path:
    """The run on two pipeline stages that nobody disturbs."""
    return quiet_run(tmp_path_factory.mktemp("quiet"), corpus, **SLOW_SAVE)


def quiet_run(folder: Path, corpus: str, **sections: Any) -> Path:
    """A run from its first to its last step without a disturbance."""
    sections["run"] = {"dir": "quiet"}
    config = write_config(folder / "quiet.yaml", corpus, **sections)
    done = megallm("pretrain", config, "--resume", "never", cwd=folder)
    assert done.code == 0, done.err
    return folder / "quiet"


def assert_same_run(run: Path, quiet: Path) -> None:
    """Every tensor of the final state bit for bit, every loss exactly, each step once."""
    ours, theirs = dump(run), dump(quiet)
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert any(name.startswith("optim.exp_avg_sq.") for name in ours)
    assert losses_of(run) == losses_of(quiet)
    assert [step for step, _ in losses_of(run)] == list(range(1, len(losses_of(quiet)) + 1))


# --- killed from outside -------------------------------------------------------------------------------------------


def kill(running: Started, how: str, draw: random.Random) -> None:
    {
        "all": running.kill_all,
        "launcher": running.kill_launcher,
        "rank": lambda: running.kill_rank(draw.randrange(8)),
    }[how]()


def kill_during_training(running: Started, run: Path, how: str, draw: random.Random) -> bool:
    """Kill after a few more steps and a random part of one; False when the run ended first."""
    wanted = max((row["step"] for row in rows_of(run)), default=0) + draw.randint(1, 5)
    at_start = newest_step(run)
    # The rows of steps after the checkpoint are cut on resume, so a row above `wanted` may be an old one at first.
    if not wait_for(lambda: newest_step(run) > at_start or last_row(run) >= wanted, running):
        return False
    time.sleep(draw.uniform(0, 0.05))
    kill(running, how, draw)
    return True


def kill_during_start(running: Started, run: Path, how: str, draw: random.Random) -> bool:
    """Kill somewhere between the command and its first step."""
    time.sleep(draw.uniform(0.2, 3.0))
    alive = running.running
    kill(running, how, draw)
    return alive


def kill_during_save(running: Started, run: Path, how: str, draw: random.Random) -> bool:
    """Kill while a temporary step folder exists; True only when the kill left one behind."""
    before = set(temporary_folders(run))
    if not wait_for(lambda: set(temporary_folders(run)) - before, running):
        return False
    time.sleep(draw.uniform(0, 0.004))
    kill(running, how, draw)
    running.wait()
    return bool(set(temporary_folders(run)) - before)


def temporary_folders(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return [path.name for path in folder.glob("step-*.tmp-*")] if folder.is_dir() else []


def newest_step(run: Path) -> int:
    folder = run / "checkpoints"
    names = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
    return max((int(name[5:]) for name in names if "." not in name), default=0)


def last_row(run: Path) -> int:
    return max((row["step"] for row in rows_of(run)), default=0)


Kill = Callable[[Started, Path, str, random.Random], bool]


def batter(folder: Path, config: Path, kills: list[tuple[Kill, str]], draw: random.Random) -> tuple[Path, list[str]]:
    """Start the run again and again, kill it each time as `kills` says, then let it finish; what really hit."""
    run, hits = folder / "killed", []
    for attack, how in kills:
        for _ in range(4):  # a kill that misses its moment is tried again
            imported = attack is not kill_during_start
            running = start("pretrain", config, "--resume", "auto", cwd=folder, imported=imported)
            hit = attack(running, run, how, draw)
            done = running.wait()
            if hit:
                assert done.code != 0, done.out
                hits.append(f"{attack.__name__} {how}")
                break
            if done.code == 0:
                return run, hits
    done = megallm("pretrain", config, "--resume", "auto", cwd=folder)
    assert done.code == 0, done.err
    return run, hits


def test_killed_at_ten_random_times_ends_as_the_quiet_run(tmp_path, corpus, quiet):
    config = write_config(tmp_path / "killed.yaml", corpus, run={"dir": "killed"}, **SLOW_SAVE)
    draw = random.Random(20)
    kills = [
        (kill_during_training, "all"),
        (kill_during_save, "all"),
        (kill_during_training, "launcher"),
        (kill_during_training, "rank"),
        (kill_during_save, "rank"),
        (kill_during_start, "all"),
        (kill_during_training, "rank"),
        (kill_during_save, "launcher"),
        (kill_during_training, "all"),
        (kill_during_training, "launcher"),
    ]
    run, hits = batter(tmp_path, config, kills, draw)
    assert len(hits) == 10 and sum("save" in hit for hit in hits) == 3, hits
    assert_same_run(run, quiet)
    assert not temporary_folders(run), "the folders of killed saves are swept by later ones"
    assert not (run / "LOCK").exists()


@pytest.mark.chaos
@pytest.mark.parametrize(
    "sections",
    [
        {"layout": {"tp": 2, "sp": True, "pp": 2}, "train": {"steps": 80, "precision": "bf16"}},
        {"layout": {"dp": 2, "pp": 2}, "train": {"steps": 80, "recompute": "selective"}},
        {"layout": {"dp": 2, "tp": 2}, "train": {"steps": 80, "precision": "fp64"}},
    ],
    ids=["tp2-sp-pp2-bf16", "dp2-pp2-selective", "dp2-tp2-fp64"],
)
def test_killed_twenty_times_at_four_ranks(tmp_path, corpus, sections):
    sections = SLOW_SAVE | sections
    quiet = quiet_run(tmp_path, corpus, **sections)
    config = write_config(tmp_path / "killed.yaml", corpus, run={"dir": "killed"}, **sections)
    draw = random.Random(repr(sections))
    attacks = [kill_during_training] * 3 + [kill_during_save] * 2 + [kill_during_start]
    kills = [(draw.choice(attacks), draw.choice(("all", "launcher", "rank"))) for _ in range(20)]
    run, hits = batter(tmp_path, config, kills, draw)
    assert len(hits) >= 10, hits
    assert_same_run(run, quiet)


def test_a_killed_rank_is_named_and_the_others_end_within_seconds(tmp_path, corpus):
    config = write_config(tmp_path / "c.yaml", corpus, layout={"pp": 2}, train={"steps": 5000})
    running = start("pretrain", config, cwd=tmp_path, imported=True)
    assert wait_for(lambda: last_row(tmp_path / "run") >= 3, running)
    begin = time.monotonic()
    running.kill_rank(1)
    done = running.wait()
    assert done.code == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 30, "the rank that is left waits for minutes"
    assert "rank 1 of 2 failed: killed by signal 9 (SIGKILL)" in done.out


# --- asked to stop -------------------------------------------------------------------------------------------------


def test_stopped_by_signals_and_by_stop_at_ends_as_the_quiet_run(tmp_path, corpus, quiet):
    """SIGTERM to the job, SIGTERM to one rank only, SIGINT once, `train.stop_at`: each saves, nothing is lost."""
    sections = SLOW_SAVE | {"checkpoint": {"every": 0}}
    config = write_config(tmp_path / "c.yaml", corpus, run={"dir": "stopped"}, **sections)
    run, reached = tmp_path / "stopped", 0

    def stop(number: signal.Signals, rank: int | None) -> tuple[int, str]:
        running = start("pretrain", config, cwd=tmp_path, imported=True)
        assert wait_for(lambda: last_row(run) >= reached + 2, running)
        pid = running.process.pid if rank is None else running.ranks()[rank]
        os.kill(pid, number)
        done = running.wait()
        return done.code, done.out

    for number, rank, code in ((signal.SIGTERM, None, 75), (signal.SIGTERM, 1, 75), (signal.SIGINT, None, 130)):
        got, text = stop(number, rank)
        assert got == code, text
        before, reached = reached, newest_step(run)
        assert before + 2 <= reached < STEPS and last_row(run) == reached, "saved at the step it reached"
        assert f"after step {reached}" in text or code == 130
    done = megallm("pretrain", config, f"train.stop_at={reached + 3}", "--resume", "must", cwd=tmp_path)
    assert done.code == 0 and newest_step(run) == reached + 3 and f"resumed at step {reached}" in done.out
    done = megallm("pretrain", config, "--resume", "must", cwd=tmp_path)
    assert done.code == 0, done.err
    assert_same_run(run, quiet)
    again = megallm("pretrain", config, "--resume", "must", cwd=tmp_path)
    assert again.code == 0 and newest_step(run) == STEPS, "a finished run has nothing left to do"
    assert losses_of(run) == losses_of(quiet)


@pytest.mark.parametrize("delay", [0.1, 0.6, 1.0])
def test_sigterm_while_starting_ends_soon_and_leaves_a_folder_that_can_be_started(tmp_path, corpus, delay):
    """Between the first rank and the first step: no state to save, exit 75 (or the signal itself before any rank)."""
    config = write_config(tmp_path / "c.yaml", corpus, layout={"pp": 2}, train={"steps": 2000})
    running = start("pretrain", config, cwd=tmp_path, imported=True)
    assert wait_for(lambda: len(running.ranks()) == 2, running)
    time.sleep(delay)
    begin = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    done = running.wait()
    assert done.code == 75, done.out
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "run" / "LOCK").exists() and not temporary_folders(tmp_path / "run")


# --- another layout ------------------------------------------------------------------------------------------------


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest max|a - b| / max|b| over all tensors; moments of a gradient that is zero are compared as they are."""
    assert ours.keys() == theirs.keys()
    floor = {name: 1e-6 if name.startswith("optim.") else 0.0 for name in theirs}
    tops = {name: max(float(theirs[name].abs().max()), floor[name]) for name in theirs}
    return max(float((ours[name] - theirs[name]).abs().max()) / tops[name] for name in theirs)


def train_on_ranks(path: str, overrides: list[str]) -> None:
    """`megallm pretrain` on the ranks of the pool."""
    config = resolved(Path(path), *overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.run(config, Mesh.start(config.layout.grid()), "auto")


def test_resumed_at_other_layouts_in_float64(tmp_path, corpus):
    """tp2+sp -> pp2 -> dp2 -> tp2 x pp2 with another cadence of saves, against one quiet process."""
    sections = {"train": {"steps": 12, "precision": "fp64"}, "optim": {"warmup_steps": 3}}
    quiet = write_config(tmp_path / "q.yaml", corpus, run={"dir": str(tmp_path / "quiet")}, **sections)
    train_here(quiet, resume="never")
    config = write_config(tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "moved")}, **sections)
    legs = (
        (2, ["layout.tp=2", "layout.sp=true"]),
        (2, ["layout.pp=2"]),
        (2, ["layout.dp=2"]),
        (4, ["layout.tp=2", "layout.pp=2", "checkpoint.every=1"]),
    )
    for number, (ranks, leg) in enumerate(legs, start=1):
        run_ranks(ranks, train_on_ranks, str(config), [f"train.stop_at={3 * number}", *leg])
    ours, theirs = losses_of(tmp_path / "moved"), losses_of(tmp_path / "quiet")
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 13))
    assert max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1e-9
    assert worst(dump(tmp_path / "moved"), dump(tmp_path / "quiet")) <= 1e-9
    assert [row["consumed_tokens"] for row in rows_of(tmp_path / "moved")] == [4 * 32 * n for n in range(1, 13)]


# --- in this process: what is refused, and negative controls -------------------------------------------------------


def resolved(path: Path, *overrides: str) -> PretrainConfig:
    return check(load(PretrainConfig, str(path), list(overrides)), None, None)


def train_here(path: Path, *overrides: str, resume: str = "auto") -> None:
    """`megallm pretrain` on one rank, in this process."""
    pretrain.run(resolved(path, *overrides), Mesh.single(), resume)


@pytest.fixture(params=["megatron"])
def short(request, tmp_path, corpus) -> Path:
    """A configuration whose run has done 3 of 6 steps, in Megatron's order: the stream may change its lengths."""
    data = {"order": request.param}
    path = write_config(tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "run")}, train={"steps": 6}, data=data)
    train_here(path, "train.stop_at=3", resume="never")
    return path


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.num_layers=3", ["model.num_layers: checkpoint 2, configuration 3"]),
        ("data.seq_len=16", ["data.seq_len: checkpoint 32, configuration 16"]),
        ("data.split='80,20,0'", ["data.split: checkpoint '90,10,0', configuration '80,20,0'"]),
        ("run.seed=4", ["seed: checkpoint 3, configuration 4"]),
        ("train.precision=fp64", ["precision: checkpoint 'fp32', configuration 'fp64'"]),
        ("train.global_batch=8", ["train.global_batch: checkpoint 4, configuration 8", "data.samples: checkpoint 24"]),
        ("optim.weight_decay=0.5", []),
        ("optim.lr=0.1", []),
        ("layout.dp=1", []),
    ],
)
def test_another_run_is_refused_with_a_table(short, tmp_path, override, named):
    if not named:  # what may change between legs
        train_here(short, override)
        assert newest_step(tmp_path / "run") == 6
        return
    with pytest.raises(UsageError) as caught:
        train_here(short, override)
    for text in named:
        assert text in str(caught.value)
    assert newest_step(tmp_path / "run") == 3 and last_row(tmp_path / "run") == 3, "nothing was touched"
    assert not (tmp_path / "run" / "LOCK").exists()


def test_resume_must_and_never(short, tmp_path):
    with pytest.raises(UsageError, match=r"--resume never: .*step-00000003 exists"):
        train_here(short, resume="never")
    with pytest.raises(UsageError, match=r"--resume must: there is no valid checkpoint under .*elsewhere"):
        train_here(short, f"run.dir={tmp_path / 'elsewhere'}", resume="must")
    train_here(short, resume="must")
    assert newest_step(tmp_path / "run") == 6


def test_a_damaged_newest_checkpoint_is_passed_over_aloud_and_the_only_one_refused(short, tmp_path, caplog):
    train_here(short, "train.stop_at=5")
    root = tmp_path / "run" / "checkpoints"
    (root / step_name(5) / "manifest.json").write_text("{")
    train_here(short)
    assert "step-00000005 is damaged and passed over" in caplog.text
    assert losses_of(tmp_path / "run")[-1][0] == 6
    for folder in root.glob("step-*"):
        (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="No checkpoint under .* is usable"):
        train_here(short)


def state_at_the_end(run: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(run / "checkpoints" / step_name(6)) as reader:
        return {name: reader.read(name) for name in reader.names()}


def resume_equals_quiet(short: Path, tmp_path: Path, before_resume: Callable[[], None] = lambda: None) -> bool:
    """Run all six steps quietly, finish the run of `short` in a second leg, and compare."""
    train_here(short, f"run.dir={tmp_path / 'quiet'}", resume="never")
    before_resume()
    train_here(short, resume="must")
    ours, theirs = (state_at_the_end(tmp_path / name) for name in ("run", "quiet"))
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and losses_of(tmp_path / "run") == losses_of(tmp_path / "quiet")


@pytest.mark.parametrize("short", ["megatron", "stream"], indirect=True)
def test_two_legs_equal_one(short, tmp_path):
    assert resume_equals_quiet(short, tmp_path)


def forget_moments(patch: pytest.MonkeyPatch) -> None:
    """What is read for the second moments goes nowhere."""
    real = Engine._load_optimizer

    def load_and_forget(self: Engine, reader: CheckpointReader) -> None:
        kept = {held.name: held.tensor.clone() for held in self.state() if held.name.startswith("optim.exp_avg_sq.")}
        real(self, reader)
        for held in self.state():
            if held.name in kept:
                held.tensor.copy_(kept[held.name])

    patch.setattr(Engine, "_load_optimizer", load_and_forget)


def forget_updates(patch: pytest.MonkeyPatch) -> None:
    """The bias correction of the moments starts again."""
    real = Engine.load

    def load_and_forget(self: Engine, reader: CheckpointReader) -> None:
        real(self, reader)
        self.optimizer.updates = 0

    patch.setattr(Engine, "load", load_and_forget)


def forget_samples(patch: pytest.MonkeyPatch) -> None:
    """The data starts again at the first sample."""
    real = data_batches.rows_after
    patch.setattr(data_batches, "rows_after", lambda consumed, *rest: real(consumed - 12, *rest))


def forget_schedule(patch: pytest.MonkeyPatch) -> None:
    """The learning rate starts again at the first step."""
    real = supervised.learning_rate
    patch.setattr(supervised, "learning_rate", lambda config, step, total: real(config, step - 3, total))


@pytest.mark.parametrize("forget", [forget_moments, forget_updates, forget_samples, forget_schedule])
def test_forgetting_a_part_of_the_state_is_noticed(short, tmp_path, monkeypatch, forget):
    """Negative controls of the equality above."""
    assert not resume_equals_quiet(short, tmp_path, lambda: forget(monkeypatch))
