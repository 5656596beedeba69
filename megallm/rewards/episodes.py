"""Tools and environments of many answers at once, in worker processes with limits on time."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import UsageError
from megallm.rewards.config import TurnsConfig
from megallm.rewards.workers import Worker


@dataclass
class Act:
    """What is asked of the environment of an episode: `actions` are all that it was asked so far,
    the last one is new. `answer` is what came of it, `{"error": ...}` where nothing did.
    """

    number: int
    request: Mapping[str, Any]
    answer: dict[str, Any] = field(default_factory=dict)


class Environments:
    """Workers that hold the environments of episodes; `close` ends them.

    An episode goes to the worker of its number. One that hangs or dies is replaced; what it knew of
    other episodes is made again from their actions. Errors: UsageError for tools and environments
    that cannot be loaded.
    """

    def __init__(self, config: TurnsConfig) -> None:
        self.config = config
        self._load = ("host", list(config.tools), config.environment)
        self._workers = [self._started()]
        try:
            self._workers += [self._started() for _ in range(config.workers - 1)]
        except BaseException:
            self.close()
            raise
        # By worker: the episodes that it has, and how many of their actions it has taken.
        self._known: list[dict[str, int]] = [{} for _ in self._workers]
        described = self._workers[0].described[0]
        self.form: str = described["form"]
        self.earns: bool = described["earns"]
        self.name: str = described["name"]
        self.schemas: list[dict[str, Any]] = described["schemas"]

    def _started(self) -> Worker:
        worker = Worker(self._load, self.config.memory_gib)
        try:
            worker.load()
        except BaseException:
            worker.end()
            raise
        return worker

    def run(self, acts: Sequence[Act]) -> None:
        """Fill in the answers; those of one worker one after another, in their order."""
        queues: list[deque[Act]] = [deque() for _ in self._workers]
        for act in acts:
            queues[act.number % len(queues)].append(act)
        try:
            while True:
                for place, queue in enumerate(queues):
                    if self._workers[place].task is None and queue:
                        self._begin(place, queue.popleft())
                busy = [place for place, one in enumerate(self._workers) if one.task is not None]
                if not busy:
                    return
                ready = self._heard(busy)
                for place in busy:
                    self._look(place, place in ready)
        except BaseException:  # what is still being done belongs to no later call
            for place, worker in enumerate(self._workers):
                if worker.task is not None:
                    self._replace(place)
            raise

    def _begin(self, place: int, act: Act) -> None:
        worker, known = self._workers[place], self._known[place]
        key, count = act.request["key"], len(act.request["actions"])
        again = self.form != "tools" and known.pop(key, 0) != count - 1
        missing = count if again else 1  # what is repeated has its time too
        worker.task = act
        worker.send(("act", act.request), self.config.timeout_seconds * missing)

    def _heard(self, busy: Sequence[int]) -> list[int]:
        with selectors.DefaultSelector() as selector:
            for place in busy:
                selector.register(self._workers[place].connection, selectors.EVENT_READ, place)
            first = min(self._workers[place].deadline for place in busy)
            return [key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))]

    def _look(self, place: int, ready: bool) -> None:
        worker = self._workers[place]
        answer = worker.receive() if ready else None
        if answer is None and time.monotonic() > worker.deadline:
            seconds = self.config.timeout_seconds
            said = f"it took longer than {seconds:g} seconds (turns.timeout_seconds)"
            answer = {"error": said, "dead": True}
        if answer is None:
            return
        act, worker.task = worker.task, None
        act.answer = answer
        if "dead" in answer:
            self._replace(place)
        elif self.form != "tools" and act.request["actions"][-1]["do"] != "finish":
            self._known[place][act.request["key"]] = len(act.request["actions"])
        if "usage" in answer:
            raise UsageError(answer["usage"])

    def _replace(self, place: int) -> None:
        self._workers[place].end()
        self._workers[place], self._known[place] = self._started(), {}

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()
