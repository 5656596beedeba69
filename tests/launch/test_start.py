"""Ranks that others start: two plain processes with torchrun's variables, and with srun's, meet and sum."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.errors import UsageError
from megallm.base.stopping import signals_held
from megallm.launch.environment import rendezvous_port
from megallm.launch.start import started_by_others, world_size

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path
from tests.launch.test_local import one_all_reduce
from megallm.launch.start import start
start(one_all_reduce, (sys.argv[1],), 1, Path(sys.argv[1]) / "logs")
print("done")
"""
STARTED = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "ENVIRONMENT")


def torchrun(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}


def srun(rank: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_NODELIST": "127.0.0.1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def free_job() -> int:
    """A job number whose derived port is free here."""
    for job in range(os.getpid(), os.getpid() + 100):
        try:
            socket.create_server(("127.0.0.1", rendezvous_port(job, 0))).close()
        except OSError:
            continue
        return job
    raise AssertionError("no free port")


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_two_ranks_started_by_others_meet(tmp_path, launcher):
    shared = {"MASTER_PORT": str(free_port())} if launcher is torchrun else {"SLURM_JOB_ID": str(free_job())}
    plain = {name: value for name, value in os.environ.items() if name not in STARTED}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path)],
            cwd=ROOT,
            env=plain | launcher(rank) | shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [(tmp_path / str(rank)).read_text().split()[0] for rank in range(2)] == ["3", "3"]
    assert said[0][0] == "done\n" and said[1][0] == ""
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "done\n"


SHOW = """
import sys
from megallm.cli import main
from megallm.launch.start import start
def show(env):
    for stream in (sys.stdout, sys.stderr):
        print("\\x1b[31m red", file=stream)
main.run_verb = lambda words: start(show, (), 1, None) or 0
sys.exit(main.main([]))
"""


@pytest.mark.parametrize("launcher", [{}, torchrun(0), srun(0)], ids=["local", "torchrun", "srun"])
def test_what_a_rank_prints_is_escaped_whoever_started_it(launcher):
    more = {} if not launcher else {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "SLURM_NTASKS": "1"}
    plain = {name: value for name, value in os.environ.items() if name not in STARTED}
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, env=plain | launcher | more, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"\\x1b[31m red\n"), done.stderr
    assert done.stderr == b"\\x1b[31m red\n"


def test_world_size(monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    assert world_size(None) is None and world_size(3) == 3 and started_by_others() is None
    for name, value in (torchrun(1) | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert world_size(None) == 2 and started_by_others().rank == 1
    with pytest.raises(UsageError, match="--nproc is 3, but torchrun started 2 ranks"):
        world_size(3)


def test_one_srun_task_is_a_plain_process(monkeypatch):
    for name, value in (srun(0) | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    assert started_by_others() is None and world_size(4) == 4


HANG = """
import os, signal, sys, time
from megallm.base.heartbeat import HEARTBEAT, OPERATION
from megallm.launch.restart import Start
from megallm.launch.start import start
def work(env):
    if env.rank == 1 and sys.argv[1] == "killed":
        HEARTBEAT.enter_step(1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(1, 6):
        HEARTBEAT.enter_step(step)
        time.sleep(0.3)
    HEARTBEAT.enter("forward")
    if env.rank == 1 and sys.argv[1] == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if sys.argv[1] != "ends":
        HEARTBEAT.wait(OPERATION["all_reduce"], HEARTBEAT.new_slot("w", "w", "world", (0, 1)), 1, 8)
        time.sleep(60 if sys.argv[1] == "stopped" else 5)
def tell(kind, sentence, fields):
    print(kind, fields["kind"], fields["rank"], sentence, file=sys.stderr)
from megallm.launch.local import Hooks
start(work, (), Start(2, hang_seconds=1.0), None, hooks=Hooks(event=tell), saves=False)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ends", ""),
        ("stopped", "incident hang 1 no rank moved for"),
        ("killed", "incident killed 1 rank 1 (process"),
    ],
)
def test_ranks_that_others_started_are_watched(how, said):
    """Under torchrun: who hangs or is gone is named, and nobody waits for ever."""
    plain = {name: value for name, value in os.environ.items() if name not in STARTED}
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANG, how], cwd=ROOT, env=plain | torchrun(rank) | {"MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    codes = [rank.returncode for rank in ranks]
    assert codes == {"ends": [0, 0], "stopped": [-9, -9], "killed": [0, -9]}[how], told
    assert said in told[0] and bool(said) == bool(told[0]), told
    assert not list(Path("/dev/shm").glob("megallm-*"))


def test_a_signal_inside_a_fork_is_heard_after_it():
    """KeyboardInterrupt inside a hook of os.fork was swallowed, and the lock of logging stayed taken."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    inside = []
    try:
        with pytest.raises(KeyboardInterrupt), signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            inside.append("went on")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # the control, and the handler is back
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert inside == ["went on"]
