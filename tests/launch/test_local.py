"""Local ranks with real processes: success, every kind of failure, signals, and no orphans."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.errors import CannotWrite, DataError, Requeue, UsageError
from megallm.launch.environment import RankEnv
from megallm.launch.local import RanksFailed, run_ranks

ROOT = Path(__file__).parents[2]
SOON = 40.0  # ranks here sleep for ever, and their collectives for 60 s: not a measure of speed


def run(fn, *args, nproc=3, log_dir=None, preload=()):
    run_ranks(fn, args, nproc, log_dir, preload)


def sleep_forever():
    while True:
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# Bodies of ranks.


def write_place(env: RankEnv, folder: str) -> None:
    Path(folder, str(env.rank)).write_text(f"{env.rank}/{env.world} {env.local_rank}/{env.local_world}")
    print(f"rank {env.rank} speaks")
    print(f"rank {env.rank} complains", file=sys.stderr)


def end_badly(env: RankEnv, kind: str, folder: str) -> None:
    Path(folder, f"pid-{env.rank}").write_text(str(os.getpid()))
    if env.rank != 1:
        sleep_forever()
    time.sleep(0.1)
    print("last words of rank 1")
    sys.stdout.flush()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segv":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    if kind == "exit0":
        os._exit(0)
    if kind == "exit3":
        sys.exit(3)
    if kind == "raise":
        raise ValueError("a bug")
    raise DataError("corpus.jsonl:7: not JSON.")


def blame_cause(env: RankEnv) -> None:
    """Rank 2 is killed; the others notice at once and say that a peer is lost."""
    if env.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")


def wait_for_signal(env: RankEnv, folder: str, behaviour: str) -> None:
    if behaviour == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    Path(folder, f"pid-{env.rank}").write_text(str(os.getpid()))
    sleep_forever()


def one_all_reduce(env: RankEnv, folder: str) -> None:
    import torch

    from megallm.launch.group import process_group

    with process_group(env, 30):
        value = torch.tensor([float(env.rank + 1)])
        torch.distributed.all_reduce(value)
        Path(folder, str(env.rank)).write_text(f"{value.item():g} {torch.get_num_threads()}")
    assert not torch.distributed.is_initialized()


def die_in_a_collective(env: RankEnv) -> None:
    import torch

    from megallm.launch.group import process_group

    with process_group(env, 60):
        torch.distributed.barrier()
        if env.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            torch.distributed.all_reduce(torch.zeros(1000))


# Tests.


def test_success_with_logs_and_rank_0_live(tmp_path, capfd):
    run(write_place, str(tmp_path), log_dir=tmp_path / "logs")
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"{r}/3 {r}/3" for r in range(3)]
    shown = capfd.readouterr()
    assert shown.out == "rank 0 speaks\n" and shown.err == "rank 0 complains\n"
    for rank in range(3):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"rank {rank} speaks" in log and f"rank {rank} complains" in log


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("kill", 137, "rank 1 of 3 failed: killed by signal 9 (SIGKILL)"),
        ("segv", 139, "killed by signal 11 (SIGSEGV)"),
        ("abort", 134, "killed by signal 6 (SIGABRT)"),
        ("exit0", 70, "it left with exit code 0 before its end"),
        ("exit3", 3, "sys.exit(3)"),
        ("raise", 70, "ValueError: a bug"),
        ("data", 65, "rank 1: corpus.jsonl:7: not JSON."),
    ],
)
def test_the_first_failure_is_named_and_ends_all(tmp_path, kind, code, words):
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run(end_badly, kind, str(tmp_path), log_dir=tmp_path / "logs")
    assert time.monotonic() - start < SOON
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    if kind == "data":
        assert "megallm: error: corpus.jsonl:7" in (tmp_path / "logs" / "rank-1.log").read_text()
    else:
        assert "rank-1.log ends with:" in str(caught.value)
        assert "last words of rank 1" in (tmp_path / "logs" / "rank-1.log").read_text()
    if kind in ("segv", "abort"):
        assert "in end_badly" in (tmp_path / "logs" / "rank-1.log").read_text()  # the stack
    assert not any(alive(int(path.read_text())) for path in tmp_path.glob("pid-*"))


def test_the_words_of_an_earlier_run_are_not_taken_for_this_one(tmp_path):
    log = tmp_path / "logs" / "rank-1.log"
    log.parent.mkdir()
    log.write_text("words of last week\n")
    with pytest.raises(RanksFailed) as caught:
        run(end_badly, "kill", str(tmp_path), log_dir=tmp_path / "logs")
    assert "last words of rank 1" in str(caught.value) and "last week" not in str(caught.value)
    assert log.read_text().startswith("words of last week\n")


def test_a_lost_peer_does_not_mask_the_cause():
    for _ in range(3):
        with pytest.raises(RanksFailed, match=r"rank 2 of 3 failed: killed by signal 9") as caught:
            run(blame_cause)
        assert caught.value.exit_code == 137


def fail_with_a_sentence(env: RankEnv) -> None:
    raise DataError("no usable text.")


def test_a_sentence_is_shown_once(capfd):
    with pytest.raises(RanksFailed, match=r"^no usable text\.$"):
        run(fail_with_a_sentence, nproc=1)
    assert capfd.readouterr().err == ""  # cli.main prints it


def test_a_log_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CannotWrite, match="run"):
        run(write_place, str(tmp_path), log_dir=tmp_path / "run" / "logs")


def test_nproc_must_be_positive():
    with pytest.raises(UsageError, match="--nproc is 0"):
        run(write_place, "", nproc=0)


def test_gloo_over_the_inherited_socket(tmp_path):
    run(one_all_reduce, str(tmp_path), nproc=2, preload=("torch",))
    values = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [value for value, _ in values] == ["3", "3"]
    assert all(int(threads) >= 1 for _, threads in values)


def test_a_kill_inside_a_collective_is_blamed_on_the_killed_rank():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 of 3 failed: killed by signal 9"):
        run(die_in_a_collective, preload=("torch",))
    assert time.monotonic() - start < SOON


LAUNCHER = """
import sys
sys.path[:0] = [{root!r}]
from tests.launch.test_local import run, wait_for_signal
from megallm.base.errors import MegallmError
try:
    run(wait_for_signal, {folder!r}, {behaviour!r})
except MegallmError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def launcher(folder: Path, behaviour: str) -> tuple[subprocess.Popen, list[int]]:
    code = LAUNCHER.format(root=str(ROOT), folder=str(folder), behaviour=behaviour)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    paths = [folder / f"pid-{rank}" for rank in range(3)]
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    return process, [int(path.read_text()) for path in paths]


def test_ranks_die_with_a_killed_launcher(tmp_path):
    process, pids = launcher(tmp_path, "plain")
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_sigterm_reaches_the_ranks_and_asks_to_be_requeued(tmp_path):
    process, pids = launcher(tmp_path, "plain")
    process.terminate()
    assert process.wait(SOON) == Requeue.exit_code
    assert "Stopped by SIGTERM before the first step: there is nothing to save" in process.stderr.read()
    assert not any(alive(pid) for pid in pids)


def test_one_interrupt_is_passed_on(tmp_path):
    process, pids = launcher(tmp_path, "plain")
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == 130
    assert "press Ctrl-C again" in process.stderr.read()
    assert not any(alive(pid) for pid in pids)


def test_a_second_interrupt_is_immediate(tmp_path):
    process, pids = launcher(tmp_path, "stubborn")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and all(alive(pid) for pid in pids)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == 130
    assert time.monotonic() - start < SOON
    assert not any(alive(pid) for pid in pids)
