"""Issue R, B.12: a signal in the first seconds ends with 75 and a checkpoint or with "nothing to save"."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.config import load
from megallm.base.errors import Requeue
from megallm.launch import local
from megallm.launch.environment import RankEnv
from megallm.parallel.mesh import Mesh
from megallm.training import pretrain, supervised
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.system.commands import _environment, make_corpus, write_config

STOPS = ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("name", [*STOPS, "SIGINT"])
def test_b12_during_the_imports(tmp_path, name):
    """The launcher has just begun: no rank, no run folder, nothing but a handler."""
    number = signal.Signals[name]
    process = subprocess.Popen(
        [sys.executable, "-m", "megallm", "pretrain", "missing.yaml"],
        cwd=tmp_path, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not catches(process.pid, number) or (name == "SIGINT" and not catches(process.pid, signal.SIGTERM)):
        assert process.poll() is None
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if name == "SIGINT" else 75), err
    how = "Interrupted" if name == "SIGINT" else f"Stopped by {name}"
    assert err == f"megallm: {how} before the first step: there is nothing to save. The same command starts again.\n"
    assert not list(tmp_path.iterdir())


def sleep(env: RankEnv) -> None:
    time.sleep(30)


@pytest.mark.parametrize("name", [*STOPS, "SIGINT"])
def test_b12_between_two_forks(name, monkeypatch):
    """It arrives when the first rank is there and the last is not: all hear of it, none runs the launcher's handler."""
    real, number = local._Launch._fork, signal.Signals[name]

    def fork(self, rank, server):
        real(self, rank, server)
        if rank == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(local._Launch, "_fork", fork)
    begin = time.monotonic()
    wanted = local.RanksFailed if name == "SIGINT" else Requeue
    with pytest.raises(wanted, match="before the first step: there is nothing to save") as caught:
        local.run_ranks(sleep, (), 2, preload=())
    assert caught.value.exit_code == (130 if name == "SIGINT" else 75) and time.monotonic() - begin < 20


def first_leaves(env: RankEnv) -> None:
    if env.rank == 0:
        time.sleep(30)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.3)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")


def test_b12_a_rank_that_loses_the_peer_that_stopped_does_not_make_it_a_failure():
    with pytest.raises(Requeue, match="Stopped by SIGTERM"):
        local.run_ranks(first_leaves, (), 2, preload=())


def one_is_deaf(env: RankEnv) -> None:
    if env.rank == 0:  # as in the rendezvous: a library that waits for the other rank, ten minutes long
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    else:
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)


def test_b12_a_rank_that_waits_for_one_that_was_stopped_is_ended():
    begin = time.monotonic()
    with pytest.raises(Requeue, match="Stopped by SIGTERM before the first step"):
        local.run_ranks(one_is_deaf, (), 2, preload=())
    assert time.monotonic() - begin < 15


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    run = {"dir": str(tmp_path / "run")}
    return write_config(tmp_path / "c.yaml", corpus, run=run, train={"steps": 8}, checkpoint={"every": 0})


def train(path: Path, *overrides: str) -> None:
    settings = check(load(PretrainConfig, str(path), list(overrides)), None, None)
    pretrain.run(settings, Mesh.single(), "auto")


@pytest.mark.parametrize("name", [*STOPS, "SIGINT"])
def test_b12_while_the_weights_are_made_or_read(config, monkeypatch, name):
    """Before the first step nothing is trained for the sake of a checkpoint; what there is, is named."""
    real, number = supervised.build_engine, signal.Signals[name]

    def build_engine(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    wanted = KeyboardInterrupt if name == "SIGINT" else Requeue
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "build_engine", build_engine)
        with pytest.raises(wanted, match=r"before the first step: there is nothing to save\. The same command starts"):
            train(config)
    assert not list((config.parent / "run/checkpoints").iterdir())
    train(config, "train.stop_at=3")
    monkeypatch.setattr(supervised, "build_engine", build_engine)
    there = r"before the first step: there is nothing to save\. The same command starts"
    with pytest.raises(wanted, match=there):
        train(config)
    assert not (config.parent / "run/LOCK").exists()
