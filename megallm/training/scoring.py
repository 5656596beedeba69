"""Rewards of a step's answers: called on one rank, once for each answer, and told to all."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megallm.base.errors import RewardError, UsageError
from megallm.engine.engine import Mesh

Said = dict[str, Any]  # of an answer: id, prompt_ids, completion_ids, completion, reason
Columns = Mapping[str, Any]
Function = Callable[..., Sequence[float | None]]


class RewardFunctions(Protocol):
    """Some functions that are called together; `names` and `weights` are theirs, in order."""

    names: Sequence[str]
    weights: Sequence[float]

    def __call__(
        self, samples: Sequence[Said], columns: Sequence[Columns]
    ) -> list[list[float | None]]:
        """Returns a list for each function, of a number for each sample: None where it has nothing
        to say.
        """
        ...


class PlainFunctions:
    """Python functions `file.py:function`, called in this process as TRL calls them.

    Raises UsageError for one that is not there.
    """

    def __init__(self, specs: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self.functions = [load_function(spec) for spec in specs]
        self.names = [spec.rpartition(":")[2] for spec in specs]
        self.weights = list(weights) if weights is not None else [1.0] * len(specs)

    def __call__(
        self, samples: Sequence[Said], columns: Sequence[Columns]
    ) -> list[list[float | None]]:
        """Returns what each function says. Raises RewardError for one that raises."""
        keys = dict.fromkeys(key for row in columns for key in row)
        further = {key: [row.get(key) for row in columns] for key in keys if key != "prompt"}
        prompts = [row.get("prompt") for row in columns]
        completions = [
            [{"role": "assistant", "content": each["completion"]}]
            if isinstance(prompt, list) else each["completion"]
            for each, prompt in zip(samples, prompts, strict=True)
        ]  # fmt: skip
        further["completion_ids"] = [each["completion_ids"] for each in samples]
        return [
            self._call(name, function, prompts, completions, further)
            for name, function in zip(self.names, self.functions, strict=True)
        ]

    @staticmethod
    def _call(
        name: str, function: Function, prompts: list, completions: list, further: dict
    ) -> list[float | None]:
        try:
            return list(function(prompts=prompts, completions=completions, **further))
        except Exception as error:  # the boundary to code that is not ours
            raise RewardError(
                f"The reward function {name} raised {type(error).__name__}: {error}. Mend it, or "
                "let it return None for what it cannot judge; the same command goes on from the "
                "last checkpoint."
            ) from error


def load_function(spec: str) -> Function:
    """Returns the function that `file.py:function` names. Raises UsageError."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UsageError(
            f"rewards.functions names {spec}: write file.py:function, of a file that is there."
        )
    about = importlib.util.spec_from_file_location(f"_reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(about)
    try:
        about.loader.exec_module(module)
    except Exception as error:  # the boundary to code that is not ours
        raise UsageError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
    if not callable(vars(module).get(name)):
        raise UsageError(f"{path} has no function {name}.")
    return vars(module)[name]


class Scorer:
    """Calls the functions on rank 0, where `make` makes them; `names` and `weights` are theirs."""

    def __init__(
        self, make: Callable[[], RewardFunctions], names: Sequence[str], weights: Sequence[float]
    ) -> None:
        self.make, self.names, self.weights = make, list(names), list(weights)
        self._functions: RewardFunctions | None = None

    def score(self, mesh: Mesh, samples: Sequence[Said], columns: Sequence[Columns]) -> np.ndarray:
        """Returns the rewards `[n, k]` of n samples, NaN where there is none, on every rank;
        collective over the world.

        Raises RewardError, on all ranks, when a function fails, returns another number of rewards,
        or one that is no finite number.
        """
        told: dict[str, Any] = {}
        if mesh.rank == 0:
            try:
                told["rewards"] = self._rewards(samples, columns)
            except (RewardError, UsageError) as error:
                told["error"] = str(error)
        told = mesh.broadcast_json(told)
        if "error" in told:
            raise RewardError(told["error"])
        return np.array(told["rewards"], np.float64).T.reshape(len(samples), -1)

    def _rewards(
        self, samples: Sequence[Said], columns: Sequence[Columns]
    ) -> list[list[float | None]]:
        if self._functions is None:
            self._functions = self.make()
        made = self._functions(samples, columns)
        return [
            checked(name, given, len(samples)) for name, given in zip(self.names, made, strict=True)
        ]


def checked(name: str, given: Sequence[Any], count: int) -> list[float | None]:
    """Returns the rewards of one function as numbers. Raises RewardError."""
    if len(given) != count:
        raise RewardError(
            f"The reward function {name} returned {len(given)} rewards for {count} answers: it "
            "must return one for each, None where it has nothing to say."
        )
    made: list[float | None] = []
    for place, value in enumerate(given):
        if value is None:
            made.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"The reward function {name} returned {value!r} for answer {place + 1} of {count}: "
                "it must return a finite number, or None where it has nothing to say."
            )
        made.append(number)
    return made
