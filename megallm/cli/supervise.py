"""Verbs that may take long: a child process does the work; this one shows progress and ends it when
it is asked to.

Work may sit in a library for minutes (training a tokenizer, sorting), where no signal handler of
Python runs. So the child is asked first, which lets it clean up, and killed when it has not ended
within GRACE_SECONDS.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megallm.base.errors import InternalError
from megallm.base.stopping import INTERRUPTED
from megallm.base.terminal import escaped
from megallm.cli.board import BOARD, Note

GRACE_SECONDS = 1.2

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TICK_SECONDS = 0.1  # between looks at the child
_FIRST_SECONDS, _LINE_SECONDS = (
    5.0,
    10.0,
)  # without a terminal: when the first plain line comes, and the others
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Terminated(BaseException):
    """SIGTERM or SIGHUP came; carried through every cleanup, like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def supervised(verb: str, kept: str, work: Callable[[], int]) -> int:
    """Call `work` in a child process and return its exit code; in the child, return what `work`
    returns.

    kept: a sentence for the one who interrupts it, about what is kept and how to go on. A child
    that a signal ended ends this process by the same one.
    """
    BOARD.open()
    sys.stdout.flush()
    sys.stderr.flush()
    wanted = [number for number in _STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*wanted, signal.SIGCHLD))
    parent, process = os.getpid(), _library()
    process.prctl(
        _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # what the child started comes to us when it ends
    pid = os.fork()
    if pid == 0:
        process.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be asked to say so
            os._exit(InternalError.exit_code)
        _Handlers(wanted)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return work()
    status, asked, killed = _watch(pid, verb, wanted)
    while (
        signal.sigtimedwait(wanted, 0) is not None
    ):  # of a terminal, which the child obeyed before we looked
        pass
    if asked:
        _end_orphans()
    if killed:
        say_stopped(asked, kept)
        if asked == signal.SIGINT:
            return INTERRUPTED
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _ending(os.waitstatus_to_exitcode(status), asked)


def _library() -> Any:
    """Returns the C library."""
    import ctypes  # takes 20 ms that `megallm --help` need not

    return ctypes.CDLL(None)


def say_stopped(number: int, kept: str) -> None:
    """Say the last word of a verb that was interrupted."""
    note = BOARD.read()
    if note is not None and note.said:
        return  # by the child, which then took too long to leave
    BOARD.end(said=True)
    how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    print(f"megallm: error: {how}{f'; {kept}' if kept else '.'}", file=sys.stderr)


def die_of(number: int) -> int:
    """End this process by a signal, as whoever sent it expects; 128 + its number should it
    survive.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    os.kill(os.getpid(), number)
    return 128 + number


class _Handlers:
    """What the child does when it is asked to stop: once, since a second signal would interrupt the
    cleanup.
    """

    def __init__(self, numbers: list[signal.Signals]) -> None:
        self._numbers = numbers
        for number in numbers:
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in self._numbers:
            signal.signal(
                other, signal.SIG_IGN
            )  # Python would set a handler of ours back to the default at its end
        sys.unraisablehook = _quiet  # it may come where nothing can be raised; then we are killed
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def _quiet(what: object) -> None:
    """Says nothing about an exception that Python has to drop."""


def _watch(pid: int, verb: str, wanted: list[signal.Signals]) -> tuple[int, int, bool]:
    """Wait for the child and show its progress; (its status, the signal that it was asked to stop
    by or 0, whether it had to be killed)."""
    screen = _Screen(verb)
    asked, deadline, killed = 0, float("inf"), False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, asked, killed
        if time.monotonic() > deadline and not killed:
            killed = True
            os.kill(pid, signal.SIGKILL)
        screen.draw()
        came = signal.sigtimedwait((*wanted, signal.SIGCHLD), _TICK_SECONDS)
        if came is not None and came.si_signo != signal.SIGCHLD and not asked:
            asked, deadline = came.si_signo, time.monotonic() + GRACE_SECONDS
            with suppress(ProcessLookupError):
                os.kill(
                    pid, asked
                )  # a terminal sent it to both of us, anyone else to this process only


def _end_orphans() -> None:
    """Kill what the child had started and left behind: a server of processes, its workers."""
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    with suppress(
        OSError
    ):  # a kernel without this file: they end by themselves when their pipes close
        while orphans := own.read_text().split():
            for orphan in map(int, orphans):
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)


def _ending(code: int, asked: int) -> int:
    """Our exit code for that of the child, below 0 when a signal ended it."""
    if code >= 0:
        return code
    if -code == signal.SIGINT:
        return INTERRUPTED
    if asked or -code in _STOPS:
        return die_of(asked or -code)
    name = signal.Signals(-code).name
    why = (
        ": a kill that nobody asked for mostly means that memory ran out"
        if -code == signal.SIGKILL
        else ""
    )
    print(
        f"megallm: error: the process that did the work was ended by {name}{why}.", file=sys.stderr
    )
    return InternalError.exit_code


class _Screen:
    """Progress on standard error: on a terminal a line that is written again, elsewhere a plain
    line now and then.
    """

    def __init__(self, verb: str) -> None:
        self._verb, self._begin, self._note = verb, time.monotonic(), Note()
        self._live, self._next = sys.stderr.isatty(), _FIRST_SECONDS
        if self._live:
            self._next = 1.0

    def draw(self) -> None:
        """Show the last note, when it is time to."""
        seconds = time.monotonic() - self._begin
        if seconds < self._next:
            return
        self._note = BOARD.read() or self._note
        if not self._note.shown:
            return
        line = escaped(line_of(self._verb, self._note, seconds))
        with suppress(OSError):  # a terminal that is gone: the child will notice by itself
            if self._live:
                BOARD.drawn()
                width = shutil.get_terminal_size().columns - 1
                os.write(2, f"\r\x1b[2K{line[:width]}\r".encode())
                self._next = seconds + 0.3
            else:
                os.write(2, f"{line}\n".encode())
                self._next = seconds + _LINE_SECONDS


def line_of(verb: str, note: Note, seconds: float) -> str:
    """Returns `curate | read > quality | 12 of 80 shards, 15 % | 0:42`."""
    parts = [verb, note.phase or "working"]
    if note.done or note.total:
        counted = _counted(note.done, note.unit)
        if note.total:
            of = _counted(note.total, note.unit)
            counted = (
                f"{counted} of {of} {_name(note.unit)}".rstrip()
                + f", {100 * note.done // note.total} %"
            )
        else:
            counted = f"{counted} {_name(note.unit)}".rstrip()
        parts.append(counted)
    minutes, rest = divmod(int(seconds), 60)
    clock = (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )
    return " | ".join([*parts, clock])


def _counted(number: int, unit: str) -> str:
    return f"{number / 2**20:,.1f}" if unit == "bytes" else f"{number:,}"


def _name(unit: str) -> str:
    return "MiB" if unit == "bytes" else unit
