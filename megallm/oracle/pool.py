"""A pool of ranks (shared memory, gloo, or nccl on GPUs) that stays alive: importing torch costs
seconds, a call milliseconds.

Workers are forked from a server that has imported torch and run nothing (after one operation on two
threads a forked child hangs). Each call gets a process group of its own. A rank that raises ends:
its peers may sit in a collective that will never complete, so any failure rebuilds the whole pool.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megallm.base import shared_memory
from megallm.base.errors import Hang, InternalError, PeerLost, UsageError
from megallm.oracle import emulated_nccl
from megallm.oracle.emulated_device import EmulatedDevice
from megallm.oracle.emulated_nccl import NAME as EMULATED

MAX_RANKS = 8
BACKENDS = {
    "cpu": shared_memory.NAME,
    "gloo": "gloo",
    "cuda": "cpu:gloo,cuda:nccl",
    EMULATED: EMULATED,
}
GRACE_SECONDS = 1.0  # how long peers of a failed rank may still report before they are killed


class RankFailed(InternalError):
    """A rank raised; `rank` is the first one that did, `text` its traceback."""

    def __init__(self, rank: int, text: str, others: dict[int, str]) -> None:
        also = "".join(
            f"\nrank {r}, afterwards: {t.strip().splitlines()[-1]}"
            for r, t in sorted(others.items())
        )
        tagged = "".join(f"[rank {rank}] {line}\n" for line in text.rstrip().splitlines())
        super().__init__(f"rank {rank} raised:\n{tagged.rstrip()}{also}")
        self.rank, self.text = rank, text


@dataclass(frozen=True)
class _Call:
    """What every rank of one call receives."""

    size: int
    store: str
    timeout: float
    # cpu: shared memory; gloo; cuda: rank r takes GPU r, and CUDA tensors travel over nccl;
    # emulated: as there, on a CPU
    device: str
    path: list[str]  # the caller's sys.path, so that functions of test modules can be imported
    job: bytes  # pickled (fn, args); opened only after `path` is in force


@dataclass
class _Worker:
    process: ForkServerProcess
    wire: connection.Connection
    stack: Path  # where the worker writes its stack on SIGUSR1


class _Reporter(AbstractContextManager[None]):
    """Sends the traceback of whatever ends this rank, then ends it."""

    def __init__(self, wire: connection.Connection) -> None:
        self.wire = wire

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            text = "".join(traceback.format_exception(kind, error, trace))
            self.wire.send_bytes(pickle.dumps((False, text)))
            self.wire.close()
            os._exit(1)


def _serve(rank: int, wire: connection.Connection, stack: str) -> None:
    """A worker's life: a call, its answer, the release that says all ranks have answered, the next
    call.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with open(stack, "w") as file, _Reporter(wire):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        while (request := wire.recv_bytes()) != b"":
            call = pickle.loads(request)  # from our own process
            wire.send_bytes(pickle.dumps((True, _perform(rank, call))))
            wire.recv_bytes()
            dist.destroy_process_group()


def _perform(rank: int, call: _Call) -> Any:
    sys.path[:] = call.path
    fn, args = pickle.loads(call.job)  # from our own process
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    store = dist.FileStore(call.store, call.size)
    limit = timedelta(seconds=call.timeout)
    if call.device == "cpu":
        shared_memory.register()
    if call.device == "cuda":
        torch.cuda.set_device(rank)
    if call.device == EMULATED:
        emulated_nccl.register()
        emulated_nccl.EmulatedNccl.reset()
    dist.init_process_group(
        BACKENDS[call.device], store=store, rank=rank, world_size=call.size, timeout=limit
    )
    with EmulatedDevice() if call.device == EMULATED else nullcontext():
        return fn(*args)


class Pool:
    """Up to `MAX_RANKS` workers, started when first needed; `close` ends them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "megallm.oracle.pool"])
        self._folder = tempfile.TemporaryDirectory(prefix="megallm-ranks-")
        self._workers: list[_Worker] = []
        self._calls = 0

    def run(
        self,
        size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        device: str = "cpu",
    ) -> list[Any]:
        """Call `fn(*args)` on `size` ranks inside a fresh world (shared memory; `gloo`; on `cuda`
        nccl beside gloo; `emulated`: gloo by nccl's rules); the results, by rank.

        `fn` must be importable by name (no lambda, no nested function); it, its arguments and its
        results travel by pickle. Raises RankFailed with the first rank's traceback, PeerLost naming
        a rank that died without a word, Hang with the stacks of the ranks that had not answered
        after `timeout` seconds.
        """
        if not 1 <= size <= MAX_RANKS:
            raise UsageError(f"{size} ranks were asked for; the pool runs 1 to {MAX_RANKS}.")
        job = pickle.dumps((fn, args))
        self._start(size)
        self._calls += 1
        store = Path(self._folder.name) / f"store-{self._calls}"
        request = pickle.dumps(_Call(size, str(store), timeout, device, list(sys.path), job))
        deadline = time.monotonic() + timeout
        finished = False
        try:
            for rank, worker in enumerate(self._workers[:size]):
                self._send(rank, worker, request)
            results = self._collect(size, deadline)
            for worker in self._workers[:size]:
                worker.wire.send_bytes(b"release")
            finished = True
        finally:
            if not finished:
                self._kill()
        store.unlink(missing_ok=True)
        return results

    def close(self) -> None:
        """End every worker and remove the scratch folder."""
        self._kill()
        self._folder.cleanup()

    def pids(self) -> list[int]:
        """Process ids of the living workers, by rank."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def _start(self, size: int) -> None:
        for rank in range(len(self._workers), size):
            ours, theirs = self._context.Pipe()
            stack = Path(self._folder.name) / f"stack-{rank}"
            stack.touch()
            process = self._context.Process(
                target=_serve, args=(rank, theirs, str(stack)), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stack))

    def _send(self, rank: int, worker: _Worker, request: bytes) -> None:
        try:
            worker.wire.send_bytes(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerLost(self._obituary(rank) + " before this call began.") from error

    def _collect(self, size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        dead: dict[int, str] = {}
        waiting = {self._workers[rank].wire: rank for rank in range(size)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for wire in connection.wait(list(waiting), left):
                rank = waiting.pop(wire)
                try:
                    good, value = pickle.loads(wire.recv_bytes())  # from our own process
                except (EOFError, ConnectionResetError):
                    dead[rank] = self._obituary(rank)
                    good, value = False, None
                if good:
                    results[rank] = value
                elif value is not None:
                    failures[rank] = value
            if failures or dead:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if dead:  # the cause; what peers raised about a lost connection is its echo
            raise PeerLost(" ".join(dead[rank] + "." for rank in sorted(dead)))
        if failures:
            first = next(iter(failures))
            raise RankFailed(first, failures.pop(first), failures)
        if waiting:
            raise Hang(self._stacks(sorted(waiting.values())))
        return [results[rank] for rank in range(size)]

    def _obituary(self, rank: int) -> str:
        process = self._workers[rank].process
        process.join(GRACE_SECONDS)
        code = process.exitcode
        if code is not None and code < 0:
            return f"rank {rank} (process {process.pid}) was killed by {signal.Signals(-code).name}"
        return f"rank {rank} (process {process.pid}) ended with exit code {code} and no answer"

    def _stacks(self, ranks: list[int]) -> str:
        """Returns the sentence about ranks that have not answered, with where each of them is."""
        for rank in ranks:
            os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        lines = [
            f"no answer in time from rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}:"
        ]
        for rank in ranks:
            frames = self._workers[rank].stack.read_text().splitlines()
            own = [
                n for n, frame in enumerate(frames) if frame.endswith("in _perform")
            ]  # below it, only the pool
            lines += [f"[rank {rank}] {frame}" for frame in frames[: own[-1] if own else None]]
        return "\n".join(lines)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.wire.close()
        self._workers.clear()
