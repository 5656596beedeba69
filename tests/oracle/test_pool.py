"""The rank pool: order, reuse, and what a person reads when a rank raises, hangs or dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megallm.base.errors import Hang, PeerLost, UsageError
from megallm.oracle.pool import Pool, RankFailed
from tests.ranks import pool, run_ranks


def rank_and_sum(offset: float) -> tuple[int, float, int]:
    total = torch.tensor([dist.get_rank() + offset], dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_rank(), float(total), torch.get_num_threads()


def leave_a_mess() -> int:
    torch.set_default_dtype(torch.float64)
    dist.new_group([0])
    return os.getpid()


def default_dtype() -> tuple[int, torch.dtype, float]:
    return os.getpid(), torch.get_default_dtype(), float(torch.rand(1))


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the seventh token is missing")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        sleep_on_purpose()


def sleep_on_purpose() -> None:
    time.sleep(60)


def exit_on(rank: int, code: int) -> None:
    if dist.get_rank() == rank:
        os._exit(code)
    dist.barrier()


def kill_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def works_again() -> None:
    assert [r[0] for r in run_ranks(2, rank_and_sum, 0.0)] == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_in_rank_order_from_a_world_of_the_size_asked_for(size: int) -> None:
    results = run_ranks(size, rank_and_sum, 0.5)
    assert results == [(rank, sum(range(size)) + 0.5 * size, 1) for rank in range(size)]


def test_workers_are_reused_and_start_each_call_clean() -> None:
    before = run_ranks(2, leave_a_mess)
    after = run_ranks(2, default_dtype)
    assert [pid for pid, _, _ in after] == before
    assert [dtype for _, dtype, _ in after] == [torch.float32] * 2
    assert after[0][2] == after[1][2] == float(torch.rand(1, generator=torch.Generator().manual_seed(0)))


def test_an_exception_is_tagged_with_its_rank_and_the_pool_recovers() -> None:
    with pytest.raises(RankFailed, match="the seventh token is missing") as caught:
        run_ranks(3, raise_on, 1)
    assert caught.value.rank == 1
    assert re.search(r"^\[rank 1\] .*in raise_on$", str(caught.value), flags=re.MULTILINE)
    works_again()


def test_a_hang_ends_at_the_timeout_and_shows_where_the_rank_is() -> None:
    started = time.monotonic()
    with pytest.raises(Hang, match="no answer in time from rank 1:") as caught:
        run_ranks(2, hang_on, 1, timeout=1.5)
    assert time.monotonic() - started < 40  # the others sleep for 60 s
    assert re.search(r"\[rank 1\] .*in sleep_on_purpose", str(caught.value))
    assert "[rank 0]" not in str(caught.value)
    works_again()


@pytest.mark.parametrize(
    ("job", "args", "words"),
    [(exit_on, (1, 7), r"rank 1 .*exit code 7"), (kill_on, (0,), r"rank 0 .*SIGKILL")],
)
def test_a_rank_that_dies_is_named_with_its_cause(job: object, args: tuple[int, ...], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(PeerLost, match=words):
        run_ranks(2, job, *args)
    assert time.monotonic() - started < 40  # the others sleep for 60 s
    works_again()


def test_a_worker_killed_between_calls_is_named_and_replaced() -> None:
    works_again()
    victim = pool().pids()[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(PeerLost, match=rf"rank 1 \(process {victim}\) was killed by SIGKILL"):
        run_ranks(2, rank_and_sum, 0.0)
    works_again()


def test_a_world_too_large_is_refused() -> None:
    with pytest.raises(UsageError, match="9 ranks .* 1 to 8"):
        run_ranks(9, rank_and_sum, 0.0)


def test_closing_leaves_no_process_and_no_folder() -> None:
    own = Pool()
    own.run(2, rank_and_sum, 0.0)
    pids, folder = own.pids(), own._folder.name
    own.close()
    assert not os.path.exists(folder)
    for pid in pids:
        assert not _running(pid)


def test_workers_end_when_the_caller_is_killed() -> None:
    program = (
        "import time, sys; from megallm.oracle.pool import Pool; from tests.oracle.test_pool import rank_and_sum\n"
        "if __name__ == '__main__':\n"
        "    p = Pool(); p.run(2, rank_and_sum, 0.0); print(*p.pids(), flush=True); time.sleep(60)\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    caller = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    pids = [int(word) for word in caller.stdout.readline().split()]
    assert len(pids) == 2
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}/stat") and _running(pid)]:
        assert time.monotonic() < deadline, f"{alive} outlived their caller"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
