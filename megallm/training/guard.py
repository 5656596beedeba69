"""What a run does about numbers that go wrong: losses that are not finite, loss spikes, replicas
that differ, and a step that does not repeat itself.

`Loop` has one `Guard`, which sees each step before and after. All decisions are the same on every
rank: they come from numbers that all ranks have, or rank 0 tells them.
"""

from __future__ import annotations

import gc
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megallm.base.errors import BadStep, CannotWrite, InternalError, RollBack
from megallm.base.files import writing
from megallm.checkpoint import store
from megallm.engine.digest import Mismatch, ReplicaCheck, weights_digest
from megallm.engine.engine import Loss, Mesh, StepStats
from megallm.engine.fault import NonFinite, find_fault
from megallm.engine.limits import UpdateLimits
from megallm.run.config import JobConfig
from megallm.run.divergence import SpikeDetector
from megallm.run.recorder import DIGEST, Recorder
from megallm.run.rows import read_rows
from megallm.training.data_ledger import DataLedger
from megallm.training.trainer import Ledger, StepReport, Trainer

MAX_SPIKES = 10  # in a row that are left out: the run stays where it is
AFTER_RESUME = 5  # first steps after a resume, whose losses are compared with those before it
LEAST_SEEN = 8  # losses before a resume that say what is usual
MAX_REPLAYS = 3  # steps of a start whose batch is saved: each of them is computed twice
WEIGHTS = "weights"  # in RUN/replay: the weights of the first of them
# Settings that change no weight of a step; after any other change steps may be made differently.
OUTSIDE = ("run.dir", "train.stop_at", "checkpoint.", "eval.", "log.", "guard.")
HARDWARE = "Its memory or arithmetic is not to be trusted: leave its machine out"


class Guard:
    """Watches the steps of one trainer; all calls are collective over the world."""

    def __init__(
        self, trainer: Trainer, config: JobConfig, ledger: Ledger, recorder: Recorder
    ) -> None:
        self.trainer, self.config, self.options = trainer, config, config.guard
        self.ledger, self.recorder = ledger, recorder
        self.engine, self.mesh = trainer.engine, trainer.engine.mesh
        self.spikes = SpikeDetector(self.options.spike_window, self.options.spike_sigma)
        self.replicas = ReplicaCheck(self.engine)
        self.step, self.replays, self.spikes_in_a_row = ledger.step, 0, 0
        self.fault: NonFinite | None = None  # of the step that runs
        self.told = ""  # where the batch of that step is
        self._begin()
        self.engine.examine = self._examine

    def _begin(self) -> None:
        """Take up what earlier starts of the run have seen, as rank 0 reads it."""
        told: Any = None
        if self.mesh.rank == 0:
            rows = deque(read_rows(self.recorder.folder.metrics), maxlen=self.options.spike_window)
            seen = [(row.get("train/loss"), row.get("train/grad_norm")) for row in rows]
            keys = [change.key for change in self.recorder.changes]
            same = all(key.startswith(OUTSIDE) for key in keys)
            told = [seen, list(self.recorder.digests.items()) if same else []]
        seen, digests = self.mesh.broadcast_json(told)
        for loss, norm in seen:
            self.spikes.see(loss, norm)
        self.digests = dict(digests)
        usual = self.options.spike != "off" and self.ledger.step and len(seen) >= LEAST_SEEN
        self.continues = (
            (self.ledger.step + AFTER_RESUME, self.spikes.loss_limit(LEAST_SEEN)) if usual else None
        )

    # Steps

    def before(self, step: int) -> None:
        """Set the limits of a step."""
        self.step, self.fault, self.told = step, None, ""
        if self.options.spike != "off":
            self.engine.limits = UpdateLimits(
                self.spikes.loss_limit(), self.spikes.norm_limit(), self.options.spike != "warn"
            )

    def judge(self, report: StepReport) -> None:
        """Say what was wrong with a step, before it counts.

        Errors: BadStep and RollBack, as the policies say; a run that is asked to stop does not go
        back first.
        """
        stats, leaves = report.stats, report.stats.request > 0
        loss = report.losses.get("train/loss", stats.loss)
        if stats.spiked:
            self._spiked(loss, stats.grad_norm, leaves)
        elif stats.skipped:
            self._not_finite(stats, leaves)
        else:
            self.spikes_in_a_row = 0
        if self.continues is not None and not stats.skipped:
            self._compare_with_before(loss)
        self.spikes.see(loss, stats.grad_norm)

    def after(self) -> dict[str, Any]:
        """Returns what a step that counts adds to its row of metrics. Errors: InternalError for
        replicas that differ, and for a digest that is not that of the same step before.
        """
        every, checks = self.config.digest_every, self.options.replica_check_every
        if checks and self.step % checks == 0:
            self.check_replicas()
        if not every or self.step % every:
            return {}
        digest = weights_digest(self.engine)
        before = self.digests.pop(self.step, digest)
        if before != digest:
            self.recorder.event("digest_mismatch", step=self.step, before=before, now=digest)
            raise InternalError(
                f"The run does not repeat itself: step {self.step} was made before, with the "
                f"weights digest {before}, and now gives {digest}, from the same checkpoint with "
                "the same configuration. Another number of threads or kind of machine makes other "
                "sums; otherwise a kernel is not deterministic (train.determinism strict), or "
                "memory is faulty (guard.replica_check_every). To go on all the same: "
                "guard.digest_every=0."
            )
        return {DIGEST: digest}

    def before_save(self) -> None:
        """Compare replicas, if the run does so at all: no checkpoint holds what only one has."""
        if self.options.replica_check_every and self.step % self.options.replica_check_every:
            self.check_replicas()

    # Not finite

    def _examine(self, batches: Sequence[dict[str, Tensor]], loss: Loss) -> None:
        """Find the layer of a step that is not finite, and save its batch; called by the engine."""
        if self.engine.scaler is not None or self.replays >= MAX_REPLAYS:
            return  # with a loss scale overflows are a part of training
        self.replays += 1
        self.fault = fault = find_fault(self.engine, batches, loss)
        micro = 0 if fault.micro is None else fault.micro - self.mesh.data.rank * len(batches)
        written: dict[str, Any] | None = None
        if self.mesh.rank == fault.ranks[0]:
            rows = self.trainer.rows(self.step)
            if fault.micro is not None:
                rows = [row for row in rows if row.get("micro", fault.micro) == fault.micro]
            written = {"rows": rows} | self._write_batch(batches[micro], loss, rows)
        told = self.mesh.gather_json(written)
        written = self.mesh.broadcast_json(told and told[fault.ranks[0]])
        weights = self._write_weights() if self.replays == 1 else {}
        self.told = f" {written.pop('told')}"
        self.recorder.event("not_finite", step=self.step, **fault._asdict(), **written, **weights)

    def _write_batch(
        self, batch: dict[str, Tensor], loss: Loss, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """RUN/replay/step-N-rank-R.safetensors; on a full disk a sentence instead."""
        folder = self.recorder.folder.replays
        path = folder / f"step-{self.step}-rank-{self.mesh.rank}.safetensors"
        about = {
            "step": self.step, "rank": self.mesh.rank, "fault": self.fault._asdict(),
            "rows": rows, "needs": loss.needs, "temperature": loss.temperature,
        }  # fmt: skip
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in batch.items()}
        try:
            with writing(path):
                folder.mkdir(exist_ok=True)
                save_file(tensors, path, {"replay": json.dumps(about)})
        except CannotWrite as error:
            return {"batch": None, "told": f"Its batch is not saved: {error}"}
        run = self.config.run.dir
        told = f"Its batch is {path}: `megallm replay {run} --step {self.step}` runs it again."
        return {"batch": str(path), "told": told}

    def _write_weights(self) -> dict[str, Any]:
        """RUN/replay/weights/step-N: the weights that the step was computed with."""
        parts = [part for part in self.trainer.state() if store.weights_only(part.name)]
        meta = {"engine": self.engine.counters(), "ledger": vars(self.ledger)}
        root = self.recorder.folder.replays / WEIGHTS
        try:
            store.save(root, self.step, parts, meta | self.trainer.identity, self.mesh)
        except CannotWrite as error:
            return {"weights": None, "problem": str(error)}
        return {"weights": str(root / store.step_name(self.step))}

    def _not_finite(self, stats: StepStats, leaves: bool) -> None:
        """One decision about a step that is not finite; with a loss scale it is always a skip."""
        loss, norm, scaled = stats.loss, stats.grad_norm, stats.loss_scale is not None
        numbers = {"loss": str(loss), "grad_norm": str(norm)}
        self.recorder.event("skipped", step=self.step, **numbers)
        if scaled:
            return
        reason = f"step {self.step} is not finite (loss {loss}, gradient norm {norm})"
        if self.fault is not None:
            reason += f": {self.fault}"
            self.recorder.note(f"warning: {reason}.{self.told}")
        if leaves or self.options.non_finite == "skip":
            return
        if self.options.non_finite == "rollback":
            raise RollBack(reason)
        raise BadStep(
            f"Stopped, as guard.non_finite stop says: {reason}.{self.told} The weights are those "
            f"of step {self.ledger.step}; the same command goes on from its newest checkpoint."
        )

    # Spikes

    def _spiked(self, loss: float, norm: float, leaves: bool) -> None:
        policy, limits = self.options.spike, self.engine.limits
        self.spikes_in_a_row += 1
        if policy != "warn" or self.spikes_in_a_row == 1:
            figures = {"loss_limit": limits.loss, "grad_norm_limit": limits.grad_norm}
            self.recorder.event(
                "spike", step=self.step, loss=loss, grad_norm=norm, action=policy, **figures
            )
        what = (
            f"the loss {loss:.4g} and the gradient norm {norm:.4g} of step {self.step} are a spike "
            f"(limits {limits.loss:.4g} and {limits.grad_norm:.4g})"
        )
        if policy == "rollback" and not leaves:
            raise RollBack(what)
        done = "the run goes on" if policy == "warn" else "its update is left out"
        if self.spikes_in_a_row == 1:
            self.recorder.note(f"warning: {what}: {done} (guard.spike {policy}).")
        if policy == "skip" and self.spikes_in_a_row >= MAX_SPIKES:
            raise BadStep(
                f"{MAX_SPIKES} spikes in a row were left out, up to step {self.step}: {what}. "
                "Lower optim.lr, go back to an earlier checkpoint, or let the run go over them: "
                "guard.spike=warn."
            )

    def _compare_with_before(self, loss: float) -> None:
        """Warn when the first losses after a resume are not those of the run before it."""
        last, limit = self.continues
        if self.step >= last or loss > limit:
            self.continues = None
        if loss > limit:
            begin = self.ledger.step + 1
            self.recorder.event("discontinuity", step=self.step, loss=loss, limit=limit)
            self.recorder.note(
                f"warning: the loss {loss:.4g} of step {begin}, after the resume, is above what "
                f"the steps before it lead to expect ({limit:.4g}): the state, the data or the "
                "configuration is not that of the run before."
            )

    # Going back

    def roll_back(self, asked: RollBack) -> RollBack:
        """Returns the error to leave with, once the checkpoints after the wanted one are set aside
        and the batches since then are in the data ledger. Errors: BadStep after too many.
        """
        told: Any = None
        if self.mesh.rank == 0:
            told = self._set_back(str(asked))
        told = self.mesh.broadcast_json(told)
        if not told["goes_back"]:
            raise BadStep(told["sentence"])
        return RollBack(told["sentence"])

    def _set_back(self, reason: str) -> dict[str, Any]:
        recorder, options = self.recorder, self.options
        ledger = DataLedger.read(recorder.folder)
        if len(ledger.rollbacks) >= options.max_rollbacks:
            return {
                "goes_back": False,
                "sentence": f"The run went back {len(ledger.rollbacks)} times "
                f"(guard.max_rollbacks), and again {reason}. Lower optim.lr, or look at the data.",
            }
        steps = [number for number, _ in store.step_folders(recorder.checkpoints)]
        steps = [number for number in steps if number < self.step]  # the newest first
        to = steps[min(options.rollback, len(steps)) - 1] if steps else 0
        entry = ledger.add(self.step, to, reason, options.skip_batches)
        ledger.write(recorder.folder)
        first, last = entry["batches"]
        recorder.set_back(self.step, to + 1, {"to": to, "reason": reason, "batches": [first, last]})
        where = f"step {to}" if to else "the beginning"
        sentence = (
            f"The run goes back to {where} and leaves out batches {first} to {last}: {reason}."
        )
        recorder.note(f"warning: {sentence}")
        return {"goes_back": True, "sentence": sentence}

    # Replicas

    def check_replicas(self) -> None:
        """Compare what ranks hold alike. Errors: InternalError with the rank and the tensors."""
        found = self.replicas.differences()
        if not found:
            return
        rows = [each._asdict() for each in found]
        self.recorder.event("replica_mismatch", step=self.step, found=rows[:20], count=len(rows))
        raise InternalError(f"After step {self.step} {self._differing(found)}")

    def _differing(self, found: list[Mismatch]) -> str:
        first = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        name = first.name.partition(" (")[0]
        if first.others:
            who = ", ".join(map(self._place, first.ranks))
            ones = ", ".join(map(str, first.others))
            what = f"{who} differs from its replicas (ranks {ones}) in {name}{more}. {HARDWARE}"
        else:
            who = " and ".join(map(self._place, first.ranks))
            what = f"{who}, which are replicas, differ in {name}{more}: one of them is wrong, and "
            what += "two cannot tell which. Memory or arithmetic of one is not to be trusted"
        return (
            f"{what}. No checkpoint holds this state: the same command goes on from the newest one."
        )

    def _place(self, rank: int) -> str:
        coords = self.mesh.layout.coords(rank)
        return f"rank {rank} ({' '.join(f'{axis}={coords[axis]}' for axis in _AXES)})"


_AXES = ("pp", "dp", "cp", "tp")


@contextmanager
def deterministic(config: JobConfig) -> Iterator[None]:
    """Let torch refuse what has no deterministic implementation, if the run is strict."""
    if config.train.determinism != "strict":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs a pass over all memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def run_guarded(
    run: Callable[..., None],
    config: JobConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train with a kind's `run`, and again whenever the run goes back to a checkpoint; collective
    over the world.
    """
    with deterministic(config):
        while True:
            try:
                return run(config, mesh, resume, own_log, allowed)
            except RollBack:
                resume = "auto"  # there may be no checkpoint to go back to
            gc.collect()  # the engine of before
