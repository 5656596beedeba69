"""Pretraining on indexed datasets: the next token, or tokens that were hidden. A page over Engine
and Loop.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megallm.base.errors import CheckpointError
from megallm.checkpoint import store
from megallm.data.batches import Reader, Share
from megallm.data.loader import Batch, Loader
from megallm.data.stream import samplelog
from megallm.engine.engine import Loss
from megallm.losses.language import MaskedDiffusion, NextToken
from megallm.parallel.mesh import Mesh
from megallm.run.recorder import Recorder
from megallm.run.signals import listening
from megallm.training.config import PretrainConfig
from megallm.training.held_out import HeldOut
from megallm.training.kept_tokenizer import keep_tokenizer
from megallm.training.loop import Loop
from megallm.training.opening import opening
from megallm.training.reading import (
    check_tokenizers,
    need_tokenizer,
    open_reader,
)
from megallm.training.resuming import (
    check_allowed,
    describe,
    find_checkpoint,
    same_run,
    unreadable,
)
from megallm.training.supervised import Feed, SupervisedTrainer
from megallm.training.trainer import Ledger
from megallm.training.weights import build_engine

LOSSES: dict[str, Loss] = {
    "next_token": NextToken(),
    "mlm": NextToken(),
    "diffusion": MaskedDiffusion(),
}

log = logging.getLogger(__name__)

Batches = Iterator[tuple[int, list[Batch]]]


def run(
    config: PretrainConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train to `train.stop_at` or `train.steps`; collective over the world.

    `config` is checked and resolved. `resume` is auto (go on from the newest valid checkpoint if
    there is one), must (UsageError without one) or never (UsageError with one). With `own_log` rank
    0 writes its lines to RUN/logs/rank-0.log itself; otherwise whoever started it copies its output
    there. `allowed` are keys that may differ from the checkpoint's although they make it another
    run.
    """
    check_allowed(allowed)
    with listening() as requests, Recorder(config, mesh.rank, own_log) as recorder:
        warning = None
        if mesh.rank == 0:
            check_tokenizers(config)
            warning = need_tokenizer(config)
        identity = describe(config)
        found, damaged = find_checkpoint(recorder.checkpoints, resume, mesh)
        ledger, changes = same_run(config, identity, found, allowed, mesh)
        try:
            engine, begin = build_engine(config.engine, mesh, found)
        except CheckpointError as error:
            raise unreadable(error, changes) from error
        layout = dataclasses.asdict(mesh.layout)
        recorder.start(
            ledger.step, {"layout": layout, "world": mesh.layout.world, "device": str(mesh.device)}
        )
        if mesh.rank == 0:
            keep_tokenizer(
                config, replace=any(change.key == "data.tokenizer" for change in changes)
            )
        recorder.damaged(ledger.step, damaged)
        recorder.changed(ledger.step, changes)
        if warning is not None:
            recorder.note(warning)
        recorder.note(opening(config, engine, begin))
        reader, step = train_reader(config, mesh, ledger), ledger.step
        with (
            train_loader(config, mesh, ledger, reader) as loader,
            logged(config, mesh, loader, reader, step) as batches,
        ):
            held_out = HeldOut(config, engine, ledger, LOSSES[config.data.objective])
            feed = Feed(
                batches, lambda: loader.wait_seconds, reader.state_after, config.data.seq_len
            )
            loss = trained_loss(config)
            trainer = SupervisedTrainer(config, engine, loss, feed, held_out.loss, identity)
            Loop(trainer, config, ledger, recorder, requests).run()
            recorder.last_words = closing(config, ledger.step)


def closing(config: PretrainConfig, step: int) -> tuple[str, ...]:
    """What a run says at its end: where its results are, and what to do with them."""
    run = Path(config.run.dir)
    where = f"step {step} is saved in {run / 'checkpoints' / store.step_name(step)}"
    if config.log.plot:
        where += f"; the loss curve is {run / 'plots' / 'loss.png'}"
    if step < config.train.steps:
        then = f"next: the same command without train.stop_at goes on to step {config.train.steps}"
    elif config.data.objective == "next_token":
        then = f'next: megallm generate --model {run} --prompt "..."'
    else:
        then = f"next: megallm convert --to hf --input {run} --output DIR"
    return where, then


def trained_loss(config: PretrainConfig) -> Loss:
    """The loss of the objective, with a term for each further token that the model predicts."""
    mtp = config.model.mtp
    return NextToken(mtp.depth, mtp.weight) if mtp.depth else LOSSES[config.data.objective]


# Data


def train_reader(config: PretrainConfig, mesh: Mesh, ledger: Ledger) -> Reader:
    """What this rank's replica reads after the ledger's step; the same on every rank of a
    replica.
    """
    share = Share(
        config.train.global_batch, config.train.micro_batch, mesh.data.size, mesh.data.rank
    )
    return open_reader(config, share, ledger.step + 1, ledger.data)


def train_loader(config: PretrainConfig, mesh: Mesh, ledger: Ledger, reader: Reader) -> Loader:
    """Batches of the steps that are left. Steps count from 1."""
    last = config.train.stop_at or config.train.steps
    return Loader(reader.batches, ledger.step + 1, last + 1, pin=mesh.device.type == "cuda")


@contextmanager
def logged(
    config: PretrainConfig, mesh: Mesh, loader: Loader, reader: Reader, step: int
) -> Iterator[Batches]:
    """The loader's batches, each step's rows in RUN/samples.jsonl before it is trained on;
    collective over the world.

    Rows after `step`, which a run that was killed has left, are removed first. One rank of each
    replica writes.
    """
    if not config.data.log_samples:
        yield loader
        return
    path = Path(config.run.dir) / "samples.jsonl"
    if mesh.rank == 0:
        samplelog.cut(path, step)
    mesh.barrier()
    coords = mesh.layout.coords(mesh.rank)
    if any(coords[axis] for axis in ("pp", "cp", "tp")):
        yield loader
        return
    every = config.checkpoint.every
    with samplelog.SampleLog(path) as rows:
        yield rows.writing(loader, reader.consumed, lambda step: every > 0 and step % every == 0)
