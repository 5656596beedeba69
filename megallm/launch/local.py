"""Start the ranks of one machine, show rank 0, and end them all when one fails. No torch at import.

What rank 0 writes is always read, and shown by threads: a terminal or a reader that is stuck holds
nobody up.

The launcher imports what the ranks need and forks: importing torch costs seconds, a fork
milliseconds. It must not run a tensor operation itself (after one on two threads, a forked child
hangs). Rank 0's socket is opened before the fork and inherited, so that no port can be taken in
between.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import selectors
import signal
import socket
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megallm.base.errors import InternalError, MegallmError, PeerLost, Requeue, UsageError
from megallm.base.files import writing
from megallm.base.output import BackgroundWriter, descriptor
from megallm.base.stopping import INTERRUPTED, NOTHING_TO_SAVE, BeforeRanks, stop_signals
from megallm.launch.environment import LOOPBACK, RankEnv
from megallm.launch.rank import RankExit, rank_main

POLL_SECONDS = 0.03
SETTLE_SECONDS = (
    0.3  # after a failure: peers may still say more about the cause, then they are killed
)
TAIL_LINES = 20
STOPPING = "stopping when this step is done; press Ctrl-C again to stop at once"
SHOW_SECONDS = 1.0  # at the end, for a reader that does not read


class RanksFailed(MegallmError):
    """A local rank failed; `exit_code` is that of the rank that failed first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Rank:
    """One child process as the launcher sees it."""

    number: int
    pid: int
    log: Path
    log_begin: int  # size of the log when the rank started: what stands before is of earlier runs
    report: int
    status: int | None = None  # of waitpid
    ended_at: float = 0.0
    ending: RankExit | None = None

    @property
    def failed(self) -> bool:
        """Ended otherwise than by finishing or by saving for a requeue."""
        return self.status is not None and self.code not in (0, Requeue.exit_code)

    @property
    def left_early(self) -> bool:
        """Ended by a signal before it trained: nobody it would have met can go on, as in gloo's
        rendezvous.
        """
        return self.ending is not None and self.ending.message.endswith(NOTHING_TO_SAVE)

    @property
    def code(self) -> int:
        """Exit code; a death by signal is 128 + its number, an exit 0 without a report is not a
        success.
        """
        if self.ending is not None:
            return self.ending.code
        code = os.waitstatus_to_exitcode(self.status or 0)
        if code < 0:
            return 128 - code
        return code or InternalError.exit_code

    def cause(self) -> str:
        """Returns what happened, in words."""
        if self.ending is not None:
            return self.ending.message
        code = os.waitstatus_to_exitcode(self.status or 0)
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return f"it left with exit code {code} before its end"


def run_ranks(
    fn: Callable[..., None],
    args: Sequence[Any],
    nproc: int,
    log_dir: Path | None = None,
    preload: Sequence[str] = ("torch",),
    owns_logs: Callable[[int], bool] = lambda pid: True,
    saves: bool = True,
) -> None:
    """Run `fn(env: RankEnv, *args)` in `nproc` forked ranks and wait for all of them.

    Output goes to `log_dir/rank-N.log` (None: a folder that is removed afterwards), rank 0's also
    to ours. The first failure ends all ranks within a second and raises RanksFailed with that
    rank's number, cause, exit code and last lines; ranks that saved and left with 75 raise Requeue.
    SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU and SIGHUP (not under nohup) are passed on; so is a first
    SIGINT, while a second one ends everything at once. With `saves` False the ranks have nothing to
    save: what a handler of ours raises ends them at once, and is raised. `owns_logs(process id of
    rank 0)` is asked before `log_dir` is written by the launcher.
    """
    if nproc < 1:
        raise UsageError(f"--nproc is {nproc}; it must be at least 1.")
    for name in preload:
        importlib.import_module(name)
    if log_dir is not None:
        with writing(log_dir):
            log_dir.mkdir(parents=True, exist_ok=True)
        _Launch(fn, tuple(args), nproc, log_dir, owns_logs).run(saves)
        return
    with tempfile.TemporaryDirectory(prefix="megallm-") as folder:
        _Launch(fn, tuple(args), nproc, Path(folder), owns_logs).run(saves)


class _Launch:
    """One start of `nproc` ranks."""

    def __init__(
        self,
        fn: Callable[..., None],
        args: tuple[Any, ...],
        nproc: int,
        log_dir: Path,
        owns_logs: Callable[[int], bool],
    ) -> None:
        self.fn, self.args, self.nproc, self.log_dir, self.owns_logs = (
            fn,
            args,
            nproc,
            log_dir,
            owns_logs,
        )
        self.ranks: list[Rank] = []
        self.selector = selectors.DefaultSelector()
        self.out = BackgroundWriter(descriptor(sys.stdout, 1))
        one = os.path.sameopenfile(
            self.out.fd, descriptor(sys.stderr, 2)
        )  # `2>&1`: keep the order of the lines
        self.err = self.out if one else BackgroundWriter(descriptor(sys.stderr, 2))
        self.log = BackgroundWriter(
            os.open(log_dir / "rank-0.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        )
        self.screens: dict[int, BackgroundWriter] = {}  # rank 0's output -> ours
        self.interrupts, self.stopping = 0, False
        self.passed: tuple[int, int] | None = (
            None  # the last signal passed on, and how many ranks there were
        )

    def run(self, saves: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # full disks do not matter before there is anything to say
                stream.flush()
        # A signal between a fork and the child's own handlers would run ours in the child; one that
        # comes before all ranks are there would miss some.
        heard = (*stop_signals(), signal.SIGINT)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        handlers = {number: signal.signal(number, self._pass_on) for number in heard[:-1] if saves}
        if saves:
            handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        try:
            try:
                self._fork_all()
            finally:
                early = self.passed  # another thread of this process may have taken it meanwhile
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if early is not None:
                number, told = early
                self._tell(self.ranks[told:], number)
            self._watch()
        finally:
            self._kill()
            for number, handler in handlers.items():
                if isinstance(handler, BeforeRanks):
                    handler.over = True
                signal.signal(number, handler)
            for fd in list(self.screens) + [rank.report for rank in self.ranks]:
                os.close(fd)
            self.selector.close()
            self._finish_output()
        self._judge()

    def _finish_output(self) -> None:
        """Wait for readers that read, and tell what the others missed."""
        for name, writer in (("stdout", self.out), ("stderr", self.err)):
            lost = writer.close(SHOW_SECONDS)
            if lost and (name == "stdout" or writer is not self.out):
                told = f"megallm: {lost} lines could not be written to {name} ({writer.reason}).\n"
                told = told.encode()
                self._log(told)
                if writer is not self.err:
                    self.err.write(told)
                    self.err.close(SHOW_SECONDS)
        lost = self.log.close(SHOW_SECONDS)
        if lost:
            self.err.write(
                f"megallm: {lost} lines are missing in {self.log_dir} "
                f"({self.log.reason}).\n".encode()
            )
            self.err.close(SHOW_SECONDS)
        os.close(self.log.fd)

    def _log(self, data: bytes) -> None:
        if self.owns_logs(self.ranks[0].pid if self.ranks else 0):
            self.log.write(data)

    def _fork_all(self) -> None:
        """Fork each rank with its log and a pipe on which it reports its end; signals are
        blocked.
        """
        with socket.create_server((LOOPBACK, 0), backlog=max(128, self.nproc)) as server:
            for number in range(self.nproc):
                self._fork(number, server)

    def _fork(self, number: int, server: socket.socket) -> None:
        listen_fd = server.fileno() if number == 0 else None
        env = RankEnv(
            number, self.nproc, number, self.nproc, LOOPBACK, server.getsockname()[1], listen_fd
        )
        path = self.log_dir / f"rank-{env.rank}.log"
        log_begin = path.stat().st_size if path.exists() else 0
        if env.rank == 0:
            pairs = [_terminal_or_pipe(sys.stdout), os.pipe()]
            outputs = (pairs[0][1], pairs[1][1])
        else:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            pairs, outputs = [], (file, file)
        read_end, write_end = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            if number != 0:
                server.close()
            rank_main(self.fn, self.args, env, parent, outputs, write_end)
        for fd in {*outputs, write_end}:
            os.close(fd)
        with suppress(
            PermissionError, ProcessLookupError
        ):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        os.set_blocking(read_end, False)
        self.ranks.append(Rank(env.rank, pid, path, log_begin, read_end))
        for (fd, _), writer in zip(pairs, (self.out, self.err), strict=False):
            os.set_blocking(fd, False)
            self.screens[fd] = writer
            self.selector.register(fd, selectors.EVENT_READ)

    def _watch(self) -> None:
        """Until all ranks have ended, or SETTLE_SECONDS after the first that failed or never
        began.
        """
        deadline = float("inf")
        while (
            any(rank.status is None for rank in self.ranks)
            and time.monotonic() < deadline
            and self.interrupts < 2
        ):
            for key, _ in self.selector.select(POLL_SECONDS):
                self._show(key.fd)
            for rank in self.ranks:
                self._reap(rank)
            if deadline == float("inf") and any(
                rank.failed or rank.left_early for rank in self.ranks
            ):
                deadline = time.monotonic() + SETTLE_SECONDS
        for fd in list(self.selector.get_map()):
            while self._show(fd):
                pass

    def _show(self, fd: int) -> bool:
        """Copy what rank 0 wrote to its log and to our own output; False when there is nothing
        (more).
        """
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:  # a terminal whose other end closed
            data = b""
        if not data:
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
            return False
        if not os.isatty(
            fd
        ):  # what is drawn on a terminal is no log; the rank then keeps one itself
            self._log(data)
        self.screens[fd].write(data)
        return True

    def _reap(self, rank: Rank) -> None:
        if rank.status is not None:
            return
        pid, status = os.waitpid(rank.pid, os.WNOHANG)
        if pid == 0:
            return
        rank.status, rank.ended_at = status, time.monotonic()
        _hear(rank, self.owns_logs(self.ranks[0].pid))

    def _kill(self) -> None:
        """End every rank that still runs, and collect it."""
        for rank in self.ranks:
            if rank.status is None:
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            if rank.status is None:
                rank.status, rank.ended_at = os.waitpid(rank.pid, 0)[1], float("inf")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping, self.passed = True, (number, len(self.ranks))
        self._tell(self.ranks, number)

    @staticmethod
    def _tell(ranks: Sequence[Rank], number: int) -> None:
        for rank in ranks:
            if rank.status is None:
                os.kill(rank.pid, number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        if self.interrupts == 1:
            if not os.isatty(self.out.fd):  # there rank 0 says it, above its panel
                self.err.write(f"megallm: {STOPPING}\n".encode())
            self._pass_on(number, frame)

    def _judge(self) -> None:
        """Raise what the ended ranks mean; return when all finished."""
        if self.interrupts >= 2:
            text = (
                "Interrupted twice: all ranks were ended at once. The same command goes on from "
                "what was saved."
            )
            raise RanksFailed(text, INTERRUPTED)
        # A rank killed by us ended at infinity. A lost peer is a consequence and an interrupt was
        # asked for: any other cause goes first.
        failed = [rank for rank in self.ranks if rank.failed and rank.ended_at < float("inf")]
        saved = [rank for rank in self.ranks if rank.code == Requeue.exit_code]
        if self.stopping and saved and all(rank.code == PeerLost.exit_code for rank in failed):
            failed = []  # they met the end of those that were told first
        if failed:
            first = min(
                failed,
                key=lambda rank: (rank.code in (PeerLost.exit_code, INTERRUPTED), _moment(rank)),
            )
            raise RanksFailed(_describe(first, self.nproc), first.code)
        if saved:
            raise Requeue(saved[0].cause())


def _moment(rank: Rank) -> float:
    return rank.ending.at if rank.ending is not None else rank.ended_at


def _hear(rank: Rank, keep: bool) -> None:
    """Read what the rank reported of its end, if it did; `keep` it in the rank's log."""
    try:
        said = os.read(rank.report, 1 << 20)
    except BlockingIOError:
        return
    if not said:
        return
    rank.ending = RankExit(**json.loads(said))
    if (
        keep and rank.ending.expected and rank.ending.message
    ):  # ours to show; the rank's log keeps it too
        with suppress(OSError), rank.log.open("a") as log:
            log.write(f"megallm: error: {rank.ending.message}\n")


def _describe(rank: Rank, nproc: int) -> str:
    if rank.code == INTERRUPTED and rank.ending is not None:
        return rank.cause()
    if rank.ending is not None and rank.ending.expected:
        return rank.cause() if nproc == 1 else f"rank {rank.number}: {rank.cause()}"
    if rank.ending is not None and rank.number == 0:
        return (
            f"rank 0 of {nproc} failed: {rank.cause()}. What it wrote stands above, and in "
            f"{rank.log}."
        )
    lines = (
        rank.log.read_bytes()[rank.log_begin :][-8192:]
        .decode(errors="replace")
        .splitlines()[-TAIL_LINES:]
    )
    tail = "".join(f"\n    {line}" for line in lines) or " (empty)"
    return f"rank {rank.number} of {nproc} failed: {rank.cause()}. {rank.log} ends with:{tail}"


def _terminal_or_pipe(stream: Any) -> tuple[int, int]:
    """(read end, write end) for rank 0: a pseudo-terminal of our size when we write to a terminal,
    else a pipe.
    """
    if not stream.isatty():
        return os.pipe()
    read_end, write_end = pty.openpty()
    size = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(write_end, termios.TIOCSWINSZ, size)
    return read_end, write_end
