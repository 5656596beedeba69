"""Rewards of a step's answers: called on one rank, once for each answer, and told to all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megallm.base.errors import DataError, RewardError, UsageError
from megallm.base.stopping import StepAbandoned
from megallm.engine.engine import Mesh
from megallm.rewards.samples import Completion


class Functions(Protocol):
    """Reward functions (`rewards.workers.RewardFunctions`), which return for each sample the reward
    of each function, None where it has none; `failures`, `extras` and `metrics` are of the last
    call. When `stopped` says so a call ends with StepAbandoned.
    """

    names: Sequence[str]
    weights: Sequence[float]
    failures: Sequence[Any]
    extras: Mapping[str, Sequence[Any]]
    metrics: Mapping[str, float]
    stopped: Callable[[], bool] | None

    def __call__(
        self, samples: Sequence[Completion], step: int = 0
    ) -> Sequence[Sequence[float | None]]: ...

    def close(self) -> None: ...


_ERRORS = {kind.__name__: kind for kind in (RewardError, UsageError, DataError, StepAbandoned)}


def tell_all(mesh: Mesh, ask: Callable[[], Any]) -> Any:
    """Returns what rank 0 gets, which JSON can hold, on every rank; collective over the world. An
    error of a reward, of usage or of data is raised on all ranks, and so is StepAbandoned.
    """
    told: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            told = {"told": ask()}
        except tuple(_ERRORS.values()) as error:
            kind = next(name for name, one in _ERRORS.items() if isinstance(error, one))
            told = {"error": str(error), "kind": kind}
    told = mesh.broadcast_json(told)
    if "error" in told:
        raise _ERRORS[told["kind"]](told["error"])
    return told["told"]


@dataclass
class Scores:
    """Rewards `[n, k]`, NaN for none; the `metrics` and `failures` that functions have told, and on
    rank 0 further columns of the sample table.
    """

    table: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class NoFunctions:
    """Reward functions of a run whose rewards come from models and environments alone."""

    names: Sequence[str] = ()
    weights: Sequence[float] = ()
    failures: Sequence[Any] = ()
    extras: Mapping[str, Sequence[Any]] = {}
    metrics: Mapping[str, float] = {}
    stopped: Callable[[], bool] | None = None

    def __call__(self, samples: Sequence[Completion], step: int = 0) -> list[list[float | None]]:
        return [[] for _ in samples]

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class FurtherReward:
    """A reward that comes from no function: of a model, whose call is collective over the world, or
    of the environment. `on_error` is `reward.on_error`.
    """

    name: str
    weight: float
    call: Callable[[Sequence[Completion]], Sequence[float | None]]
    on_error: str = "stop"

    def column(self, samples: Sequence[Completion]) -> tuple[list[float], list[str]]:
        """Returns the rewards, NaN for none, and sentences about those that are no numbers.

        Errors: RewardError for these under `stop`.
        """
        found, failures = [], []
        for number, value in enumerate(self.call(samples)):
            if value is not None and not math.isfinite(value):
                said = f"The reward '{self.name}' failed on sample {number}: it is {value}."
                if self.on_error == "stop":
                    raise RewardError(f"{said} With reward.on_error=zero or none the run goes on.")
                failures.append(said)
                value = 0.0 if self.on_error == "zero" else None
            found.append(math.nan if value is None else float(value))
        return found, failures


def environment_reward(name: str, weight: float) -> FurtherReward:
    """Returns what the environment of an answer has given as one more reward."""
    return FurtherReward(name, weight, lambda samples: [each.earned for each in samples])


class RewardCaller:
    """Calls reward functions, which `make` makes on rank 0, and then `further` rewards on all
    ranks; `names` and `weights` are theirs.

    All calls are collective over the world, and raise RewardError or UsageError on all ranks when a
    function fails or cannot be used.
    """

    def __init__(
        self, mesh: Mesh, make: Callable[[], Functions], further: Sequence[FurtherReward] = ()
    ) -> None:
        self.mesh, self.further = mesh, list(further)
        self._functions: Functions | None = None

        def start() -> dict[str, Any]:
            self._functions = make()
            return {"names": list(self._functions.names), "weights": list(self._functions.weights)}

        told = self._told(start)
        self.names: list[str] = [*told["names"], *(one.name for one in self.further)]
        self.weights: list[float] = [*told["weights"], *(one.weight for one in self.further)]

    def score(
        self, samples: Sequence[Completion], step: int, stopped: Callable[[], bool] | None = None
    ) -> Scores:
        """Returns what n samples earn, on every rank. Raises StepAbandoned on all of them when
        `stopped` says so on rank 0 before all functions have answered.
        """

        def call() -> dict[str, Any]:
            made = self._functions
            made.stopped = stopped
            rewards = [list(row) for row in made(samples, step)]
            told = {"rewards": rewards, "metrics": dict(made.metrics)}
            return told | {"failures": [str(each) for each in made.failures]}

        told = self._told(call)
        count = len(self.names) - len(self.further)
        table = np.array(told["rewards"], np.float64).reshape(len(samples), count)
        columns = [one.column(samples) for one in self.further]
        table = np.column_stack([table, *(np.array(found) for found, _ in columns)])
        failures = [*told["failures"], *(text for _, said in columns for text in said)]
        extras = {} if self._functions is None else self._functions.extras
        return Scores(table, told["metrics"], failures, extras)

    def _told(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return tell_all(self.mesh, ask)

    def close(self) -> None:
        """End the processes of the functions."""
        if self._functions is not None:
            self._functions.close()

    def __enter__(self) -> RewardCaller:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()
