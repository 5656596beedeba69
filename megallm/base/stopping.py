"""Which signals ask a run to stop, and the answer while there is nothing to save yet. Imports next
to nothing.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED, REQUEUE = 130, 75  # exit codes
NOTHING_TO_SAVE = "before the first step: there is nothing to save. The same command starts again."

_PR_SET_PDEATHSIG = 1
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


class StepAbandoned(Exception):
    """A step, or an evaluation, is given up on all ranks alike since the run was asked to stop: the
    state is as it was before, and is saved.
    """


class JobEnd:
    """When a batch system ends this job, in seconds of `time.time`, and when it began; `at` is None
    where that is not known.
    """

    def __init__(self) -> None:
        self.set(None)

    def set(self, at: float | None) -> None:
        """Take notice of the end of a job that begins now."""
        self.at, self.began = at, time.time()


JOB_END = JobEnd()  # of this process; ranks that it forks inherit it


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns what batch systems, `kill` and a terminal that closes send; without SIGHUP under
    `nohup`, which ignores it.
    """
    hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return _STOPPING if hangup else _STOPPING[:-1]


def ignore_stop_signals() -> None:
    """Ignore the signals that stop a run. The state is saved, or there is none: whatever still
    arrives changes nothing.
    """
    for number in (*stop_signals(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when `parent`, its direct parent, dies; no orphans hold
    ports or memory.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


@contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Let handlers of signals act when the context is left; what it yields gives a forked child
    their handlers back.

    An exception of a handler inside a hook of `os.fork` is swallowed, and the lock that the hook
    was to give back (that of `logging`, of imports) stays taken: any other thread that wants it
    waits for ever. A mask would not do: another thread may take the signal.
    """
    noted: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in signal.valid_signals()}
        before = {number: handler for number, handler in found.items() if callable(handler)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield restore
    finally:
        restore()
        for number in noted:
            before[number](number, None)


class BeforeRanks:
    """Handles signals while a run is still being prepared: says that there is nothing to save, and
    leaves at once.

    An exception would not do: it may be swallowed inside the imports that it interrupts.
    """

    def __init__(self) -> None:
        self.over = False  # ranks were started: what arrives after their end changes nothing

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        interrupted = number == signal.SIGINT
        how = "Interrupted" if interrupted else f"Stopped by {signal.Signals(number).name}"
        if select.select((), (2,), (), 0)[1]:  # a reader that does not read must not hold it up
            with suppress(OSError):
                os.write(2, f"megallm: {how} {NOTHING_TO_SAVE}\n".encode())
        os._exit(INTERRUPTED if interrupted else REQUEUE)


def hear_again() -> None:
    """Let the handlers of `before_ranks` act again: the ranks are gone, and others will follow."""
    for number in (*stop_signals(), signal.SIGINT):
        handler = signal.getsignal(number)
        if isinstance(handler, BeforeRanks):
            handler.over = False


@contextmanager
def before_ranks(wanted: bool) -> Iterator[None]:
    """Let `BeforeRanks` handle signals inside the context, if wanted and where handlers can be set.
    """
    installed = isinstance(signal.getsignal(signal.SIGTERM), BeforeRanks)
    if not wanted or installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = BeforeRanks()
    before = {number: signal.signal(number, handler) for number in (*stop_signals(), signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
