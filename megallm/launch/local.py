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
import os
import pty
import secrets
import selectors
import signal
import socket
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from megallm.base.errors import MegallmError, PeerLost, Requeue, UsageError
from megallm.base.files import writing
from megallm.base.heartbeat import HEARTBEAT
from megallm.base.output import BackgroundWriter, descriptor
from megallm.base.stopping import INTERRUPTED, BeforeRanks, signals_held, stop_signals
from megallm.launch.board import HeartbeatBoard, RankState
from megallm.launch.child import Rank, hear, incident_of, moment
from megallm.launch.environment import LOOPBACK, RankEnv
from megallm.launch.fault import install_faults
from megallm.launch.incident import Incident
from megallm.launch.monitor import Monitor
from megallm.launch.rank import rank_main
from megallm.launch.restart import Start
from megallm.launch.stacks import StackFile, dump_stacks

POLL_SECONDS = 0.03
SETTLE_SECONDS = (
    0.3  # after a failure: peers may still say more about the cause, then they are killed
)
STOPPING = "stopping when this step is done; press Ctrl-C again to stop at once"
SHOW_SECONDS = 1.0  # at the end, for a reader that does not read


class RanksFailed(MegallmError):
    """A local rank failed; `exit_code` is that of the rank that failed first. `incident` says what
    happened, None when it was asked for; `last_step` is the last one that all ranks began.
    """

    def __init__(
        self, message: str, exit_code: int, incident: Incident | None = None, last_step: int = 0
    ) -> None:
        super().__init__(message)
        self.exit_code, self.incident, self.last_step = exit_code, incident, last_step


@dataclass(frozen=True)
class Hooks:
    """What the caller of `run_ranks` decides and hears while ranks run."""

    owns_logs: Callable[[int], bool] = lambda pid: True  # asked with the process id of rank 0
    event: Callable[[str, str, dict], None] = lambda kind, sentence, fields: None


NO_HOOKS = Hooks()


def run_ranks(
    fn: Callable[..., None],
    args: Sequence[Any],
    nproc: int | Start,
    log_dir: Path | None = None,
    preload: Sequence[str] = ("torch",),
    hooks: Hooks = NO_HOOKS,
    saves: bool = True,
) -> None:
    """Run `fn(env: RankEnv, *args)` in `nproc` forked ranks and wait for all of them; a Start says
    more about them, and has hangs looked for.

    Output goes to `log_dir/rank-N.log` (None: a folder that is removed afterwards), rank 0's also
    to ours. The first failure ends all ranks within a second and raises RanksFailed with that
    rank's number, cause, exit code and last lines; ranks that saved and left with 75 raise Requeue.
    SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU and SIGHUP (not under nohup) are passed on; so is a first
    SIGINT, while a second one ends everything at once. With `saves` False the ranks have nothing to
    save: what a handler of ours raises ends them at once, and is raised. `hooks.owns_logs` is asked
    before `log_dir` is written by the launcher.
    """
    begin = Start(nproc, hang_seconds=0.0) if isinstance(nproc, int) else nproc
    if begin.nproc < 1:
        raise UsageError(f"--nproc is {begin.nproc}; it must be at least 1.")
    for name in preload:
        importlib.import_module(name)
    if log_dir is not None:
        with writing(log_dir):
            log_dir.mkdir(parents=True, exist_ok=True)
        _Launch(fn, tuple(args), begin, log_dir, hooks).run(saves)
        return
    with tempfile.TemporaryDirectory(prefix="megallm-") as folder:
        _Launch(fn, tuple(args), begin, Path(folder), hooks).run(saves)


class _Launch:
    """One start of this node's ranks."""

    def __init__(
        self,
        fn: Callable[..., None],
        args: tuple[Any, ...],
        start: Start,
        log_dir: Path,
        hooks: Hooks,
    ) -> None:
        self.fn, self.args, self.begin, self.log_dir = fn, args, start, log_dir
        self.nproc, self.hooks = start.nproc, hooks
        self.token = start.token or secrets.token_hex(16)
        self.board = HeartbeatBoard(start.nproc, start.first_rank)
        self.stacks = [StackFile() for _ in range(start.nproc)]
        self.monitor = Monitor(self.board, start.hang_seconds, start.stages)
        self.hang: Incident | None = None
        self.states: list[RankState] = []
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
            self.states = self.board.all()
            self._kill()
            for number, handler in handlers.items():
                if isinstance(handler, BeforeRanks):
                    handler.over = True
                signal.signal(number, handler)
            for fd in list(self.screens) + [rank.report for rank in self.ranks]:
                os.close(fd)
            self.selector.close()
            for file in (self.board, *self.stacks):
                file.close()
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
        if self.hooks.owns_logs(self.ranks[0].pid if self.ranks else 0):
            self.log.write(data)

    def _fork_all(self) -> None:
        """Fork each rank with its log and a pipe on which it reports its end; signals are
        blocked.
        """
        alone = self.begin.world is None
        if not alone and self.begin.first_rank:  # rank 0 listens, on another node
            for number in range(self.nproc):
                self._fork(number, None)
            return
        address = (LOOPBACK, 0) if alone else (self.begin.host, self.begin.port)
        with socket.create_server(address, backlog=max(128, self.begin.size)) as server:
            for number in range(self.nproc):
                self._fork(number, server)

    def _place(self, number: int, server: socket.socket | None) -> RankEnv:
        begin = self.begin
        port = begin.port if server is None else server.getsockname()[1]
        listens = server is not None and number == 0
        return RankEnv(
            begin.first_rank + number,
            begin.size,
            number,
            self.nproc,
            begin.host,
            port,
            server.fileno() if server is not None and listens else None,
            attempt=begin.attempt,
            token=self.token,
        )

    def _fork(self, number: int, server: socket.socket | None) -> None:
        env = self._place(number, server)
        path = self.log_dir / f"rank-{env.rank}.log"
        log_begin = path.stat().st_size if path.exists() else 0
        if number == 0:
            pairs = [_terminal_or_pipe(sys.stdout), os.pipe()]
            outputs = (pairs[0][1], pairs[1][1])
        else:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            pairs, outputs = [], (file, file)
        read_end, write_end = os.pipe()
        parent = os.getpid()
        with signals_held() as let_through:
            pid = os.fork()
            if pid == 0:
                let_through()
                if number != 0 and server is not None:
                    server.close()
                fn = partial(self._joined, number)
                rank_main(fn, self.args, env, parent, outputs, write_end)
            os.set_blocking(read_end, False)
            self.ranks.append(Rank(env.rank, pid, path, log_begin, read_end))
        for fd in {*outputs, write_end}:
            os.close(fd)
        with suppress(
            PermissionError, ProcessLookupError
        ):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        for (fd, _), writer in zip(pairs, (self.out, self.err), strict=False):
            os.set_blocking(fd, False)
            self.screens[fd] = writer
            self.selector.register(fd, selectors.EVENT_READ)

    def _joined(self, number: int, env: RankEnv, *args: Any) -> None:
        """The function of a rank, in its process, with its heartbeat on the board."""
        self.board.join(number)
        self.stacks[number].answer()
        install_faults(HEARTBEAT, env.rank, env.attempt)
        self.fn(env, *args)

    def _watch(self) -> None:
        """Until all ranks have ended, SETTLE_SECONDS after the first that failed or never began, or
        until they hang.
        """
        deadline = float("inf")
        while (
            any(rank.status is None for rank in self.ranks)
            and time.monotonic() < deadline
            and self.interrupts < 2
            and self.hang is None
        ):
            for key, _ in self.selector.select(POLL_SECONDS):
                self._show(key.fd)
            for rank in self.ranks:
                self._reap(rank)
            if deadline == float("inf") and any(
                rank.failed or rank.left_early for rank in self.ranks
            ):
                deadline = time.monotonic() + SETTLE_SECONDS
            if deadline == float("inf"):
                self._look()
        for fd in list(self.selector.get_map()):
            while self._show(fd):
                pass

    def _look(self) -> None:
        """See whether the ranks move, and which are slow."""
        finding = self.monitor.look()
        if finding is not None:
            pids = {rank.number: rank.pid for rank in self.ranks if rank.status is None}
            files = {rank.number: file for rank, file in zip(self.ranks, self.stacks, strict=True)}
            self.hang = self.monitor.detected(finding, dump_stacks(pids, files))
        for sentence, fields in self.monitor.slow_ranks():
            self.hooks.event("straggler", sentence, fields)

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
        hear(rank, self.hooks.owns_logs(self.ranks[0].pid))

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
        last = min((state.step for state in self.states), default=0)
        if self.hang is not None:
            told = replace(self.hang, expected=self.stopping)  # no restart then
            raise RanksFailed("\n".join(told.lines()), told.code, told, last)
        # A rank killed by us ended at infinity. A lost peer is a consequence and an interrupt was
        # asked for: any other cause goes first.
        failed = [rank for rank in self.ranks if rank.failed and rank.ended_at < float("inf")]
        saved = [rank for rank in self.ranks if rank.code == Requeue.exit_code]
        told = self.stopping or any(rank.left_early for rank in self.ranks)
        if told and saved and all(rank.code == PeerLost.exit_code for rank in failed):
            failed = []  # they met the end of those that were told first
        if failed:
            first = min(
                failed,
                key=lambda rank: (rank.code in (PeerLost.exit_code, INTERRUPTED), moment(rank)),
            )
            incident = incident_of(first, self.begin.size, self.states)
            asked = self.stopping or first.code == INTERRUPTED
            raise RanksFailed(incident.sentence, first.code, None if asked else incident, last)
        if saved:
            raise Requeue(saved[0].cause())


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
