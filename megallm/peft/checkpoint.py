"""Checkpoints of adapters alone: what is trained, and which base it stands on.

The base is named by its folder and by a hash of what is in it. `parts` leaves its frozen weights
out, `base_reference` makes the entry `base` of a checkpoint's meta, and `open_base` finds the base
again and refuses another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from megallm.base.errors import CheckpointError
from megallm.checkpoint.io import Part
from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.reader import CheckpointReader
from megallm.checkpoint.shard_file import read_regular
from megallm.checkpoint.store import weights_only
from megallm.checkpoint.tools import resolve_step
from megallm.convert.folder import catalogue, is_model_folder
from megallm.convert.weights import Cast, HfReader, WeightSource
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards
from megallm.parallel.tensor import ADAPTER
from megallm.peft.sources import Joined

_BLOCK = 16 * 2**20


def trained_parts(engine: Engine) -> Iterator[Part]:
    """Yields this rank's parts of a checkpoint without the frozen weights of the base.

    Adapters are written whether they are trained or not, and everything of the optimizer's.
    """
    stages = engine.model.stages.values()
    frozen = {
        name
        for stage in stages
        for name, param, _ in named_shards(stage)
        if not param.requires_grad and ADAPTER not in name
    }
    yield from (part for part in engine.parts() if part.name not in frozen)


def base_reference(folder: str | os.PathLike[str], mesh: Mesh | None = None) -> dict[str, str]:
    """Returns `{"path", "xxh3_128"}` of a model: a Hugging Face folder, a run or a step folder.

    The hash is that of the weights' bytes, so it stays when the folder moves. With a mesh it is
    collective over the world, and ranks share the reading.
    """
    path = Path(folder)
    if not is_model_folder(path):
        step = resolve_step(folder, weights_only)
        digest = xxhash.xxh3_128_hexdigest(bytes(read_regular(step / MANIFEST, 0, None)))
        return {"path": str(step), "xxh3_128": digest}
    files = sorted({entry.path for entry in catalogue(path).values()})
    rank, size = (0, 1) if mesh is None else (mesh.world.rank, mesh.world.size)
    mine = {str(i): _hash(file) for i, file in enumerate(files) if i % size == rank}
    told = [mine] if mesh is None else mesh.broadcast_json(mesh.gather_json(mine))
    hashes = {int(i): each for part in told for i, each in part.items()}
    joined = "".join(hashes[i] for i in range(len(files)))
    return {"path": str(path), "xxh3_128": xxhash.xxh3_128_hexdigest(joined.encode())}


def _hash(file: Path) -> str:
    state, size = xxhash.xxh3_128(), os.stat(file).st_size
    for begin in range(0, size, _BLOCK):
        state.update(read_regular(file, begin, min(_BLOCK, size - begin)))
    return state.hexdigest()


def check_base(base: Any, where: str, mesh: Mesh | None = None) -> Path:
    """Returns the folder of the base that a checkpoint's meta names. Errors: CheckpointError when
    it is gone, or holds other weights."""
    if not isinstance(base, dict) or not {"path", "xxh3_128"} <= base.keys():
        raise CheckpointError(f"{where} holds adapters alone and does not name their base.")
    path = Path(base["path"])
    if not path.is_dir():
        raise CheckpointError(
            f"{where} holds adapters of the base model {path}, which is not there: put it back, or "
            "link it there."
        )
    if base_reference(path, mesh)["xxh3_128"] != base["xxh3_128"]:
        raise CheckpointError(
            f"{where} holds adapters of the base model {path}, but that folder has other weights "
            "now: put back those that the run began with."
        )
    return path


@contextmanager
def open_base(folder: Path, model: ModelConfig) -> Iterator[WeightSource]:
    """Yields the weights of a base by logical name, whatever folder they are in; `model` is what is
    trained.
    """
    if is_model_folder(folder):
        with HfReader(folder, model) as source:
            yield source
    else:
        with CheckpointReader(resolve_step(folder, weights_only)) as reader:
            yield Cast(reader)


def load(engine: Engine, reader: CheckpointReader) -> None:
    """Fill an engine from a checkpoint: of adapters alone with the base it names, or a whole one.

    Works at any layout; collective over the world. Errors: CheckpointError.
    """
    if "base" not in reader.meta:
        engine.load(reader)
        return
    folder = check_base(reader.meta["base"], str(reader.folder), engine.mesh)
    with open_base(folder, engine.config.model) as base:
        engine.load(Joined(reader, base))
