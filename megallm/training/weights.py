"""Where the weights of a run come from: its own checkpoint, imported weights, a Hugging Face
folder, or the seed.
"""

from __future__ import annotations

from pathlib import Path

from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.convert import is_import
from megallm.convert.weights import Cast, HfReader, WeightSource
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Mesh, Prepare


def build_engine(
    config: EngineConfig, mesh: Mesh, found: Path | None, prepare: Prepare | None = None
) -> tuple[Engine, str]:
    """Returns an engine with the weights that the run starts or goes on with, and a clause that
    says which.

    `found` is the run's newest checkpoint; it wins over `model.hf`. Each rank reads its own pieces
    only. `prepare` is that of `Engine.build`. Collective over the world.
    """
    folder = config.model.hf
    if found is None and folder is None:
        return Engine.build(config, mesh, prepare), "starting"
    if found is None:
        with HfReader(folder, config.model) as source:
            notes = "".join(f" (note: {note})" for note in source.notes)
            engine = read_weights(config, mesh, source, prepare)
            return engine, f"starting from the weights of {folder}{notes}"
    with CheckpointReader(found) as reader:
        if is_import(reader):
            engine = read_weights(config, mesh, Cast(reader), prepare)
            return engine, f"starting from the imported weights of {found}"
        engine = Engine(config, mesh, prepare)
        engine.load(reader)
        wins = f" of its own checkpoint, which wins over model.hf {folder}" if folder else ""
        return engine, f"resumed at step {reader.step}{wins}"


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
