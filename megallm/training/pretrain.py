"""Pretraining on indexed datasets: the next token, or tokens that were hidden. A page over Engine and Loop."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.base.files import atomic_path
from megallm.checkpoint import store
from megallm.convert.folder import is_model_folder
from megallm.convert.tokenizer_files import copy_tokenizer, tokenizer_spec
from megallm.data import samplelog, tokenizer
from megallm.data.batches import Reader, Share
from megallm.data.loader import Batch, Loader, to_tensors
from megallm.data.tokenizer_folder import form_of, keep
from megallm.engine.config import EngineConfig, PipelineOptions
from megallm.engine.engine import Engine, Loss
from megallm.losses.language import MaskedDiffusion, NextToken
from megallm.optim.config import ZeroOptions
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.loop import Job, Ledger, Loop
from megallm.training.reading import (
    check_tokenizers,
    first_held_out,
    held_out_readers,
    need_tokenizer,
    open_reader,
    tokenizer_of,
)
from megallm.training.recorder import Recorder
from megallm.training.resuming import (
    Change,
    check_allowed,
    config_changes,
    describe,
    describe_files,
    find_checkpoint,
    ledger_and_changes,
    unreadable,
)
from megallm.training.runfolder import RunFolder
from megallm.training.signals import listening
from megallm.training.weights import build_engine

LOSSES: dict[str, Loss] = {"next_token": NextToken(), "mlm": NextToken(), "diffusion": MaskedDiffusion()}

log = logging.getLogger(__name__)

Batches = Iterator[tuple[int, list[Batch]]]


def run(
    config: PretrainConfig, mesh: Mesh, resume: str, own_log: bool = False, allowed: Sequence[str] = ()
) -> None:
    """Train to `train.stop_at` or `train.steps`; collective over the world.

    `config` is checked and resolved. `resume` is auto (go on from the newest valid checkpoint if there is
    one), must (UsageError without one) or never (UsageError with one). With `own_log` rank 0 writes its lines to
    RUN/logs/rank-0.log itself; otherwise whoever started it copies its output there. `allowed` are keys that may
    differ from the checkpoint's although they make it another run.
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
            engine, begin = build_engine(engine_config(config), mesh, found)
        except CheckpointError as error:
            raise unreadable(error, changes) from error
        layout = dataclasses.asdict(mesh.layout)
        recorder.start(ledger.step, {"layout": layout, "world": mesh.layout.world, "device": str(mesh.device)})
        if mesh.rank == 0:
            keep_tokenizer(config, replace=any(change.key == "data.tokenizer" for change in changes))
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
            held_out = HeldOut(config, engine, ledger)
            waited = lambda: loader.wait_seconds  # noqa: E731 (a property would be read only once)
            loss = trained_loss(config)
            job = Job(config, engine, loss, batches, waited, held_out.loss, identity, ledger, reader.state_after)
            Loop(job, recorder, requests).run()
            recorder.last_words = closing(config, ledger.step)


def same_run(
    config: PretrainConfig, identity: dict[str, Any], found: Path | None, allowed: Sequence[str], mesh: Mesh
) -> tuple[Ledger, list[Change]]:
    """The ledger to go on with and what was changed since; completes `identity` with what rank 0 finds in the files.

    Collective over the world. Errors: `UsageError` on rank 0 when the run is another one; the others lose a peer.
    """
    answer: dict[str, Any] = {}
    changes: list[Change] = []
    if mesh.rank == 0:
        folder = RunFolder(config.run.dir)
        answer["files"] = describe_files(config, folder)
        if found is not None:
            others = config_changes(folder, config)
            answer["ledger"], changes = ledger_and_changes(found, identity | answer["files"], others, allowed)
        answer["changes"] = changes
    answer = mesh.broadcast_json(answer)
    identity |= answer["files"]
    return Ledger(**answer.get("ledger", {})), changes or [Change(*change) for change in answer["changes"]]


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


def engine_config(config: PretrainConfig) -> EngineConfig:
    """The part of the configuration that the engine needs."""
    layout, zero = config.layout, config.zero
    return EngineConfig(
        model=config.model,
        optim=config.optim,
        sp=layout.sp,
        cp_kind=layout.cp_kind,
        cp_ulysses=layout.cp_ulysses,
        pipeline=PipelineOptions(layout.schedule, layout.chunks, layout.stages, layout.group),
        zero=ZeroOptions(
            zero.stage, zero.shard_size, zero.bf16_grads, zero.offload, tree=config.train.determinism == "tree"
        ),
        precision=config.train.precision,
        fp8=config.train.fp8 if config.train.precision == "fp8" else None,
        loss_scale=config.train.loss_scale,
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
        recompute_layers=config.train.recompute_layers,
        offload=config.train.offload,
        fused_head=config.train.fused_head,
        seed=config.run.seed,
    )


def opening(config: PretrainConfig, engine: Engine, begin: str) -> str:
    """One line about what starts or goes on; `begin` is a clause about the weights."""
    layout = engine.mesh.layout
    size = f"{config.model.num_params() / 1e6:.1f}M parameters"
    if config.model.moe.num_experts:
        size += f" ({config.model.num_params(active=True) / 1e6:.1f}M for a token)"
    where = f"tp={layout.tp} pp={layout.pp} dp={layout.dp}{' sp' if config.layout.sp else ''}"
    where += f" ep={layout.ep}" * (layout.ep > 1)
    where += f" cp={layout.cp} {config.layout.cp_kind}" * (layout.cp > 1) + f" {config.train.precision}"
    return f"{begin}: {config.model.family}, {size}, {where}, {config.train.steps} steps, run folder {config.run.dir}"


# Data


def train_reader(config: PretrainConfig, mesh: Mesh, ledger: Ledger) -> Reader:
    """What this rank's replica reads after the ledger's step; the same on every rank of a replica."""
    share = Share(config.train.global_batch, config.train.micro_batch, mesh.data.size, mesh.data.rank)
    return open_reader(config, share, ledger.step + 1, ledger.data)


def train_loader(config: PretrainConfig, mesh: Mesh, ledger: Ledger, reader: Reader) -> Loader:
    """Batches of the steps that are left. Steps count from 1."""
    last = config.train.stop_at or config.train.steps
    return Loader(reader.batches, ledger.step + 1, last + 1, pin=mesh.device.type == "cuda")


@contextmanager
def logged(config: PretrainConfig, mesh: Mesh, loader: Loader, reader: Reader, step: int) -> Iterator[Batches]:
    """The loader's batches, each step's rows in RUN/samples.jsonl before it is trained on; collective over the world.

    Rows after `step`, which a run that was killed has left, are removed first. One rank of each replica writes.
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


class HeldOut:
    """The mean loss over `eval.batches` global batches of the validation split.

    In the stream order they are always the first ones, in Megatron-LM's each evaluation reads the next ones.
    """

    def __init__(self, config: PretrainConfig, engine: Engine, ledger: Ledger) -> None:
        self.config, self.engine, train, data = config, engine, config.train, engine.mesh.data
        self.ledger = ledger  # says after which step the evaluation is
        share = Share(train.global_batch, train.micro_batch, data.size, data.rank)
        try:
            self.readers = held_out_readers(config, share)  # what cannot be read is said before the first step
        except DataError as error:
            raise DataError(f"{error} Or train without a held-out loss: eval.batches=0.") from error

    def loss(self) -> float | None:
        """Nats per token, None without held-out data; collective over the world."""
        if self.readers is None:
            return None
        reader, total, count = self.readers(), 0.0, 0
        first = first_held_out(self.config, self.ledger.step)
        for batch in range(first, first + self.config.eval.batches):
            micros = [to_tensors(arrays) for arrays in reader.batches(batch)]
            sums, counts = self.engine.evaluate(micros, LOSSES[self.config.data.objective])
            total, count = total + sums["loss"], count + counts["loss"]
        return total / count if count else None


def keep_tokenizer(config: PretrainConfig, replace: bool = False) -> None:
    """Copy the tokenizer into the run folder, so that a checkpoint can be used wherever the run folder goes.

    Errors: `UsageError` when another one lies there already, unless it may be replaced.
    """
    spec, target = tokenizer_of(config), Path(config.run.dir) / "tokenizer"
    if spec is not None and target.exists() and Path(spec).resolve().is_relative_to(target.resolve()):
        return  # data.tokenizer names the run's own copy, as where the first one is gone
    if replace and spec is not None and target.exists():
        shutil.rmtree(target)
    if spec is not None and form_of(target) is not None:
        if tokenizer.load(str(target)).fingerprint != tokenizer.load(spec).fingerprint:
            raise UsageError(
                f"{target} is another tokenizer than {spec}, which the data was made with: a run folder keeps the one "
                "that its checkpoints belong to. Choose another run.dir, or remove that folder."
            )
        return
    folder = None if config.model.hf is None else Path(config.model.hf)
    more = folder is not None and tokenizer_spec(folder) in (None, tokenizer.BYTES)  # it only says which ids end a text
    if spec in (None, tokenizer.BYTES) and (not more or target.exists()):
        return
    with atomic_path(target) as temporary:
        if spec in (None, tokenizer.BYTES):
            temporary.mkdir()
        elif is_model_folder(Path(spec)):  # weights lie beside it, and nobody vouches for its files
            temporary.mkdir()
            copy_tokenizer(Path(spec), temporary)
        else:
            keep(spec, temporary)
        if more:
            copy_tokenizer(folder, temporary, definition=False)
        if target.exists():  # what an import without a tokenizer said about texts
            for path in target.iterdir():
                if path.is_file() and not (temporary / path.name).exists():
                    shutil.copyfile(path, temporary / path.name)
            shutil.rmtree(target)
