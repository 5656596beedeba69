"""What `Loop` drives: a step, an evaluation, and what a checkpoint has to remember. One shape for
every trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megallm.engine.engine import Engine, Part, StepStats


@dataclass
class Ledger:
    """What advances when a step commits; with the seed it determines everything that follows."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # where the stream stands: counts per source


@dataclass(frozen=True)
class StepReport:
    """One step of a trainer, which may be several updates.

    `stats` are those of the (last) update of the engine whose weights are trained. `losses` and
    `metrics` are under their names in metrics.jsonl; `tokens` and `samples` are those of the global
    batch, `flops` what the model computes for them (None: not counted); `wait_seconds` went by
    waiting for data. `data` is the ledger's once the step is done. `warnings` are (kind, sentence),
    for events.jsonl and for a person.
    """

    stats: StepStats
    lr: float
    samples: int
    tokens: int
    losses: Mapping[str, float]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    flops: float | None = None
    wait_seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[tuple[str, str]] = ()


class Trainer(Protocol):
    """A way to train. All calls are collective over the world."""

    engine: Engine
    identity: dict[
        str, Any
    ]  # what a resumed run must agree with; saved in the meta of a checkpoint

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        ...

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Returns what this rank has trained on in the step that was made last: {micro, row, ...},
        or the answers' ids.
        """
        ...

    def evaluate(self) -> dict[str, float | None]:
        """Returns held-out numbers under their names in metrics.jsonl; None where there is nothing
        to evaluate.
        """
        ...

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of the state, of all engines."""
        ...

    def counters(self) -> dict[str, Any]:
        """Returns what belongs to the state besides tensors."""
        ...


def finite(value: float) -> float | None:
    """Returns the value, or None for a number that is not finite: JSON has none of these."""
    return value if math.isfinite(value) else None
