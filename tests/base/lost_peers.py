"""Ranks that lose a peer inside a collective over shared memory: `python -m tests.base.lost_peers FOLDER`.

One process imports torch and forks the two ranks of each scenario; rank 0 writes what it was told, and when.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megallm.base import shared_memory

LIMIT = 1.0  # seconds, of every group here
BIG = 8_000_000  # elements: more than there is room for between two ranks


def end(rank: int, how: int) -> None:
    """Rank 1 ends, or stops, while rank 0 waits for it."""
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), how)


def killed(rank: int) -> None:
    dist.all_reduce(torch.ones(BIG))
    end(rank, signal.SIGKILL)
    dist.all_reduce(torch.ones(BIG))


def killed_async(rank: int) -> None:
    work = dist.all_reduce(torch.ones(4), async_op=True) if rank == 0 else None
    end(rank, signal.SIGKILL)
    work.wait()


def killed_in_send(rank: int) -> None:
    works = [dist.isend(torch.ones(BIG), 1) for _ in range(2 - 2 * rank)]
    end(rank, signal.SIGKILL)
    for work in works:
        work.wait()


def killed_in_receive(rank: int) -> None:
    """The first of two messages comes."""
    if rank == 1:
        dist.isend(torch.ones(10), 0)
    works = [dist.irecv(torch.empty(10), 1) for _ in range(2 - 2 * rank)]
    end(rank, signal.SIGKILL)
    works[0].wait()
    works[1].wait()


def left(rank: int) -> None:
    """It has done all that it was asked, and one collective less."""
    if rank == 1:
        time.sleep(0.2)
        return
    dist.all_reduce(torch.ones(4))


def stopped(rank: int) -> None:
    end(rank, signal.SIGSTOP)
    dist.all_reduce(torch.ones(4))


def stopped_async(rank: int) -> None:
    work = dist.irecv(torch.ones(4), 1) if rank == 0 else None
    end(rank, signal.SIGSTOP)
    work.wait()


def destroyed(rank: int) -> None:
    if rank == 1:
        time.sleep(0.6)
        return
    work = dist.irecv(torch.ones(4), 1)
    time.sleep(0.2)
    dist.destroy_process_group()
    work.wait()


def mismatch(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(4))
    else:
        dist.broadcast(torch.ones(4), 0)
        time.sleep(0.5)


SCENARIOS: dict[str, Callable[[int], None]] = {
    function.__name__: function
    for function in (
        killed, killed_async, killed_in_send, killed_in_receive, left, stopped, stopped_async, destroyed, mismatch,
    )
}  # fmt: skip


def perform(name: str, rank: int, folder: Path) -> None:
    """One rank of a scenario."""
    store, limit = dist.FileStore(str(folder / f"{name}.store"), 2), timedelta(seconds=LIMIT)
    dist.init_process_group(shared_memory.register(), store=store, rank=rank, world_size=2, timeout=limit)
    assert isinstance(dist.group.WORLD, shared_memory.SharedMemoryGroup)
    dist.barrier()
    begin = time.monotonic() + 0.2  # when the peer ends
    if rank == 1:
        try:
            SCENARIOS[name](rank)
        finally:
            os._exit(0)
    told = {"kind": "", "error": ""}
    try:
        SCENARIOS[name](rank)
    except RuntimeError as error:
        told = {"kind": type(error).__name__, "error": str(error)}
    told["seconds"] = time.monotonic() - begin + (0.2 if name.startswith("stopped") else 0)
    (folder / f"{name}.json").write_text(json.dumps(told))
    os._exit(0)


def main() -> None:
    """All scenarios at once."""
    folder, pids = Path(sys.argv[1]), {}
    try:
        for name in SCENARIOS:
            for rank in (0, 1):
                pid = os.fork()
                if pid == 0:
                    perform(name, rank, folder)
                pids[name, rank] = pid
        for name in SCENARIOS:
            os.waitpid(pids.pop((name, 0)), 0)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
