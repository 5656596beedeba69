"""Signals become requests that the loop honours between steps, when every rank agrees."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megallm.base.errors import Requeue
from megallm.base.stopping import JOB_END, NOTHING_TO_SAVE, stop_signals

NOTHING, INTERRUPTED, PREEMPTED = 0, 1, 2  # the larger one wins when ranks saw different signals
UNKNOWN_SAVE_SECONDS = 20.0


class SignalRequests:
    """The most urgent request seen so far on this rank; `told` is called once, in a thread, when
    the first comes.

    While `training` is False there is nothing to save: a signal then ends this rank at once.
    """

    def __init__(self) -> None:
        self.seen, self.name = NOTHING, ""
        self.told: Callable[[str], None] = lambda name: None
        self.training = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take notice of a signal."""
        name, interrupted = signal.Signals(number).name, number == signal.SIGINT
        self.ask(INTERRUPTED if interrupted else PREEMPTED, name)
        if self.training:
            return
        # What swallows it, such as an optional import, is overtaken by `seen` at the first step.
        if interrupted:
            raise KeyboardInterrupt(f"Interrupted {NOTHING_TO_SAVE}")
        raise Requeue(f"Stopped by {name} {NOTHING_TO_SAVE}")

    def ask(self, request: int, name: str) -> None:
        """Ask the run to stop; `name` says what did."""
        if self.seen == NOTHING:  # a handler runs anywhere in the main thread, even inside a write
            self.name = name
            threading.Thread(target=self.told, args=(name,), daemon=True).start()
        self.seen = max(self.seen, request)


class TimeLimit:
    """The end of this start of a run, foreseen: that of its batch job, or `minutes` after its
    process began, whichever comes first.

    What is left for stopping follows from the longest step and the longest save so far: 3 of each
    and 10 seconds, with UNKNOWN_SAVE_SECONDS for a save before there was one, and at most a quarter
    of the whole time.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.time) -> None:
        given = None if minutes is None else JOB_END.began + 60 * minutes
        ends = [end for end in (given, JOB_END.at) if end is not None]
        self.at = min(ends) if ends else None
        self.clock, self.whole = clock, (self.at or 0.0) - JOB_END.began
        self.step_seconds = self.save_seconds = 0.0

    def step(self, seconds: float) -> None:
        """Take notice of how long a step was."""
        self.step_seconds = max(self.step_seconds, seconds)

    def saved(self, seconds: float) -> None:
        """Take notice of how long a save was."""
        self.save_seconds = max(self.save_seconds, seconds)

    @property
    def near(self) -> bool:
        """Returns whether it is time to save and leave."""
        if self.at is None:
            return False
        save = self.save_seconds or UNKNOWN_SAVE_SECONDS
        reserve = min(10.0 + 3 * self.step_seconds + 3 * save, self.whole / 4)
        return self.clock() >= self.at - reserve


@contextmanager
def handle_signals() -> Iterator[SignalRequests]:
    """Turn SIGINT and `stop_signals` into requests inside the context; repeated signals change
    nothing.
    """
    requests = SignalRequests()
    before = {
        number: signal.signal(number, requests.note) for number in (*stop_signals(), signal.SIGINT)
    }
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
