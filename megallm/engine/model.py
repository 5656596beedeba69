"""The parallel model without an optimizer: this rank's stage, its storage and its pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.checkpoint.reader import Reader
from megallm.engine.config import EngineConfig
from megallm.models.build import build_stage, place_parameters
from megallm.models.decoder import StageOptions
from megallm.ops.precision import MODEL_DTYPES
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Pipeline
from megallm.parallel.shard import named_shards


class ParallelModel:
    """Built on the meta device; `place` gives it storage. Construction is collective over the world."""

    def __init__(self, config: EngineConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.dtype = MODEL_DTYPES[config.precision]
        self.stage = build_stage(config.model, mesh, StageOptions(config.sp, config.recompute))
        self.pipeline = Pipeline(mesh, self.stage, self.dtype)

    def place(self, storage: dict[str, Tensor]) -> None:
        """Let the parameters live in `storage`, by logical name."""
        place_parameters(self.stage, storage)

    @staticmethod
    def load(config: EngineConfig, mesh: Mesh, reader: Reader) -> ParallelModel:
        """A model for inference: this rank's pieces of the weights of a checkpoint written at any layout."""
        model = ParallelModel(config, mesh)
        storage = {}
        for name, param, shard in named_shards(model.stage):
            storage[name] = torch.empty(param.shape, dtype=model.dtype, device=mesh.device)
            reader.read_into(name, shard.box(mesh.layout, mesh.coords).offset, storage[name])
        model.place(storage)
        model.stage.requires_grad_(False)
        return model
