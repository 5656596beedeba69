"""Signals become requests that the loop honours between steps, when every rank agrees."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megallm.base.stopping import stop_signals

NOTHING, INTERRUPTED, PREEMPTED = 0, 1, 2  # the larger one wins when ranks saw different signals


class SignalRequests:
    """The most urgent request seen so far on this rank; `told` is called once, in a thread, when
    the first comes.
    """

    def __init__(self) -> None:
        self.seen, self.name = NOTHING, ""
        self.told: Callable[[str], None] = lambda name: None

    def note(self, number: int, frame: FrameType | None) -> None:
        if (
            self.seen == NOTHING
        ):  # the handler runs anywhere in the main thread, perhaps inside a write
            self.name = signal.Signals(number).name
            threading.Thread(target=self.told, args=(self.name,), daemon=True).start()
        self.seen = max(self.seen, INTERRUPTED if number == signal.SIGINT else PREEMPTED)


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
