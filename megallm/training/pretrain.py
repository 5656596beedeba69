"""Pretraining: next-token prediction on indexed datasets. A page over Engine and Loop."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, UsageError
from megallm.base.files import atomic_path
from megallm.checkpoint import store
from megallm.checkpoint.reader import Reader
from megallm.convert.convert import IMPORTED
from megallm.convert.folder import is_model_folder
from megallm.convert.tokenizer_files import copy_tokenizer, has_tokenizer
from megallm.data import meta, order, tokenizer
from megallm.data.loader import Loader, make_batch
from megallm.data.pretrain import SampleDataset, build_split
from megallm.data.sampler import rows_after
from megallm.engine.config import EngineConfig, PipelineOptions
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.optim.config import ZeroOptions
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.loop import Job, Ledger, Loop
from megallm.training.recorder import Recorder
from megallm.training.signals import listening
from megallm.training.weights import build_engine, is_import

log = logging.getLogger(__name__)


def run(config: PretrainConfig, mesh: Mesh, resume: str) -> None:
    """Train to `train.stop_at` or `train.steps`; collective over the world.

    `config` is checked and resolved. `resume` is auto (go on from the newest valid checkpoint if there is
    one), must (UsageError without one) or never (UsageError with one).
    """
    with listening() as requests, Recorder(config, mesh.rank) as recorder:
        identity = describe(config)
        found = find_checkpoint(recorder.checkpoints, resume, mesh)
        ledger = Ledger() if found is None else Ledger(**check_identity(found, identity))
        engine, begin = build_engine(engine_config(config), mesh, found)
        layout = dataclasses.asdict(mesh.layout)
        recorder.start(ledger.step, {"layout": layout, "world": mesh.layout.world, "device": str(mesh.device)})
        if mesh.rank == 0:
            keep_tokenizer(config)
        recorder.note(opening(config, engine, begin))
        with train_loader(config, mesh, ledger) as loader:
            held_out = HeldOut(config, engine)
            job = Job(config, engine, NextToken(), loader, lambda: loader.wait_seconds, held_out.loss, identity, ledger)
            Loop(job, recorder, requests).run()


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
        recompute=config.train.recompute,
        seed=config.run.seed,
    )


def opening(config: PretrainConfig, engine: Engine, begin: str) -> str:
    """One line about what starts or goes on; `begin` is a clause about the weights."""
    layout = engine.mesh.layout
    size = f"{config.model.num_params() / 1e6:.1f}M parameters"
    where = f"tp={layout.tp} pp={layout.pp} dp={layout.dp}{' sp' if config.layout.sp else ''}"
    where += f" cp={layout.cp} {config.layout.cp_kind}" * (layout.cp > 1) + f" {config.train.precision}"
    return f"{begin}: {config.model.family}, {size}, {where}, {config.train.steps} steps, run folder {config.run.dir}"


# Data


def train_loader(config: PretrainConfig, mesh: Mesh, ledger: Ledger) -> Loader:
    """Batches of the steps that are left; the same on every rank of a replica. Steps count from 1."""
    train, data = config.train, config.data
    samples = build_split(
        data.sources,
        data.split,
        "train",
        train.steps * train.global_batch,
        data.seq_len,
        data.seed,
        config.model.vocab_size,
    )
    last = train.stop_at or train.steps
    check_tokenizers(config, mesh)

    def rows_of_step(step: int) -> list[list[int]]:
        consumed = (step - 1) * train.global_batch
        return rows_after(consumed, train.global_batch, train.micro_batch, mesh.data.size, mesh.data.rank)

    return Loader(samples, rows_of_step, ledger.step + 1, last + 1, pin=mesh.device.type == "cuda")


def tokenizer_of(config: PretrainConfig) -> str | None:
    """`data.tokenizer`, else the tokenizer that came with `model.hf`, else bytes if they made the sources, else None."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    if config.model.hf is not None and has_tokenizer(Path(config.model.hf)):
        return config.model.hf
    side_cars = [meta.read(prefix) for prefix in config.data.sources]
    bytewise = all(car and car["tokenizer"]["fingerprint"] == tokenizer.ByteTokenizer.fingerprint for car in side_cars)
    return tokenizer.BYTES if bytewise else None


def check_tokenizers(config: PretrainConfig, mesh: Mesh) -> None:
    """Refuse sources that were made with another tokenizer than the run's."""
    spec = tokenizer_of(config)
    if spec is not None and mesh.rank == 0:
        fingerprint = tokenizer.load(spec).fingerprint
        for prefix in config.data.sources:
            meta.check_tokenizer(prefix, fingerprint)


class HeldOut:
    """The mean loss over the first `eval.batches` global batches of the validation split."""

    def __init__(self, config: PretrainConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.samples: SampleDataset | None = None
        data, wanted = config.data, config.eval.batches * config.train.global_batch
        shares = order.parse_split(data.split)
        if wanted and shares[1] > 0:
            self.samples = build_split(
                data.sources, data.split, "valid", wanted, data.seq_len, data.seed, config.model.vocab_size
            )

    def loss(self) -> float | None:
        """Nats per token, None without held-out data; collective over the world."""
        if self.samples is None:
            return None
        train, mesh = self.config.train, self.engine.mesh
        total, count = 0.0, 0
        for batch in range(self.config.eval.batches):
            consumed = batch * train.global_batch
            rows = rows_after(consumed, train.global_batch, train.micro_batch, mesh.data.size, mesh.data.rank)
            micros = [make_batch([self.samples.sample(row) for row in micro]) for micro in rows]
            sums, counts = self.engine.evaluate(micros, NextToken())
            total, count = total + sums["loss"], count + counts["loss"]
        return total / count


def keep_tokenizer(config: PretrainConfig) -> None:
    """Copy the tokenizer into the run folder, so that a checkpoint can be used wherever the run folder goes."""
    spec, target = tokenizer_of(config), Path(config.run.dir) / "tokenizer"
    if spec in (None, tokenizer.BYTES) or target.exists():
        return
    source = Path(spec)
    with atomic_path(target) as temporary:
        if is_model_folder(source):  # weights lie beside the tokenizer: its files only
            temporary.mkdir()
            copy_tokenizer(source, temporary)
        elif source.is_dir():
            shutil.copytree(source, temporary)
        else:
            temporary.mkdir()
            shutil.copy(source, temporary / "tokenizer.json")


# Resuming


def describe(config: PretrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of the configuration, to refuse a run that is not the same run."""
    data = config.data
    return {
        "kind": "pretrain",
        "model": dataclasses.asdict(dataclasses.replace(config.model, hf=None)),
        "precision": config.train.precision,
        "seed": config.run.seed,
        "tokenizer": tokenizer_of(config),
        "data": {
            "sources": data.sources,
            "split": data.split,
            "seq_len": data.seq_len,
            "order": data.order,
            "seed": data.seed,
            "samples": config.train.steps * config.train.global_batch,
            "global_batch": config.train.global_batch,
        },
    }


def find_checkpoint(root: Path, resume: str, mesh: Mesh) -> Path | None:
    """The newest valid checkpoint as rank 0 sees it; collective over the world."""
    answer: dict[str, Any] = {}
    if mesh.rank == 0:
        found, warnings = store.latest(root)
        answer = {"found": str(found) if found else None, "warnings": warnings}
    answer = mesh.broadcast_json(answer)
    found = Path(answer["found"]) if answer["found"] else None
    for warning in answer["warnings"] if found is not None and mesh.rank == 0 else ():
        log.warning("%s", warning)
    if found is None and resume == "must":
        raise UsageError(
            f"--resume must: there is no valid checkpoint under {root}. {' '.join(answer['warnings'])}".rstrip()
        )
    if found is not None and resume == "never":
        raise UsageError(f"--resume never: {found} exists. Choose another run.dir, or remove it.")
    if found is None and answer["warnings"]:
        raise CheckpointError(
            f"No checkpoint under {root} is usable: {' '.join(answer['warnings'])} "
            "Repair or remove the folder; starting afresh over it would hide the damage."
        )
    return found


def check_identity(found: Path, identity: dict[str, Any]) -> dict[str, int]:
    """The ledger of a checkpoint; UsageError with a table of what differs when the run is another one."""
    with Reader(found) as reader:
        saved = reader.meta
        if is_import(reader):
            identity = {"model": identity["model"]}
            saved = {"ledger": {}, **saved}
    if not isinstance(saved, dict) or saved.get("kind") not in (identity.get("kind"), IMPORTED):
        raise CheckpointError(f"{found} was not written by a pretraining run.")
    differences = [
        f"  {'.'.join(path)}: checkpoint {old!r}, configuration {new!r}"
        for path, old, new in _differences(saved, identity)
    ]
    if differences:
        lines = "\n".join(differences)
        raise UsageError(
            f"{found} belongs to a run that differs from this configuration:\n{lines}\n"
            "Restore these values, or start anew in another run.dir. "
            "(Layout, learning rate, evaluation and logging may change.)"
        )
    return saved["ledger"]


def _differences(saved: dict[str, Any], wanted: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple]:
    found = []
    for key, new in wanted.items():
        old = saved.get(key)
        if isinstance(new, dict) and isinstance(old, dict) and key != "sources":
            found += _differences(old, new, (*path, key))
        elif old != new and key != "tokenizer":
            found.append(((*path, key), old, new))
    return found
