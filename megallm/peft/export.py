"""An adapter of a running engine as a folder of PEFT's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from megallm.base.errors import (
    CannotWrite,
    CheckpointError,
    InternalError,
    MegallmError,
    UsageError,
)
from megallm.base.files import check_new, temporary_name
from megallm.checkpoint import store
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.convert import whole_folder
from megallm.engine.engine import Engine
from megallm.peft.config import PeftConfig
from megallm.peft.files import adapter_shapes, write_folder

_KINDS = {kind.__name__: kind for kind in (CannotWrite, CheckpointError, UsageError)}


def export(
    engine: Engine,
    config: PeftConfig,
    folder: Path,
    base: str | None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter of `config` (resolved) to the new `folder`, or with `overwrite` in place of
    an older one, whatever the layout; collective over the world.

    `base` is the folder of the base model as PEFT shall find it; `dtype` None: that of the master
    weights. Values beside the head (`model.critic`) are left out. Pieces travel through a file
    system that all ranks see, the one of `folder`. Raises on every rank what rank 0 meets.
    """
    model = replace(engine.config.model, critic=None)  # PEFT and transformers know no such values
    saved = tuple(name for name in config.modules_to_save if name != "critic")
    config = replace(config, modules_to_save=saved)
    wanted, mesh = adapter_shapes(config, model), engine.mesh
    parts = [
        Part(name, shard.full, box.offset, tensor)
        for name, shard, box, tensor in engine.masters()
        if name in wanted and engine.parameters.owns(name)
    ]
    pieces = Path(mesh.broadcast_json(str(temporary_name(folder.absolute()))))
    problem = None
    step = store.save(pieces, 0, parts, {}, mesh)
    if mesh.world.rank == 0:
        try:
            check_new(folder, overwrite=overwrite)
            with whole_folder(folder) as whole, CheckpointReader(step) as reader:
                write_folder(whole, reader, config, model, base, dtype)
        except MegallmError as error:
            problem = [type(error).__name__, str(error)]
        finally:
            shutil.rmtree(pieces, ignore_errors=True)
    told = mesh.broadcast_json(problem)
    if told is not None:
        kind, sentence = told
        raise _KINDS.get(kind, InternalError)(sentence)
