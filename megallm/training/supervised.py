"""Training on batches that are known before: pre-training, fine-tuning, reward models.

A trainer is a `SupervisedRun`: what is read, with which loss, and what a checkpoint must agree
with. `run_supervised` does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, InternalError
from megallm.data.batches import BatchReader, Share
from megallm.data.loader import Batch, Loader
from megallm.data.stream import samplelog
from megallm.engine.engine import Engine, Loss, Mesh, Part, Prepare, StepStats
from megallm.optim.lr import learning_rate
from megallm.run.changes import Change
from megallm.run.config import JobConfig
from megallm.run.recorder import Recorder
from megallm.run.signals import SignalRequests, handle_signals
from megallm.training.data_ledger import SkippingReader, ledger_of_data
from megallm.training.loop import Loop, closing
from megallm.training.opening import opening
from megallm.training.resuming import (
    Identity,
    check_allowed,
    find_checkpoint,
    same_run,
    unreadable,
)
from megallm.training.shared_prefix import saving_of
from megallm.training.trainer import Ledger, StepReport, finite
from megallm.training.weights import build_engine


@dataclass
class Feed:
    """Where batches come from.

    `batches` yields (step, this data rank's microbatches) of the steps that are left;
    `wait_seconds` says how long the run has waited for them so far, `data_after` what the ledger's
    `data` is once a step is done. `seq_len` is that of the FLOPs of a token.
    """

    batches: Iterable[tuple[int, list[Batch]]]
    wait_seconds: Callable[[], float]
    data_after: Callable[[int], dict[str, Any]]
    seq_len: int
    rows: Callable[[int], list[dict[str, Any]]] = lambda step: []  # of a step, which this rank reads


Evaluation = Callable[[], dict[str, float | None]]  # held-out numbers under their names in metrics


class SupervisedTrainer:
    """One update a step from the next batch; `evaluation` returns the held-out numbers."""

    def __init__(
        self,
        job: SupervisedRun,
        engine: Engine,
        feed: Feed,
        evaluation: Evaluation,
        identity: dict[str, Any],
    ) -> None:
        self.job, self.config, self.engine, self.feed = job, job.config, engine, feed
        self.loss, self.evaluation, self.identity = job.loss(), evaluation, identity
        self._batches, self._waited = iter(feed.batches), 0.0
        self._flops_of_token = self.config.model.num_flops(feed.seq_len)

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        number, batches = next(self._batches)
        if number != step:
            raise InternalError(f"The batches are those of step {number}, the loop is at {step}.")
        mtp = self.config.model.mtp
        waited = self.feed.wait_seconds() - self._waited
        self._waited += waited
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        batches = self.completed(step, batches)
        stats = self.engine.train_step(batches, self.loss, lr)
        tokens = sum(batch["tokens"].numel() for batch in batches) * self.engine.mesh.data.size
        return StepReport(
            stats,
            lr,
            self.config.train.global_batch,
            tokens,
            losses=train_losses(stats),
            metrics=_tokens(stats) | mtp_losses(stats, mtp.depth, mtp.weight) | saving_of(batches),
            flops=self._flops_of_token * tokens,
            wait_seconds=waited,
            data=self.feed.data_after(step),
        )

    def completed(self, step: int, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches of a step with what the loss needs besides."""
        return self.job.complete(self.engine, batches)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Returns the rows of one of the last steps that this rank reads."""
        return self.feed.rows(step)

    def evaluate(self) -> dict[str, float | None]:
        """Returns the held-out numbers; collective over the world."""
        return self.evaluation()

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of weights and optimizer state."""
        return self.job.parts(self.engine)

    def counters(self) -> dict[str, Any]:
        """Returns what belongs to the engine's state besides tensors."""
        return self.engine.counters()


def train_losses(stats: StepStats) -> dict[str, float]:
    """Returns `train/loss`: the term of that name, or where there is none the sum of all terms,
    with each one as `train/TERM` beside it.
    """
    if "loss" in stats.losses:
        return {"train/loss": stats.losses["loss"]}
    terms = {f"train/{name}": value for name, value in stats.losses.items()}
    return {"train/loss": stats.loss} | terms


def _tokens(stats: StepStats) -> dict[str, float | None]:
    """Returns `train/tokens`: the tokens that the loss is a mean over, where it is one of
    tokens.
    """
    return {"train/tokens": stats.counts["loss"]} if "loss" in stats.counts else {}


def mtp_losses(stats: StepStats, depth: int, weight: float) -> dict[str, float | None]:
    """Returns `train/mtp_loss`: the mean over depths in nats per token, without its weight.

    Where there are several depths each one's loss is beside it.
    """
    terms = {
        name: value * depth / weight
        for name, value in stats.losses.items()
        if name.startswith("mtp_")
    }
    if not terms:
        return {}
    each = (
        {f"train/{name}_loss": finite(value) for name, value in terms.items()}
        if len(terms) > 1
        else {}
    )
    return {"train/mtp_loss": finite(sum(terms.values()) / len(terms))} | each


class SupervisedRun:
    """What a way of supervised training gives to `run_supervised`; `config` is checked and
    resolved.
    """

    identity: type[Identity]
    prepare: Prepare | None = None  # fills adapter slots and freezes parameters, see `Engine.build`
    trainer: type[SupervisedTrainer] = SupervisedTrainer
    log_samples = False  # the rows of each step are written to RUN/samples.jsonl

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.meta: dict[str, Any] = {}  # what a checkpoint remembers beside the identity

    def check_data(self) -> str | None:
        """Returns a sentence to warn with; rank 0 only. Errors: `DataError`."""
        return None

    def read_data(self, mesh: Mesh) -> None:
        """Make what is read ready, before any weight is; collective over the world. Errors:
        `DataError`.
        """

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the engine with its weights, those of the checkpoint `found` where there is one,
        and a clause that says which; collective over the world.
        """
        return build_engine(self.config.engine, mesh, found, self.prepare)

    def show(self, recorder: Recorder) -> None:
        """Tell a person what is read and trained, before the first step."""

    def keep(self, changes: Sequence[Change]) -> None:
        """Write what belongs into the run folder, such as the tokenizer; rank 0 only."""

    def reader(self, share: Share, first_step: int, state: dict[str, Any]) -> BatchReader:
        """Returns what this data rank reads from `first_step` on; `state` is the ledger's `data`,
        empty at the beginning.
        """
        raise NotImplementedError

    def loss(self) -> Loss:
        """Returns what is trained."""
        raise NotImplementedError

    def complete(self, engine: Engine, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches of a step, or of an evaluation, with what the loss needs beside
        what was read, such as the reference's log-probabilities; collective over the world.
        """
        return batches

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint's tensors."""
        return engine.parts()

    def finish(self, engine: Engine) -> None:
        """Write what a run leaves beside its last checkpoint; collective over the world."""

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns what evaluates after the step that the ledger is at; opens the files."""
        return dict

    def seq_len(self) -> int:
        """Returns the tokens of a row, which the FLOPs of a token follow from."""
        return self.config.data.seq_len

    def next_command(self) -> str:
        """Returns what to do with the weights of a run that reached its last step."""
        return f'megallm generate --model {Path(self.config.run.dir)} --prompt "..."'


@dataclass
class OpenRun:
    """A run whose engine has its weights and whose folder is open, before its first step."""

    engine: Engine
    ledger: Ledger
    recorder: Recorder
    requests: SignalRequests
    identity: Identity


@contextmanager
def open_run(
    job: SupervisedRun,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> Iterator[OpenRun]:
    """Begin a run, or go on with it; collective over the world.

    `resume` is auto (go on from the newest valid checkpoint if there is one), must (UsageError
    without one) or never (UsageError with one). With `own_log` rank 0 writes its lines to
    RUN/logs/rank-0.log itself; otherwise whoever started it copies its output there. `allowed` are
    keys that may differ from the checkpoint's although they make it another run.
    """
    config = job.config
    check_allowed(allowed, type(config), job.identity)
    with handle_signals() as requests, Recorder(config, mesh.rank, own_log) as recorder:
        warning = job.check_data() if mesh.rank == 0 else None
        job.read_data(mesh)
        identity = job.identity(config)
        found, damaged = find_checkpoint(recorder.checkpoints, resume, mesh)
        ledger, changes = same_run(identity, found, allowed, mesh)
        try:
            engine, begin = job.build(mesh, found)
        except CheckpointError as error:
            raise unreadable(error, changes) from error
        layout = dataclasses.asdict(mesh.layout)
        recorder.start(
            ledger.step, {"layout": layout, "world": mesh.layout.world, "device": str(mesh.device)}
        )
        if mesh.rank == 0:
            job.keep(changes)
        recorder.damaged(ledger.step, damaged)
        recorder.changed(ledger.step, changes)
        if warning is not None:
            recorder.note(warning)
        recorder.note(opening(config, engine, begin))
        job.show(recorder)
        yield OpenRun(engine, ledger, recorder, requests, identity)
        recorder.last_words = closing(config, ledger.step, job.next_command())


def run_supervised(
    job: SupervisedRun,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train to `train.stop_at` or `train.steps`; collective over the world. See `open_run`."""
    config, train = job.config, job.config.train
    with open_run(job, mesh, resume, own_log, allowed) as opened:
        engine, ledger, recorder = opened.engine, opened.ledger, opened.recorder
        share = Share(train.global_batch, train.micro_batch, mesh.data.size, mesh.data.rank)
        first, left_out = ledger.step + 1, ledger_of_data(recorder.folder, mesh)
        reader = job.reader(share, left_out.number(ledger.step) + 1, ledger.data)
        if left_out.rollbacks:
            reader = SkippingReader(reader, left_out, first)
        end = (train.stop_at or train.steps) + 1
        with (
            Loader(reader.batches, first, end, pin=mesh.device.type == "cuda") as loader,
            _logged(job, mesh, loader, reader, ledger.step) as batches,
        ):
            evaluation = job.evaluation(engine, share, ledger)
            waited, kept = (lambda: loader.wait_seconds), reader.state_after
            feed = Feed(batches, waited, kept, job.seq_len(), reader.consumed)
            values = opened.identity.values | job.meta
            trainer = job.trainer(job, engine, feed, evaluation, values)
            Loop(trainer, config, ledger, recorder, opened.requests).run()
            job.finish(engine)


@contextmanager
def _logged(
    job: SupervisedRun, mesh: Mesh, loader: Loader, reader: BatchReader, step: int
) -> Iterator[Iterable[tuple[int, list[Batch]]]]:
    """The loader's batches, each step's rows in RUN/samples.jsonl before it is trained on, if the
    run logs them; collective over the world.

    Rows after `step`, which a run that was killed has left, are removed first. One rank of each
    replica writes.
    """
    if not job.log_samples:
        yield loader
        return
    path = Path(job.config.run.dir) / "samples.jsonl"
    if mesh.rank == 0:
        samplelog.truncate_log(path, step)
    mesh.barrier()
    coords = mesh.layout.coords(mesh.rank)
    if any(coords[axis] for axis in ("pp", "cp", "tp")):
        yield loader
        return
    with samplelog.SampleLog(path) as rows:
        yield rows.writing(loader, reader.consumed, job.config.checkpoint.may_follow)
