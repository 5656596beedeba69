"""Saving while training goes on: a step pays one copy of its state into memory that a writer
process shares.

Each rank copies its parts into the bytes of its shard file and starts a thread, which has the
writer process write them and leaves what it reports beside the shard. The thread of rank 0 waits
for the reports of all ranks and commits as `store.save` does: no collective runs after the copy.
One save is under way at a time.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.base.errors import CannotWrite, InternalError
from megallm.base.files import atomic_write_json, writing
from megallm.checkpoint.io import DTYPE_NAMES, Part, ShardPlan, copy_bytes, plan_shard
from megallm.checkpoint.store import (
    MeshProtocol,
    RetentionPolicy,
    assemble,
    begin_save,
    failure,
    finish_save,
    raise_failure,
    shard_name,
    shard_report,
)

_POLL_SECONDS = 0.02
_LATE_SECONDS = 600.0  # how much later than rank 0's own another rank's report may come


@dataclass(frozen=True)
class SaveResult:
    """How a save ended on this rank: seconds from its beginning, and what `failure` says or {}."""

    step: int
    seconds: float
    outcome: dict[str, Any]

    def check(self) -> None:
        """Raise the error with which the save failed, if it did."""
        raise_failure(self.outcome)


class AsyncSaver:
    """Saves steps under `root` beside training; made on every rank of `mesh`.

    It holds a second copy of the rank's state in memory from the first save on.
    """

    def __init__(self, root: str | os.PathLike[str], mesh: MeshProtocol) -> None:
        self.root, self.mesh = Path(root), mesh
        self._memory = SharedMemory()
        self._writer: WriterProcess | None = None
        self._thread: threading.Thread | None = None
        self._under_way = False
        self._result: SaveResult | None = None

    def prepare(self, parts: Sequence[Part]) -> None:
        """Prepare the memory for `parts` and the writer process beside training; not collective.

        Without it the first save pays for both.
        """
        nbytes = plan_shard(parts).nbytes
        self._start_writer()
        self._thread = threading.Thread(target=self._prepare, args=(nbytes,), daemon=True)
        self._thread.start()

    def _prepare(self, nbytes: int) -> None:
        with suppress(OSError):  # the first save meets it again, and tells
            self._memory.grow(nbytes)

    def _start_writer(self) -> WriterProcess:
        """Returns the writer process, a new one when there is none that lives.

        The kernel ends it with the thread that started it, so that is not one of ours.
        """
        if self._writer is None or not self._writer.alive:
            self._writer = WriterProcess(self._memory.fd)
        return self._writer

    def _hand_over(self, plan: ShardPlan) -> WriterProcess | CannotWrite:
        """Returns the writer process, with the state in its memory, or why there is none: what one
        rank meets is told with its report, since the others go on.
        """
        try:
            with writing(self.root):
                self._memory.fill(plan)
            return self._start_writer()
        except CannotWrite as error:
            return error

    @property
    def busy(self) -> bool:
        """Whether this rank still writes, or as rank 0 waits for another that does."""
        return self._under_way and self._thread is not None and self._thread.is_alive()

    def start(
        self, step: int, parts: Sequence[Part], meta: Any, keeping: RetentionPolicy
    ) -> None:
        """Copy the state and return; collective over the world, with no save under way on any rank.

        The arguments and errors are those of `store.save`, but for what writing meets, which
        `result` tells later.
        """
        if self._under_way:
            raise InternalError("A save was started before the result of the one before was taken.")
        self.wait()
        begin, first = time.monotonic(), self.mesh.world.rank == 0
        begun = self.mesh.broadcast_json(begin_save(self.root, step, keeping) if first else None)
        raise_failure(begun)
        plan = plan_shard(parts)
        writer = self._hand_over(plan)
        kept = json.loads(json.dumps(meta))  # what counts is how it is now
        under_way = _Save(
            self.root / begun["folder"], step, self.mesh.world.rank, self.mesh.world.size, plan
        )

        def run() -> None:
            outcome = _write(under_way, writer)
            if first:
                outcome = _commit(self.root, under_way, outcome, kept, keeping)
            self._result = SaveResult(step, time.monotonic() - begin, outcome)

        self._under_way = True
        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()

    def result(self) -> SaveResult | None:
        """Returns how the save ended that ended here since the last call; None without one.

        That of rank 0 is the save's, those of the others are their shards'. Not collective.
        """
        if not self._under_way or self.busy:
            return None
        self._under_way = False
        result, self._result = self._result, None
        if result is None:
            raise InternalError("The thread that saves a checkpoint ended without a result.")
        return result

    def wait(self) -> None:
        """Wait until what is under way has ended on this rank."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the writer process; a save under way is given up."""
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True)
class _Save:
    """A save under way, as one rank sees it."""

    folder: Path
    step: int
    rank: int
    size: int
    plan: ShardPlan

    def report_path(self, rank: int) -> Path:
        return self.folder / f"{shard_name(rank)}.json"

    def job(self) -> dict[str, Any]:
        """Returns what the writer process must know."""
        pieces = [
            (part.name, DTYPE_NAMES[part.tensor.dtype], offset, offset + box.size * part.tensor.itemsize)
            for part, box, offset in self.plan.pieces
        ]  # fmt: skip
        return {
            "path": str(self.folder / shard_name(self.rank)),
            "step": self.step,
            "header_bytes": len(self.plan.header),
            "nbytes": self.plan.nbytes,
            "pieces": pieces,
        }


def _write(save: _Save, writer: WriterProcess | CannotWrite) -> dict[str, Any]:
    """Have the shard written and its report laid beside it; returns the failure or {}."""
    report = _report(save, writer)
    try:
        atomic_write_json(save.report_path(save.rank), report)
    except CannotWrite as error:
        return failure(error)
    return {"error": report["error"], "kind": report["kind"]} if "error" in report else {}


def _report(save: _Save, writer: WriterProcess | CannotWrite) -> dict[str, Any]:
    if isinstance(writer, CannotWrite):
        return failure(writer)
    if not save.plan.parts:
        return {"files": {}, "tensors": {}}
    try:
        reply = writer.ask(save.job())
    except CannotWrite as error:
        return failure(error)
    if "error" in reply:
        return reply
    name = shard_name(save.rank)
    return shard_report(name, *save.plan.record(name, reply["digests"]))


def _commit(
    root: Path, save: _Save, own: dict[str, Any], meta: Any, keeping: RetentionPolicy
) -> dict[str, Any]:
    """Wait for the reports of all ranks, then commit or remove the folder; returns the failure or
    {}. `own` is what rank 0's own part came to.
    """

    def assembled() -> Any:
        raise_failure(own)
        deadline = time.monotonic() + _LATE_SECONDS
        reports = [_await_report(save, rank, deadline) for rank in range(save.size)]
        with writing(save.folder):
            for rank in range(save.size):
                save.report_path(rank).unlink()
        return assemble(save.step, reports, meta)

    return finish_save(root, save.folder, keeping, assembled)


def _await_report(save: _Save, rank: int, deadline: float) -> dict[str, Any]:
    """Returns what `rank` reports. Errors: `CannotWrite` when that does not come."""
    path = save.report_path(rank)
    while not path.exists():
        if time.monotonic() > deadline:
            raise CannotWrite(
                f"Rank {rank} has not written its part of step {save.step} within "
                f"{_LATE_SECONDS:.0f} s of rank 0, or {save.folder} is not on a file system that "
                "all hosts share."
            )
        time.sleep(_POLL_SECONDS)
    with writing(path):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


class SharedMemory:
    """Anonymous memory that the writer process maps too; grows when a file needs more."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("megallm-checkpoint")
        self.nbytes = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fill(self, plan: ShardPlan) -> None:
        """Copy the header and every piece to where they stand in the file (raises OSError)."""
        self.grow(plan.nbytes)
        header = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
        self._bytes[: len(plan.header)] = header
        for part, box, offset in plan.pieces:
            source = part.tensor.detach()[box.slices(part.box)]
            place = self._bytes[offset : offset + box.size * source.itemsize]
            copy_bytes(place.view(source.dtype).view(box.shape), source)

    def grow(self, nbytes: int) -> None:
        """Make room for `nbytes`, with its pages in place (raises OSError)."""
        if nbytes <= self.nbytes:
            return
        os.posix_fallocate(self.fd, 0, nbytes)  # now, so that too little memory is an error here
        mapped = mmap.mmap(self.fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self.nbytes = nbytes


class WriterProcess:
    """The process of `checkpoint.writer`; one job at a time, and none after it has died."""

    def __init__(self, fd: int) -> None:
        with writing("a checkpoint"):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megallm.checkpoint.writer", str(fd), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[fd],
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply to `job`. Errors: `CannotWrite` when the process dies instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.close()
            raise CannotWrite(
                f"Cannot write {job['path']}: the process that writes it ended with status "
                f"{self._process.returncode}; the next save starts another."
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
