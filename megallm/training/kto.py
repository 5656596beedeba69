"""Training on single answers that are good or bad: KTO."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megallm.data.chat.mismatched import PREFIX, MismatchedReader
from megallm.data.chat.reader import ChatReader
from megallm.data.loader import Batch
from megallm.engine.engine import Engine, Mesh, StepStats
from megallm.losses.preference import Kto, LogRatio
from megallm.training.preference_config import KtoConfig
from megallm.training.reference_run import ReferenceIdentity, ReferenceRun
from megallm.training.supervised import run_supervised
from megallm.training.trainer import StepReport


class KtoIdentity(ReferenceIdentity):
    """What a checkpoint of `megallm kto` remembers."""

    KIND = "kto"
    config: KtoConfig

    def own(self) -> dict[str, Any]:
        """Returns the loss besides."""
        options = dataclasses.asdict(self.config.kto)
        del options["watch_steps"]
        return super().own() | {"kto": options}


class KtoRun(ReferenceRun):
    """Reads answers, and the same prompts with other answers for the reference point z0."""

    identity = KtoIdentity
    config: KtoConfig
    advice = "Lower optim.lr, or raise kto.desirable_weight (docs/preferences.md)."

    def __init__(self, config: KtoConfig) -> None:
        super().__init__(config)
        options = config.kto
        weights = options.desirable_weight, options.undesirable_weight
        self._loss = Kto(options.loss, options.beta, *weights)
        self.beta, self.watch_steps = options.beta, options.watch_steps
        self.reader_type = MismatchedReader if options.loss == "kto" else ChatReader

    def loss(self) -> Kto:
        """Returns the loss of single answers."""
        return self._loss

    def named(self, batch: Batch) -> list[Batch]:
        """Returns the answers, and the mismatched ones where there are any."""
        own = {name: x for name, x in batch.items() if not name.startswith(PREFIX)}
        others = {name.removeprefix(PREFIX): x for name, x in batch.items() if name not in own}
        count = len(own["samples"])
        made = [own | {"slots": torch.zeros(count, dtype=torch.int64)}]
        return made + ([others | {"slots": _ones(others)}] if others else [])

    def complete(self, engine: Engine, batches: list[Batch]) -> list[Batch]:
        """Returns the answers with the reference's numbers and z0: the mean log-ratio of mismatched
        answers over the global batch, at least 0, from a forward-only pass of the policy.
        """
        parts = [self.named(batch) for batch in batches]
        own = self.with_reference([part[0] for part in parts])
        if self._loss.kind != "kto":
            return own
        others = self.with_reference([part[1] for part in parts])
        sums, counts = engine.evaluate(others, LogRatio())
        point = max(sums["log_ratio"] / (counts["log_ratio"] or 1), 0.0)
        return [batch | {"reference_point": _filled(batch, point)} for batch in own]

    def first_loss(self, stats: StepStats) -> float | None:
        """Returns half the mean weight: 0.5 where both are 1."""
        good, all_of_them = stats.counts["rewards/chosen"], stats.counts["loss"]
        return self._loss.first_loss(good / all_of_them) if all_of_them else None

    def told(self, step: int, report: StepReport) -> StepReport:
        """Returns the report; numbers of a kind of answer that a batch has none of are None."""
        report = super().told(step, report)
        counts, found = report.stats.counts, report.stats.metrics
        wanting = {name: None for name in found if counts.get(name) == 0}
        margins = None if wanting else found["rewards/chosen"] - found["rewards/rejected"]
        return replace(
            report,
            stats=replace(report.stats, metrics=dict(found) | wanting),
            metrics=dict(report.metrics) | {"rewards/margins": margins},
        )


def _ones(batch: Batch) -> torch.Tensor:
    return torch.ones(len(batch["samples"]), dtype=torch.int64)


def _filled(batch: Batch, value: float) -> torch.Tensor:
    return torch.full((len(batch["samples"]),), value, dtype=torch.float64)


def run(
    config: KtoConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(KtoRun(config), mesh, resume, own_log, allowed)
