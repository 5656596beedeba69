"""Where the weights of a run come from: its own checkpoint, imported weights, a Hugging Face
folder, another run, or the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megallm.base.errors import CheckpointError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.convert import is_import
from megallm.convert.weights import Cast, HfReader, WeightSource
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Mesh, Prepare
from megallm.models.config import ModelConfig
from megallm.training.starting import newest_step


@dataclass(frozen=True)
class Weights:
    """Weights that a run starts from: the folder (of a run its step), how it is called, and what is
    to be told of them.
    """

    source: WeightSource
    folder: Path
    name: str
    notes: tuple[str, ...] = ()

    @property
    def begin(self) -> str:
        """Returns a clause that says which weights these are."""
        notes = "".join(f" (note: {note})" for note in self.notes)
        return f"starting from the weights of {self.folder}{notes}"


@contextmanager
def starting_weights(model: ModelConfig, mesh: Mesh) -> Iterator[Weights | None]:
    """Opens the weights that `model.hf` or `model.init` names; None without either. Collective over
    the world.
    """
    if model.hf is not None:
        with HfReader(model.hf, model) as source:
            yield Weights(source, Path(model.hf), f"model.hf {model.hf}", tuple(source.notes))
    elif model.init is not None:
        with CheckpointReader(whole_step(model.init, mesh)) as reader:
            yield Weights(Cast(reader), Path(reader.folder), f"model.init {model.init}")
    else:
        yield None


def whole_step(source: str, mesh: Mesh) -> Path:
    """Returns the step folder that a run or step folder stands for, of a run the newest whose
    weights are whole; collective over the world. Errors: `CheckpointError`.
    """
    root = Path(source) / "checkpoints"
    if not root.is_dir():
        return newest_step(source)
    found, warnings = store.latest_whole(root, mesh, store.weights_only)
    if found is None:
        raise CheckpointError(f"{source} holds no valid checkpoint. {' '.join(warnings)}".rstrip())
    return found


def build_engine(
    config: EngineConfig, mesh: Mesh, found: Path | None, prepare: Prepare | None = None
) -> tuple[Engine, str]:
    """Returns an engine with the weights that the run starts or goes on with, and a clause that
    says which.

    `found` is the run's newest checkpoint; it wins over `model.hf` and `model.init`. Each rank
    reads its own pieces only. `prepare` is that of `Engine.build`. Collective over the world.
    """
    if found is None:
        with starting_weights(config.model, mesh) as weights:
            if weights is None:
                return Engine.build(config, mesh, prepare), "starting"
            return read_weights(config, mesh, weights.source, prepare), weights.begin
    with CheckpointReader(found) as reader:
        if is_import(reader):
            engine = read_weights(config, mesh, Cast(reader), prepare)
            return engine, f"starting from the imported weights of {found}"
        engine = Engine(config, mesh, prepare)
        engine.load(reader)
        return engine, f"resumed at step {reader.step}{_wins(config.model)}"


def _wins(model: ModelConfig) -> str:
    key = "model.hf" if model.hf is not None else "model.init"
    folder = model.hf or model.init
    return f" of its own checkpoint, which wins over {key} {folder}" if folder else ""


def read_weights(
    config: EngineConfig, mesh: Mesh, source: WeightSource, prepare: Prepare | None = None
) -> Engine:
    """Returns an engine whose master weights come from `source`, whatever dtype it has; each rank
    reads what it keeps.

    A head that the source lacks starts afresh, from the seed.
    """
    engine = Engine(config, mesh, prepare)
    engine.fill(source)
    return engine
