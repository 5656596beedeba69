"""Signals become requests that the loop honours between steps, when every rank agrees."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTHING, INTERRUPTED, PREEMPTED = 0, 1, 2  # the larger one wins when ranks saw different signals

_MEANING = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


class Requests:
    """The most urgent request seen so far on this rank."""

    def __init__(self) -> None:
        self.seen = NOTHING

    def note(self, number: int, frame: FrameType | None) -> None:
        self.seen = max(self.seen, _MEANING[signal.Signals(number)])


@contextmanager
def listening() -> Iterator[Requests]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into requests inside the context; repeated signals change nothing."""
    requests = Requests()
    before = {number: signal.signal(number, requests.note) for number in _MEANING}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
