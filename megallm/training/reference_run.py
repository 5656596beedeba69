"""What `megallm dpo` and `megallm kto` have in common: a reference beside the policy, numbers of
the first step that must come out, and a warning when the chosen answers become less likely.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megallm.base.errors import InternalError
from megallm.data.batches import Share
from megallm.data.chat.prepare import Prepared
from megallm.data.loader import Batch, to_tensors
from megallm.engine.engine import Engine, Mesh, Part, StepStats
from megallm.engine.weights_copy import WeightsCopy
from megallm.run.recorder import Recorder
from megallm.training.adapters import frozen_engine
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.preference_config import PreferenceConfig, ReferenceKind
from megallm.training.references import (
    AdapterOff,
    Frozen,
    Reference,
    ReferenceTable,
    Stored,
    Synced,
    compute_table,
    table_path,
)
from megallm.training.supervised import Evaluation, SupervisedTrainer
from megallm.training.trainer import Ledger, StepReport

FALL = 1.0  # nats per answer
# Methods whose adapters change nothing before the first update.
NEUTRAL = ("none", "lora", "adalora", "ia3")
TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3}  # of the first loss; others compute in 8 or 11 bits
_KEPT = ("kind", "model", "alpha", "every")


class ReferenceIdentity(ChatIdentity):
    """What a checkpoint remembers besides: which model is the reference."""

    config: PreferenceConfig

    def own(self) -> dict[str, Any]:
        """Returns how rows are made, what is trained, and the reference."""
        reference = dataclasses.asdict(self.config.reference)
        return super().own() | {"reference": {key: reference[key] for key in _KEPT}}


class Displacement:
    """Notices that chosen answers become less likely while they are preferred more (likelihood
    displacement, arXiv 2410.08847).
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, deque[float](maxlen=2 * steps)
        self.told = steps == 0

    def see(self, step: int, log_ratio: float | None) -> str | None:
        """Returns a clause, once, when the mean over `steps` steps is below that of the ones before
        by `FALL`; `log_ratio` is that of the chosen answers of a step, in nats per answer.
        """
        if self.told or log_ratio is None:
            return None
        self.seen.append(log_ratio)
        if len(self.seen) < 2 * self.steps:
            return None
        found = list(self.seen)
        before, now = fmean(found[: self.steps]), fmean(found[self.steps :])
        if before - now < FALL:
            return None
        self.told = True
        return (
            f"the chosen answers become less likely: {before - now:.1f} nats per answer from the "
            f"{self.steps} steps up to {step - self.steps} to those up to {step}"
        )


class PreferenceTrainer(SupervisedTrainer):
    """Trains a step with the reference's numbers, and looks at what comes out."""

    job: ReferenceRun

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1. Errors: InternalError for a first step that shows
        another reference than the policy.
        """
        report = super().step(step)
        if step == 1:
            self.job.check_first(report.stats)
        if self.job.reference is not None:
            self.job.reference.after(step)
        return self.job.told(step, report)


class ReferenceRun(ChatRun):
    """A run with a policy and a reference; a trainer adds the loss and what its steps show."""

    trainer = PreferenceTrainer
    config: PreferenceConfig
    reference: Reference | None = None
    said: str = "no reference model"
    advice: str  # what to do about displacement
    beta: float
    watch_steps: int

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with another model."""
        return True

    def named(self, batch: Batch) -> list[Batch]:
        """Returns a microbatch as it is trained on and those that go with it, each with `slots`,
        the place of a sequence in its row.
        """
        raise NotImplementedError

    def first_loss(self, stats: StepStats) -> float | None:
        """Returns what the term `loss` of the first step must be; None where that is not known."""
        raise NotImplementedError

    # The reference

    @property
    def kind(self) -> ReferenceKind:
        """Returns how the reference is kept."""
        config = self.config
        given, own = config.reference.kind, config.reference.model is None
        plain = config.peft.adapter is None and not config.peft.modules_to_save
        return given or ("adapter_off" if self.base.adapted and plain and own else "precomputed")

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the policy's engine, and has the reference ready; collective over the world."""
        engine, begin = super().build(mesh, found)
        if self.needs_reference:
            self.reference = self._reference(engine, found)
            began = self.config.reference.model or self.config.model.hf or self.config.model.init
            self.said = f"reference: {began}, {self.kind}"
        return engine, begin

    def _reference(self, engine: Engine, found: Path | None) -> Reference:
        if self.kind == "adapter_off":
            return AdapterOff(engine)
        if self.kind == "synced":
            options = self.config.reference
            copy = WeightsCopy(engine)
            if found is not None:
                copy.load(found)
            return Synced(engine, copy, options.alpha, options.every)
        if self.kind == "frozen":
            return Frozen(self.frozen(engine.mesh))
        tables = [
            self._table(rows, engine, found)
            for rows in (self.rows, self.held_out)
            if rows is not None
        ]
        wide = torch.float64 if engine.model.dtype == torch.float64 else torch.float32
        return Stored(ReferenceTable.joined(tables), wide)

    def frozen(self, mesh: Mesh) -> Engine:
        """Returns an engine whose weights are those of the reference, none of them trained."""
        return frozen_engine(self.config, self.config.reference.model, "reference.model", mesh)

    def _table(self, rows: Prepared, engine: Engine, found: Path | None) -> ReferenceTable:
        """Returns the stored numbers of all rows; of a run that begins they are made anew."""
        config, mesh = self.config, engine.mesh
        began = config.reference.model, config.model.hf, config.model.init, config.peft.adapter
        keys = [source.key for source in rows.sources.values()]
        cache = Path(config.run.dir) / "cache"
        path = table_path(cache, keys, began, config.train.precision, type(self).__name__)
        there = mesh.broadcast_json(found is not None and path.is_file())
        if not there:
            same = found is None and config.reference.model is None
            scorer = engine if same else self.frozen(mesh)
            table = compute_table(scorer, self._passes(rows, mesh), scorer.log_probs)
            if mesh.rank == 0:
                table.save(path)
            mesh.barrier()
        return ReferenceTable.load(path)

    def _passes(self, rows: Prepared, mesh: Mesh) -> Iterator[list[Batch]]:
        """Yields every row once, as this data rank's microbatches."""
        train = self.config.train
        share = Share(train.global_batch, train.micro_batch, mesh.data.size, mesh.data.rank)
        evenly = {name: float(len(source)) for name, source in rows.sources.items()}
        rows = replace(rows, weights=evenly)
        reader = self.once(rows, share)
        for step in range(1, reader.steps() + 1):
            read = [self.named(to_tensors(arrays)) for arrays in reader.batches(step)]
            for micros in zip(*read, strict=True):
                yield list(micros)

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns the held-out numbers; `val/loss` has the likelihood in it, like `train/loss`."""
        held_out = super().evaluation(engine, share, ledger)

        def evaluate() -> dict[str, float | None]:
            found = held_out()
            if found.get("val/nll") is not None:
                found["val/nll_loss"] = found.pop("val/nll")
                found["val/loss"] += found["val/nll_loss"]
            return found

        return evaluate

    def with_reference(self, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches with `ref_log_probs`; collective over the world."""
        if self.reference is None:
            return batches
        found = self.reference.log_probs(batches)
        return [
            batch | {"ref_log_probs": numbers}
            for batch, numbers in zip(batches, found, strict=True)
        ]

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint: with a synced reference its weights too."""
        yield from super().parts(engine)
        if self.reference is not None:
            yield from self.reference.parts()

    def show(self, recorder: Recorder) -> None:
        """Say which reference there is, beside what was read."""
        recorder.note(self.said)
        super().show(recorder)

    # What a step shows

    @property
    def begins_as_reference(self) -> bool:
        """Whether policy and reference are the same model before the first update; an adapter that
        was trained before is another one while some of its inputs are dropped.
        """
        peft = self.config.peft
        neutral = peft.method in NEUTRAL or self.kind != "adapter_off"
        neutral = neutral and not (peft.adapter is not None and peft.dropout)
        return self.reference is not None and self.config.reference.model is None and neutral

    def check_first(self, stats: StepStats) -> None:
        """Errors: InternalError when the first loss is not that of a policy that equals its
        reference.
        """
        wanted = self.first_loss(stats) if self.begins_as_reference else None
        if wanted is None or not math.isfinite(stats.losses["loss"]):
            return
        most = TOLERANCE.get(self.config.train.precision, 0.1)
        if abs(stats.losses["loss"] - wanted) > most * max(abs(wanted), 1e-3):
            raise InternalError(
                f"The first loss is {stats.losses['loss']:.6g}; while the policy is the reference "
                f"it must be {wanted:.6g}. The reference ({self.kind}) gives other "
                "log-probabilities than the policy that the run starts from: remove "
                "cache/reference of the run folder if its weights were exchanged; otherwise please "
                "report this."
            )

    def told(self, step: int, report: StepReport) -> StepReport:
        """Returns the report under TRL's names, with a warning when chosen answers become less
        likely.
        """
        stats = report.stats
        losses = dict(report.losses)
        if "nll" in stats.losses:
            losses["train/loss"] = stats.losses["loss"] + stats.losses["nll"]
            losses["train/nll_loss"] = stats.losses["nll"]
        metrics = {name: x for name, x in report.metrics.items() if name != "train/tokens"}
        chosen = stats.metrics["rewards/chosen"] / self.beta
        counted = stats.counts.get("rewards/chosen", stats.counts["loss"])
        clause = self.displacement.see(step, chosen if counted else None)
        if clause is not None:
            warning = "likelihood_displacement", f"{clause}. {self.advice}"
            report = replace(report, warnings=(warning,))
        return replace(report, losses=losses, metrics=metrics)

    @property
    def displacement(self) -> Displacement:
        """Returns what watches the chosen answers of this run."""
        if self._displacement is None:
            self._displacement = Displacement(self.watch_steps)
        return self._displacement

    _displacement: Displacement | None = None
