"""What a rule says, what it looks at, and the rules of one section as a table. Pure.

A rule is a generator of `Problem`s: the rule's name, the numbers that break it in a sentence, and
the nearest values that keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megallm.models.config import ModelConfig
from megallm.run.config import JobConfig
from megallm.training.rules.ranges import Range

WORLD = "--nproc"  # stands for the number of processes among the fixes of a problem
AXES = ("layout.tp", "layout.pp", "layout.cp", "layout.dp", WORLD)  # what dp follows from

Fix = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Problem:
    """One broken rule. Applying any one of `fixes` (dotted key -> value) makes this rule hold."""

    rule: str
    sentence: str
    fixes: tuple[Fix, ...] = ()
    key: str = ""  # the key that is unusable by itself: rules that compute with it are left out

    def __str__(self) -> str:
        if not self.fixes:
            return self.sentence
        return f"{self.sentence} Nearest valid: {' or '.join(map(shown, self.fixes))}."


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the configuration of any trainer with its model resolved, and the
    size of the world.
    """

    config: JobConfig
    model: ModelConfig
    world: int | None  # None: as many processes as the layout asks for
    tokenizer_vocab: int | None

    @property
    def model_ranks(self) -> int:
        """Number of ranks of one replica."""
        layout = self.config.layout
        return layout.pp * layout.cp * layout.tp

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas: given, or what the world leaves (at least 1)."""
        if self.config.layout.dp is not None:
            return self.config.layout.dp
        return max(1, self.world // self.model_ranks) if self.world else 1

    @property
    def dp_is_known(self) -> bool:
        """Returns whether the world is a whole number of replicas."""
        return self.world is None or self.world % self.model_ranks == 0


@dataclass(frozen=True)
class Rules:
    """The rules of a section, or those that a trainer adds.

    `given` look at the configuration as it was given, before its model is resolved; `resolved` at
    `Facts`, each beside the keys that it computes with: it is left out while one of them is out of
    range. `ranges` are bounds by dotted key; `inferred` returns the values that a checked
    configuration has filled in.
    """

    given: tuple[Callable[[Any], Iterator[Problem]], ...] = ()
    resolved: Mapping[Callable[[Facts], Iterator[Problem]], tuple[str, ...]] = field(
        default_factory=dict
    )
    ranges: Mapping[str, Range] = field(default_factory=dict)
    inferred: Callable[[Any], dict[str, Any]] = lambda config: {}


def shown(fix: Fix) -> str:
    """Returns a fix as it is written on the command line."""
    return " ".join(
        f"{WORLD} {value}" if key == WORLD else f"{key}={_value(value)}"
        for key, value in fix.items()
    )


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
