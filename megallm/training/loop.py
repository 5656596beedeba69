"""The training loop: steps, held-out loss, checkpoints, and stopping when asked. One for every
trainer.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from megallm.base.device import peak_flops, peak_memory_gib
from megallm.base.errors import BadStep, Diverged, Requeue, RollBack
from megallm.base.heartbeat import HEARTBEAT
from megallm.base.stopping import StepAbandoned
from megallm.checkpoint import store
from megallm.engine.engine import StepStats
from megallm.run.config import JobConfig
from megallm.run.divergence import MAX_SKIPPED
from megallm.run.recorder import Recorder
from megallm.run.signals import INTERRUPTED, PREEMPTED, SignalRequests, TimeLimit
from megallm.training.guard import Guard
from megallm.training.saving import Saver
from megallm.training.trainer import Ledger, StepReport, Trainer, finite


class Loop:
    """Runs a trainer to `train.stop_at` or `train.steps`; collective over the world."""

    def __init__(
        self,
        trainer: Trainer,
        config: JobConfig,
        ledger: Ledger,
        recorder: Recorder,
        requests: SignalRequests,
    ) -> None:
        self.trainer, self.config, self.ledger = trainer, config, ledger
        self.recorder, self.requests = recorder, requests
        self.engine, self.mesh = trainer.engine, trainer.engine.mesh
        self.limit = TimeLimit(config.launch.time_limit)
        self.saver = Saver(trainer, config.checkpoint, ledger, recorder)
        self.saver.told = self.limit.saved
        self.guard = Guard(trainer, config, ledger, recorder)
        self.first_step = ledger.step
        self.skipped_in_a_row = 0
        requests.told = recorder.stopping
        self.engine.request = self._seen
        self.request = requests.seen  # of all ranks, as the last update told
        peak = peak_flops(self.mesh.device)
        self.peak_flops = None if peak is None else peak * self.mesh.layout.world

    def run(self) -> None:
        """Train; saves at the end whatever the reason for stopping, but never a state that has
        diverged.

        Raises Requeue after SIGTERM (state is safe), KeyboardInterrupt after SIGINT (state is
        safe), Diverged, CannotWrite when checkpoints fail again and again; RollBack when it is to
        be run again, from an earlier checkpoint.
        """
        try:
            self._train()
        except BadStep:
            raise
        except RollBack as asked:
            self.saver.settle()
            raise self.guard.roll_back(asked) from asked
        except Diverged as error:  # the same on every rank
            told = self.recorder.set_diverged_aside(self.ledger.step) if self.mesh.rank == 0 else ""
            raise Diverged(f"{error} {self.mesh.broadcast_json(told)}") from error
        finally:
            HEARTBEAT.enter("close")
            self.saver.close()

    def _train(self) -> None:
        last = self.config.train.stop_at or self.config.train.steps
        if self.ledger.step >= last:
            self.recorder.note(
                f"step {self.ledger.step} was reached before; nothing is left up to {last}."
            )
        self.requests.training = True
        request = self.mesh.largest(self._seen())
        if request:
            self._leave(request)
        row: dict[str, Any] | None = None
        for step in range(self.ledger.step + 1, last + 1):
            try:
                row = self._step(step)
            except StepAbandoned:
                row, request = None, self.mesh.largest(self._seen())
                self.recorder.event("abandoned", step=step)
                break
            if HEARTBEAT.listener is not None and HEARTBEAT.listener.finished:
                return
            request, evaluates = self.request, self._due(self.config.eval.every, step)
            if evaluates and step < last:
                row |= self._evaluate()
            if step == self.config.log.trace_step:
                self.recorder.pipeline(self.engine.timeline(), self.engine.model.placement, step)
            # Signals of a long while, of which no update has told; alone, asking costs nothing.
            if step == last or evaluates or self.mesh.layout.world == 1:
                request = self.mesh.largest(self._seen())
            if step == last or request:
                break
            self.recorder.row(row)
            self.saver.look()
            if self.saver.due(step):
                self._save()
        if row is not None:
            if (
                not request or self.ledger.step == last
            ):  # a finished run has no later chance to evaluate
                row |= self._evaluate(final=True)
            self.recorder.row(row)
            self._check_end(
                request, {name: row[name] for name in row if name.startswith("val/")}
            )
        self.saver.settle()
        if self.saver.saved_step < self.ledger.step and not self.skipped_in_a_row:
            self._save(final=True)
        self._leave(request)

    def _seen(self) -> int:
        """What this rank is asked for, by a signal or by the end of its time."""
        if self.limit.near and not self.requests.seen:
            self.requests.ask(PREEMPTED, "the time limit")
        return self.requests.seen

    def _evaluate(self, final: bool = False) -> dict[str, float | None]:
        """Held-out numbers; none of an evaluation that a request cuts short. The last one of a run
        has no later chance: it is made after a save.
        """
        HEARTBEAT.enter("evaluate")
        try:
            return self.trainer.evaluate()
        except StepAbandoned:
            if not final:
                return {}
        finally:
            HEARTBEAT.enter("between")
        self._save()
        self.engine.request = lambda: 0
        HEARTBEAT.enter("evaluate")
        return self.trainer.evaluate()

    def _check_end(self, request: int, held_out: dict[str, float | None]) -> None:
        """Errors: Diverged when a run ends at its last step with a state that gives no finite
        numbers.
        """
        step = self.ledger.step
        given = {name: value for name, value in held_out.items() if value is not None}
        bad = next((name for name, value in given.items() if not math.isfinite(value)), None)
        if bad is not None:
            name = bad.removeprefix("val/")
            raise Diverged(f"The held-out {name} after step {step} is {given[bad]}.")
        if given:
            self.skipped_in_a_row = (
                0  # the gradients of one batch were not finite: the state is sound all the same
            )
        elif self.skipped_in_a_row and not request:
            raise Diverged(
                f"The gradients were not finite for the last {self.skipped_in_a_row} steps, up to "
                f"{step}."
            )

    def _leave(self, request: int) -> None:
        if not request:
            return
        step, root, saved = self.ledger.step, self.recorder.checkpoints, self.saver.saved_step
        name = (
            "Interrupted"
            if request == INTERRUPTED
            else f"Stopped by {self.requests.name or 'a signal'}"
        )
        self.recorder.event("preempted" if request == PREEMPTED else "interrupted", step=step)
        state = f"step {saved} is saved in {root / store.step_name(saved)}"
        if step == self.first_step:
            text = (
                f"{name} before step {step + 1}: there is nothing {'new ' if step else ''}to save"
            )
            text += (
                f", {state}; the same command goes on."
                if step
                else "; the same command starts again."
            )
        elif saved < step:
            text = (
                f"{name} after step {step}, where the gradients have not been finite for "
                f"{self.skipped_in_a_row} "
            )
            text += "steps: that state is not saved. "
            text += (
                f"{state[:1].upper()}{state[1:]}; the same command goes on."
                if saved
                else "None is."
            )
        else:
            text = f"{name} after step {step}: {state}; the same command goes on."
        if request == PREEMPTED:
            raise Requeue(text)
        raise KeyboardInterrupt(text)

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _step(self, step: int) -> dict[str, Any]:
        """One step; returns its metrics."""
        begin, ledger = time.monotonic(), self.ledger
        HEARTBEAT.enter_step(step)
        self.guard.before(step)
        report = self.trainer.step(step)
        HEARTBEAT.enter("between")
        self.request = report.stats.request
        self.guard.judge(report)
        ledger.step = step
        ledger.consumed_samples += report.samples
        ledger.consumed_tokens += report.tokens
        ledger.skipped_steps += report.stats.skipped
        ledger.data = dict(report.data)
        for kind, sentence in report.warnings:
            self.recorder.event(kind, step=step, reason=sentence)
            self.recorder.note(f"warning: {sentence}")
        self._watch(report.stats, step)
        seconds = time.monotonic() - begin
        self.limit.step(seconds)
        return self._metrics(report, seconds) | self.guard.after()

    def _watch(self, stats: StepStats, step: int) -> None:
        """Refuse to go on with numbers that are not finite."""
        # A loss scale that is too large is made smaller step by step, and has an end of its own
        # (LossScaler.check).
        alone = stats.skipped and not stats.spiked and stats.loss_scale is None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if alone else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(
                f"The gradients were not finite for {MAX_SKIPPED} steps in a row, up to {step} "
                f"(loss {stats.loss})."
            )

    def _metrics(self, report: StepReport, seconds: float) -> dict[str, Any]:
        ledger, stats = self.ledger, report.stats
        row: dict[str, Any] = {"step": ledger.step, "consumed_tokens": ledger.consumed_tokens}
        row |= {name: finite(loss) for name, loss in report.losses.items()}
        row |= {
            "train/lr": report.lr,
            "train/grad_norm": finite(stats.grad_norm),
            "train/skipped_steps": ledger.skipped_steps,
            "perf/step_seconds": seconds,
            "perf/unix_time": time.time(),
            "perf/tokens_per_sec": report.tokens / seconds,
            "perf/tokens_per_sec_per_device": report.tokens / seconds / self.mesh.layout.world,
            "perf/data_wait_seconds": report.wait_seconds,
            "mem/peak_gib": peak_memory_gib(self.mesh.device),
        }
        row |= report.metrics | stats.metrics
        if stats.loss_scale is not None:
            row["train/loss_scale"] = stats.loss_scale
        if self.peak_flops is not None and report.flops is not None:
            row["perf/mfu"] = report.flops / seconds / self.peak_flops
        return row

    def _save(self, final: bool = False) -> None:
        """Save, unless the last gradients were not finite: whether it has diverged shows later."""
        if self.skipped_in_a_row:
            self.recorder.event(
                "not_saved", step=self.ledger.step, reason="the gradients were not finite"
            )
            return
        self.guard.before_save()
        HEARTBEAT.enter("save")
        self.saver.save(final)
        HEARTBEAT.enter("between")


def closing(config: JobConfig, step: int, then: str) -> tuple[str, ...]:
    """Returns what a run says at its end: where its results are, and what to do with them; nothing
    after one that was only listened to.
    """
    if HEARTBEAT.listener is not None and HEARTBEAT.listener.finished:
        return ()
    run = Path(config.run.dir)
    where = f"step {step} is saved in {run / 'checkpoints' / store.step_name(step)}"
    if config.log.plot:
        where += f"; the loss curve is {run / 'plots' / 'loss.png'}"
    if step < config.train.steps:
        then = f"the same command without train.stop_at goes on to step {config.train.steps}"
    return where, f"next: {then}"
