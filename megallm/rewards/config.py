"""The section `reward` of trainers that learn from rewards. Pure.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """Reward functions, their weights, and what happens when one fails."""

    functions: dict[str, float] = field(default_factory=dict)  # a name, or file.py:function -> weight
    workers: int = 2  # processes that run them
    timeout_seconds: float = 60.0  # of one sample; a function that takes lists has it for each sample of its call
    call_size: int = 0  # samples in one call of a function that takes lists; 0: all of a step
    memory_gib: float = 8.0  # data of a worker process
    on_error: Literal["stop", "zero", "none"] = "stop"  # a function fails: end the run, reward 0, or no reward

    def faults(self) -> Iterator[str]:
        """Sentences about what is wrong with the section itself."""
        if not self.functions:
            yield (
                "reward.functions is empty: name at least one function with its weight, such as "
                "reward.functions={accuracy: 1} or {rewards.py:my_reward: 1}."
            )
        for name, weight in self.functions.items():
            if not isfinite(weight):
                yield f"reward.functions.{name} is {weight}; a weight is a finite number."
        if self.workers < 1:
            yield f"reward.workers is {self.workers}; it must be at least 1."
        if self.call_size < 0:
            yield f"reward.call_size is {self.call_size}; it must be at least 0."
        for key in ("timeout_seconds", "memory_gib"):
            if not 0 < vars(self)[key] < 1e9:
                yield f"reward.{key} is {vars(self)[key]}; it must be above 0."
