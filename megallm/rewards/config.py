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

    def faults(self, further: bool = False) -> Iterator[str]:
        """Yields sentences about what is wrong with the section itself; with `further` a reward
        comes from elsewhere too.
        """
        if not self.functions and not further:
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


@dataclass(frozen=True)
class TurnsConfig:
    """Tools and environments that an answer may have between the turns of the policy."""

    tools: tuple[str, ...] = ()  # functions that the model may call: file.py:function or package.module:function
    environment: str | None = None  # a class as OpenRLHF, TRL or Gymnasium have them: file.py:Class
    weight: float = 1.0  # of the environment's own reward, beside those of reward.functions
    calls: str | None = None  # how calls are written: hermes, llama3, file.py:function; null: as the template has it
    most: int = 8  # turns of the policy in one answer
    tokens: int = 0  # longest turn; 0: what is left of sampling.max_new_tokens, which counts all turns and replies
    reply: str = "\n<tool_response>\n{result}\n</tool_response>\n"  # of a tool, where prompts are plain texts
    on_error: Literal["tell", "end", "stop"] = "tell"  # a tool fails: the model is told, its answer or the run ends
    workers: int = 2  # processes that run them
    timeout_seconds: float = 30.0  # of what one answer asks for
    memory_gib: float = 8.0  # data of a worker process

    @property
    def used(self) -> bool:
        """Whether answers may have more than one turn."""
        return bool(self.tools or self.environment)


@dataclass(frozen=True)
class RewardScorerConfig:
    """The model of `reward_model` in reward.functions."""

    model: str | None = None  # run of `megallm reward`, or a *ForSequenceClassification folder with one label
    batch: int = 16  # answers that a data rank scores at once


@dataclass(frozen=True)
class JudgeConfig:
    """The language model of `judge` in reward.functions."""

    model: str | None = None  # run or Hugging Face folder; null: the weights that the policy started from
    template: str | None = None  # what it is asked, with {prompt}, {completion} and {gold}; null: to rate from 0 to 10
    pattern: str = r"[Rr]ating:\s*(\d+(?:\.\d+)?)"  # regular expression whose last match is the rating
    most: float = 10.0  # best rating, of which the reward is a share
    max_new_tokens: int = 64  # longest answer of the judge
