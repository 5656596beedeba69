"""The line that says what a step is doing now: a rollout and how far it is, rewards, an update."""

from __future__ import annotations

import time
from collections.abc import Callable

from megallm.run.console import format_count

EVERY_SECONDS = 0.2  # between two lines


class PhaseLine:
    """Tells phases and the tokens of a rollout to `show`, on rank 0: answers and tokens are those
    of its replica.
    """

    def __init__(self, show: Callable[[str], None], total_steps: int) -> None:
        self.show, self.total_steps = show, total_steps
        self._step = self._tokens = self._done = self._wanted = 0
        self._begin = self._told = 0.0
        self._name = ""

    def enter(self, step: int, name: str) -> None:
        """Say that a phase begins."""
        self._step, self._name = step, name
        self._tokens = self._done = self._wanted = 0
        self._begin = self._told = time.monotonic()
        self.show(f"step {step}/{self.total_steps} | {name}")

    def expect(self, answers: int) -> None:
        """Take notice of answers that are to be sampled."""
        self._wanted = max(self._wanted, self._done + answers)

    def token(self, done: bool) -> None:
        """Count a token, perhaps the last one of its answer."""
        self._tokens += 1
        self._done += done
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS:
            self._told = now
            rate = format_count(self._tokens / (now - self._begin))
            begin = f"step {self._step}/{self.total_steps} | {self._name}"
            self.show(f"{begin} {self._done}/{self._wanted} | {rate} tok/s")
