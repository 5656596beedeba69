"""Rewards of a step's answers: called on one rank, once for each answer, and told to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megallm.base.errors import RewardError, UsageError
from megallm.engine.engine import Mesh
from megallm.rewards.samples import Completion


class Functions(Protocol):
    """Reward functions (`rewards.workers.RewardFunctions`), which return for each sample the reward
    of each function, None where it has none; `failures`, `extras` and `metrics` are of the last
    call.
    """

    names: Sequence[str]
    weights: Sequence[float]
    failures: Sequence[Any]
    extras: Mapping[str, Sequence[Any]]
    metrics: Mapping[str, float]

    def __call__(
        self, samples: Sequence[Completion], step: int = 0
    ) -> Sequence[Sequence[float | None]]: ...

    def close(self) -> None: ...


@dataclass
class Scores:
    """Rewards `[n, k]`, NaN for none; the `metrics` and `failures` that functions have told, and on
    rank 0 further columns of the sample table.
    """

    table: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Scorer:
    """Calls reward functions, which `make` makes on rank 0; `names` and `weights` are theirs.

    All calls are collective over the world, and raise RewardError or UsageError on all ranks when a
    function fails or cannot be used.
    """

    def __init__(self, mesh: Mesh, make: Callable[[], Functions]) -> None:
        self.mesh = mesh
        self._functions: Functions | None = None

        def start() -> dict[str, Any]:
            self._functions = make()
            return {"names": list(self._functions.names), "weights": list(self._functions.weights)}

        told = self._told(start)
        self.names: list[str] = told["names"]
        self.weights: list[float] = told["weights"]

    def score(self, samples: Sequence[Completion], step: int) -> Scores:
        """Returns what n samples earn, on every rank."""

        def call() -> dict[str, Any]:
            made = self._functions
            rewards = [list(row) for row in made(samples, step)]
            told = {"rewards": rewards, "metrics": dict(made.metrics)}
            return told | {"failures": [str(each) for each in made.failures]}

        told = self._told(call)
        table = np.array(told["rewards"], np.float64).reshape(len(samples), len(self.names))
        extras = {} if self._functions is None else self._functions.extras
        return Scores(table, told["metrics"], told["failures"], extras)

    def _told(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 gets, on every rank."""
        told: dict[str, Any] = {}
        if self.mesh.rank == 0:
            try:
                told = ask()
            except (RewardError, UsageError) as error:
                told = {"error": str(error), "usage": isinstance(error, UsageError)}
        told = self.mesh.broadcast_json(told)
        if "error" in told:
            raise (UsageError if told["usage"] else RewardError)(told["error"])
        return told

    def close(self) -> None:
        """End the processes of the functions."""
        if self._functions is not None:
            self._functions.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()
