"""Rewards of a step: several functions, in worker processes with limits, in the order of samples.

A function that raises, hangs, ends its process, returns NaN or the wrong number of rewards is a
named error or the reward that `reward.on_error` states; it never holds the run up.
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import RewardError, UsageError
from megallm.base.stopping import StepAbandoned
from megallm.rewards.config import RewardConfig
from megallm.rewards.samples import Completion
from megallm.rewards.sandbox import confined
from megallm.rewards.signatures import Notes, Rewards, numbers
from megallm.rewards.table import GIVEN, TABLE, judged, resolved

START_SECONDS = 300.0  # to import what the functions import
LOOK_SECONDS = 0.5  # between two looks at whether the run is to stop
Given = Callable[[Sequence[Completion]], Rewards]


@dataclass(frozen=True)
class Failure:
    """What a function did wrong: its name, the samples of the call, and what happened."""

    name: str
    samples: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        first, last = self.samples[0], self.samples[-1]
        where = f"sample {first}" if first == last else f"its call with samples {first} to {last}"
        return f"The reward function '{self.name}' failed on {where}: {self.what}."


@dataclass
class RewardCall:
    """One call: a function, by its place in the pool and in the step, and its samples."""

    place: int
    column: int
    samples: tuple[int, ...]
    answer: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A process with the functions of a pool, and what it is doing; `load` is the request that
    tells it which.
    """

    def __init__(self, load: tuple[Any, ...], memory_gib: float, alone: bool = False) -> None:
        self.task: Any = None
        self.deadline = 0.0
        self.buffer = b""
        self.connection, theirs = socket.socketpair()
        memory = int(memory_gib * 2**30)
        numbers = [str(theirs.fileno()), str(memory), "0" if alone else str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(confined() if alone else []),
                    sys.executable,
                    "-m",
                    "megallm.rewards.worker",
                    *numbers,
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.described: list[dict[str, Any]] = []
        self.send(load, START_SECONDS)

    def load(self) -> None:
        """Wait until the functions are loaded, and keep how each is called.

        Errors: UsageError when they cannot be.
        """
        answer = None
        while answer is None:
            self.connection.settimeout(max(0.01, self.deadline - time.monotonic()))
            answer = self.receive()
        if "functions" not in answer:
            raise UsageError(
                answer.get("usage") or f"The reward functions were not loaded: {answer['error']}."
            )
        self.described = answer["functions"]

    def send(self, message: tuple[Any, ...], seconds: float) -> None:
        """Send a request that is to be answered within `seconds`."""
        self.deadline = time.monotonic() + seconds
        self.connection.settimeout(seconds)
        with suppress(OSError):  # it is gone, or does not read: receiving tells
            self.connection.sendall(pickle.dumps(message))

    def receive(self) -> dict[str, Any] | None:
        """Returns the answer, what happened to the process, or None when there is more to come."""
        try:
            piece = self.connection.recv(1 << 16)
        except TimeoutError:
            return {"error": "it did not answer in time"}
        except OSError:
            piece = b""
        if not piece:
            return {"error": self.fate(), "dead": True}
        self.buffer += piece
        if not self.buffer.endswith(b"\n"):
            return None
        line, self.buffer = self.buffer, b""
        return json.loads(line)

    def fate(self) -> str:
        """Returns how the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5.0)
        code = self.process.poll()
        if code is not None and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"it ended its process with exit status {code}"

    def end(self) -> None:
        """Ends the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class _Pool:
    """Workers that have loaded the same functions."""

    def __init__(self, specs: Sequence[str], config: RewardConfig, alone: bool) -> None:
        self.stopped: Callable[[], bool] = lambda: False
        self._new = lambda: Worker(("load", list(specs)), config.memory_gib, alone)
        self.config = config
        self.workers: list[Worker] = []
        self._start(1)
        self.described = self.workers[0].described

    def _start(self, count: int) -> None:
        """Add workers, which load what they need at the same time."""
        begun = [self._new() for _ in range(count)]
        try:
            for worker in begun:
                worker.load()
        except BaseException:
            for worker in begun:
                worker.end()
            raise
        self.workers += begun

    def run(self, tasks: Sequence[RewardCall], samples: Sequence[Completion], step: int) -> None:
        """Fill in the answers of the tasks. After a failure nothing new is begun under `stop`; what
        was begun before it is awaited, so that the first failure is always the same one.
        """
        self._start(min(self.config.workers, len(tasks)) - len(self.workers))
        try:
            self._run(deque(tasks), samples, step)
        except BaseException:  # what is still being answered belongs to no later call
            for worker in [worker for worker in self.workers if worker.task is not None]:
                worker.end()
                self.workers.remove(worker)
            raise

    def _run(self, waiting: deque[RewardCall], samples: Sequence[Completion], step: int) -> None:
        stopped = False
        while True:
            for worker in self.workers:
                if worker.task is None and waiting and not stopped:
                    self._begin(worker, waiting.popleft(), samples, step)
            busy = [worker for worker in self.workers if worker.task is not None]
            if not busy:
                return
            ready = self._heard(busy)
            for worker in busy:
                failed = self._looked_at(worker, worker in ready)
                stopped |= failed and self.config.on_error == "stop"

    def _begin(
        self, worker: Worker, task: RewardCall, samples: Sequence[Completion], step: int
    ) -> None:
        worker.task = task
        chosen = [samples[at] for at in task.samples]
        seconds = self.config.timeout_seconds * len(chosen)
        worker.send(("run", task.place, chosen, step), seconds)

    def _heard(self, busy: Sequence[Worker]) -> list[Worker]:
        """Wait for an answer or a deadline; the workers that have said something."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.connection, selectors.EVENT_READ, worker)
            first = min(worker.deadline for worker in busy)
            while True:
                seconds = max(0.0, first - time.monotonic())
                found = selector.select(min(seconds, LOOK_SECONDS))
                if self.stopped():
                    raise StepAbandoned
                if found or seconds <= LOOK_SECONDS:
                    return [key.data for key, _ in found]

    def _looked_at(self, worker: Worker, ready: bool) -> bool:
        """Take a worker's answer, which counts even where we come late to read it, or end it at its
        deadline; True for a failure.
        """
        answer = worker.receive() if ready else None
        if answer is None and time.monotonic() > worker.deadline:
            seconds = self.config.timeout_seconds * len(worker.task.samples)
            said = f"it took longer than {seconds:g} seconds (reward.timeout_seconds)"
            answer = {"error": said, "dead": True}
        if answer is None:
            return False
        worker.task.answer, worker.task = answer, None
        if "dead" in answer:
            worker.end()
            self.workers.remove(worker)
            self._start(1)
        return "rewards" not in answer

    def close(self) -> None:
        for worker in self.workers:
            worker.end()


class RewardFunctions:
    """The reward functions of a configuration; `close` ends their processes.

    `names` and `weights` `[k]` go with the columns of the rewards; `failures`, `extras` (columns of
    the sample table) and `metrics` are those of the last call. While functions are being waited for
    `stopped` is asked now and then; when it says so the call ends with StepAbandoned.
    """

    def __init__(self, config: RewardConfig, given: Mapping[str, Callable[..., Any]]) -> None:
        self.config = config
        self.names = _labels(config.functions)
        self.weights = tuple(config.functions.values())
        self.failures: list[Failure] = []
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, float] = {}
        self.stopped: Callable[[], bool] | None = None
        self._given: dict[int, Given] = {}
        self._pools: list[tuple[_Pool, list[int]]] = []
        kinds: dict[bool, list[int]] = {}
        for column, spec in enumerate(config.functions):
            target, options = resolved(spec)
            if target in GIVEN:
                self._given[column] = _of_trainer(target, options, given)
                continue
            row = TABLE.get(target)
            if row is not None and row.check is not None:
                row.check()
            kinds.setdefault(row is not None and row.confined, []).append(column)
        specs = list(config.functions)
        try:
            for alone, columns in sorted(kinds.items()):
                self._pools.append((_Pool([specs[at] for at in columns], config, alone), columns))
        except BaseException:
            self.close()
            raise

    def __call__(self, samples: Sequence[Completion], step: int = 0) -> list[Rewards]:
        """Returns the rewards `[n][k]` of each sample by each function; None: it has none.

        Call it on one rank and broadcast: functions may be slow, costly or random. Errors:
        RewardError for a function that failed, unless on_error says otherwise; UsageError for one
        that needs columns which the rows have not.
        """
        self.failures, self.extras, self.metrics = [], {}, {}
        table: list[Rewards] = [[None] * len(self.names) for _ in samples]
        everything = tuple(range(len(samples)))
        if not samples:
            return table
        tasks: list[RewardCall] = []
        for column, function in self._given.items():
            tasks.append(RewardCall(-1, column, everything, _called(function, samples)))
        for pool, columns in self._pools:
            pool.stopped = self.stopped or (lambda: False)
            planned = self._plan(pool, columns, len(samples))
            pool.run(planned, samples, step)
            tasks += planned
        for task in sorted(tasks, key=lambda task: (task.column, task.samples)):
            if task.answer:
                self._take(task, table)
        return table

    def _plan(self, pool: _Pool, columns: Sequence[int], count: int) -> list[RewardCall]:
        """Returns the calls of a pool, in the order in which they begin."""
        tasks = []
        for place, column in enumerate(columns):
            size = 1 if pool.described[place]["each"] else self.config.call_size or count
            starts = range(0, count, size)
            tasks += [
                RewardCall(place, column, tuple(range(at, min(at + size, count)))) for at in starts
            ]
        return tasks

    def _take(self, task: RewardCall, table: list[Rewards]) -> None:
        answer, count = task.answer, len(table)
        if "usage" in answer:
            raise UsageError(answer["usage"])
        if "rewards" not in answer:
            failure = Failure(self.names[task.column], task.samples, answer["error"])
            if self.config.on_error == "stop":
                raise RewardError(f"{failure} With reward.on_error=zero or none the run goes on.")
            self.failures.append(failure)
        missing = 0.0 if self.config.on_error == "zero" else None
        found = answer.get("rewards", [missing] * len(task.samples))
        for at, reward in zip(task.samples, found, strict=True):
            table[at][task.column] = reward
        for name, values in answer.get("extras", {}).items():
            column = self.extras.setdefault(name, [None] * count)
            for at, value in zip(task.samples, values, strict=False):
                column[at] = value
        self.metrics.update(answer.get("metrics", {}))

    def close(self) -> None:
        """End the worker processes."""
        for pool, _ in self._pools:
            pool.close()
        self._pools = []

    def __enter__(self) -> RewardFunctions:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()


def build(
    config: RewardConfig, given: Mapping[str, Callable[..., Any]] | None = None
) -> RewardFunctions:
    """Returns the reward functions of a configuration, with their workers started.

    given: functions of the trainer, run in this process: `reward_model` (samples -> rewards) and
    `judge` (prompts -> answers of a model). Errors: UsageError, for everything that can be known
    before the first sample: unknown names, signatures, options, missing libraries, no sandbox.
    """
    faults = list(config.faults())
    if faults:
        raise UsageError("\n".join(faults))
    return RewardFunctions(config, given or {})


def _labels(functions: Mapping[str, float]) -> tuple[str, ...]:
    """Returns short names for metrics: what follows the colon, numbered where two are the same."""
    labels: list[str] = []
    for spec in functions:
        name = resolved(spec)[0].rpartition(":")[2]
        same = sum(label.partition("#")[0] == name for label in labels)
        labels.append(f"{name}#{same + 1}" if same else name)
    return tuple(labels)


def _of_trainer(
    target: str, options: dict[str, Any], given: Mapping[str, Callable[..., Any]]
) -> Given:
    if target not in given:
        raise UsageError(
            f"The reward '{target}' needs a model, which this trainer does not give; it gives "
            f"{', '.join(given) or 'none'}."
        )
    if target == "judge":
        return judged(given[target], **options)
    return given[target]


def _called(function: Given, samples: Sequence[Completion]) -> dict[str, Any]:
    """Returns the answer of a function in this process, whose own errors are not caught."""
    try:
        return {"rewards": numbers(function(samples), len(samples), Notes())}
    except ValueError as error:
        return {"error": str(error)}
