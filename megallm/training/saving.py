"""When a run saves its state, at once or beside training, and what follows when that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megallm.base.errors import CannotWrite, Diverged, LeaseLost, MegallmError
from megallm.base.redact import redacted
from megallm.checkpoint import store
from megallm.checkpoint.async_save import AsyncSaver, SaveResult
from megallm.engine.engine import Part
from megallm.run.config import CheckpointConfig
from megallm.run.interval import PROBE_STEPS, plan_interval
from megallm.run.recorder import Recorder
from megallm.training.trainer import Ledger, Trainer

MAX_FAILED_SAVES = 3


class Saver:
    """Saves a trainer's state with the ledger of its run; collective over the world but for
    `look`.

    `saved_step` is the newest step that every rank knows to be saved.
    """

    def __init__(
        self, trainer: Trainer, config: CheckpointConfig, ledger: Ledger, recorder: Recorder
    ) -> None:
        self.trainer, self.config, self.ledger, self.recorder = trainer, config, ledger, recorder
        self.mesh = trainer.engine.mesh
        self.saved_step = ledger.step
        self.failed_saves = 0
        self.told: Callable[[float], None] = lambda seconds: None  # how long a save was
        self.stall_seconds = 0.0  # of the save under way
        self.under_way = 0  # its step
        self.ended: SaveResult | None = None  # what this rank knows of it and the others may not
        self.next_save = ledger.step + PROBE_STEPS  # with checkpoint.every=auto
        self.planned = (ledger.step, time.monotonic())  # when that was decided
        self.shown = 0  # the interval that was shown last, in steps
        self.beside: AsyncSaver | None = None
        if config.async_save and config.every:
            self.beside = AsyncSaver(recorder.checkpoints, self.mesh)
            self.beside.prepare(list(trainer.state()))

    def save(self, final: bool = False) -> None:
        """Write a checkpoint, beside training if the run says so and this is not the last.

        A failure is reported and training goes on, unless it was the last chance or the third in a
        row. Errors: `CannotWrite`, `LeaseLost`, `Diverged`.
        """
        if self.beside is None or final:
            self._save_now(final)
        else:
            self._save_beside(self.beside)
        if self.config.every == "auto" and not final:
            self._plan()

    def due(self, step: int) -> bool:
        """Returns whether a save follows this step, the same on every rank."""
        if self.config.every == "auto":
            return step >= self.next_save
        return self.config.may_follow(step)

    def _plan(self) -> None:
        """Decide when to save next, from what saving and steps cost on rank 0 so far."""
        (step, since), now = self.planned, time.monotonic()
        self.planned = self.ledger.step, now
        took = max(0.0, now - since - self.stall_seconds) / max(1, self.ledger.step - step)
        rate, world = self.recorder.failures(), self.mesh.layout.world
        interval = plan_interval(self.stall_seconds, took, rate, world)
        self.next_save = self.ledger.step + self.mesh.broadcast_json(interval.steps)
        if not self.shown or not 0.8 <= interval.steps / self.shown <= 1.25:
            self.shown = interval.steps
            self.recorder.note(str(interval))
            self.recorder.event("save_interval", step=self.ledger.step, **vars(interval))

    def look(self) -> None:
        """Record a save beside training that has ended here; not collective. Errors: `LeaseLost`.
        """
        result = None if self.beside is None else self.beside.result()
        if result is None:
            return
        self.ended = result
        if not result.outcome:
            self.told(result.seconds)
            self.recorder.saved(result.step, self.stall_seconds, result.seconds)
        elif result.outcome["kind"] == LeaseLost.__name__:
            result.check()

    def settle(self) -> None:
        """Wait for the save beside training, if one is under way, and let every rank know how it
        ended.

        Errors: as of `save`.
        """
        if self.beside is None or not self.under_way:
            return
        self.beside.wait()
        self.look()
        self._agree()

    def close(self) -> None:
        """End what saves beside training."""
        if self.beside is not None:
            self.beside.close()

    def _agree(self) -> None:
        """Take over what rank 0 knows of the save that has ended."""
        step, self.under_way = self.under_way, 0
        outcome = self.mesh.broadcast_json(self.ended.outcome if self.ended is not None else None)
        self.ended = None
        try:
            store.raise_failure(outcome)
        except CannotWrite as error:
            self._failed(step, error)
        else:
            self.saved_step, self.failed_saves = step, 0

    def _failed(self, step: int, error: MegallmError, final: bool = False) -> None:
        if isinstance(error, LeaseLost):
            raise error
        self.failed_saves += 1
        self.recorder.event("save_failed", step=step, reason=str(error))
        self.recorder.note(f"warning: step {step} is not saved: {error}")
        if final or self.failed_saves >= MAX_FAILED_SAVES:
            raise error

    def _save_beside(self, beside: AsyncSaver) -> None:
        self.look()
        if self.mesh.largest(int(beside.busy)):
            self.recorder.event(
                "not_saved", step=self.ledger.step, reason="the save before is still under way"
            )
            return
        self.settle()
        begin = time.monotonic()
        keeping = self._before()
        try:
            beside.start(self.ledger.step, list(self.trainer.state()), self._meta(), keeping)
        except CannotWrite as error:
            self._failed(self.ledger.step, error)
            return
        self.under_way, self.stall_seconds = self.ledger.step, time.monotonic() - begin

    def _save_now(self, final: bool) -> None:
        self.settle()
        if self.saved_step == self.ledger.step:
            return
        begin, step = time.monotonic(), self.ledger.step
        keeping, parts = self._before(), list(self.trainer.state())
        self._check_finite(parts)
        try:
            store.save(self.recorder.checkpoints, step, parts, self._meta(), self.mesh, keeping)
        except CannotWrite as error:
            self._failed(step, error, final)
            return
        self.failed_saves, self.saved_step = 0, step
        seconds = time.monotonic() - begin
        self.stall_seconds = seconds
        self.told(seconds)
        self.recorder.saved(step, seconds, seconds)

    def _before(self) -> store.RetentionPolicy:
        self.recorder.before_save()
        return self.recorder.keeping(self.config.keep)

    def _meta(self) -> dict[str, Any]:
        ledger = vars(self.ledger)
        told = redacted({"ledger": ledger, **self.trainer.identity})
        return {"engine": self.trainer.counters(), **told}

    def _check_finite(self, parts: Sequence[Part]) -> None:
        bad = next((part.name for part in parts if not _is_finite(part)), "")
        if self.mesh.largest(int(bool(bad))):
            raise Diverged(
                f"The state after step {self.ledger.step} is not "
                f"finite{f', as in {bad}' * bool(bad)}."
            )


def _is_finite(part: Part) -> bool:
    """Whether a tensor holds finite numbers only; one byte formats have been clamped when they were
    made.
    """
    tensor = part.tensor
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
