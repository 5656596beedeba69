"""`megallm replay`: the batch of a step that was not finite, once more, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megallm.base.errors import DataError, UsageError
from megallm.checkpoint.reader import step_folders
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Mesh
from megallm.engine.fault import Tracer
from megallm.losses.language import NextToken
from megallm.models.compute import ComputeConfig
from megallm.peft.adapted import open_adapted
from megallm.run.runfolder import RunFolder
from megallm.training.guard import WEIGHTS


@dataclass(frozen=True)
class SavedBatch:
    """A microbatch as the guard saved it; `about` says of which step, and what was found there."""

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]


@dataclass(frozen=True)
class Replayed:
    """What a pass in `precision` gave: the first layer that is not finite (None: all are), and the
    largest magnitude of each module's finite outputs in the order in which they came.

    `weights` is the folder that they came from, `exact` whether they are those of the step.
    """

    precision: str
    weights: str
    exact: bool
    phase: str | None
    layer: str | None
    largest: dict[str, float]


def saved_batch(run: str, step: int, rank: int | None) -> SavedBatch:
    """Returns the batch of a step. Errors: UsageError where there is none, or several and no
    `rank`; DataError for a file that cannot be read.
    """
    folder = RunFolder(run).replays
    found = sorted(folder.glob(f"step-{step}-rank-{'*' if rank is None else rank}.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in sorted(folder.glob("step-*-rank-*.safetensors")))
        what = "several; give --rank" if found else f"none; there are: {names or 'none at all'}"
        raise UsageError(f"{folder} has the batch of step {step}: {what}.")
    try:
        with safe_open(found[0], "pt") as file:
            about = json.loads((file.metadata() or {})["replay"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{found[0]} is no batch that a guard saved ({error}).") from error
    return SavedBatch(found[0], tensors, about)


def replay(batch: SavedBatch, run: str, precision: str) -> Replayed:
    """Returns what the batch gives in a forward pass, and where a gradient was not finite in a
    backward pass too: there the loss is the mean of -log p over the tokens that count.
    """
    weights, exact = _weights(RunFolder(run), batch.about["step"])
    with _engine(weights, precision) as engine:
        known = engine.config.model.scores
        needs = [name for name in batch.about["needs"] if name in known] or list(known[:1])
        fault, stages = batch.about["fault"], engine.model.stages
        tracer = Tracer(stages)
        with tracer.hooked(stages, engine.parameters.params):
            if fault["phase"] in ("backward", "gradients") and "log_prob" in known:
                engine.compute_gradients([batch.tensors], NextToken())
            else:
                engine.scores([batch.tensors], needs, batch.about["temperature"])
    phase = layer = None
    if tracer.outputs:
        phase, layer = "forward", tracer.outputs[0][3]
    elif tracer.gradients:
        phase, layer = "backward", tracer.backward_layer()
    return Replayed(precision, str(weights), exact, phase, layer, tracer.largest)


def _weights(folder: RunFolder, step: int) -> tuple[Path, bool]:
    """The weights that a step was computed with, or of the newest checkpoint before it."""
    for number, path in step_folders(folder.replays / WEIGHTS):
        if number == step:
            return path, True
    for number, path in step_folders(folder.checkpoints):
        if number < step:
            return path, number == step - 1
    raise UsageError(f"{folder.path} has no weights from before step {step}.")


@contextmanager
def _engine(weights: Path, precision: str) -> Iterator[Engine]:
    mesh = Mesh.single()
    with open_adapted(weights, None, mesh) as opened:
        config = EngineConfig(opened.model, compute=ComputeConfig(precision))
        engine = Engine(config, mesh, opened.prepare_adapters)
        engine.fill(opened.source)
        yield engine
