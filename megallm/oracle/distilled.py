"""Teachers of the oracle's rows that distil: a second engine on the same mesh, the student's base,
or stored log-probs; and what the referee knows of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from megallm.engine.config import EngineConfig
from megallm.engine.distillation import compare_with, hidden_states
from megallm.engine.engine import Engine
from megallm.models.build import initial_values
from megallm.optim.config import ZeroConfig
from megallm.oracle.reference_adapters import MARK
from megallm.oracle.reference_encoder import scores
from megallm.oracle.reference_moe import Notes
from megallm.oracle.table import Row
from megallm.oracle.trainers import DISTILLED
from megallm.parallel.shard import Shard
from megallm.peft.reference import off

Batch = dict[str, Tensor]
OTHER_SEED = 1000  # a teacher of its own has other weights than the student


class Teaching:
    """The teacher of a row's engine; one without a teacher changes nothing."""

    def __init__(self, engine: Engine, row: Row, config: EngineConfig) -> None:
        self.kind = DISTILLED.get(row.loss_name)
        self.engine, self.student = None, engine
        if self.kind is None:
            return
        if self.kind.teacher == "self":
            self.engine = engine
        elif self.kind.teacher == "live":
            seed = row.seed + OTHER_SEED
            config = dataclasses.replace(config, seed=seed, zero=ZeroConfig(3))
            self.engine = Engine.build(
                config, engine.mesh, lambda stage: stage.requires_grad_(False)
            )
        compare_with(engine, self.engine, self.kind.beta, self.kind.tail)

    def taught(self, batches: list[Batch]) -> list[Batch]:
        """The microbatches with what a live teacher says of them."""
        if self.engine is None:
            return batches
        with off(self.engine) if self.kind.teacher == "self" else nullcontext():
            return hidden_states(self.engine, batches, self.student)


def reference_batch(row: Row, batch: Batch, shards: Mapping[str, Shard]) -> Batch:
    """The global batch with a live teacher's logits `teacher_scores` `[B, T, V]`, by the referee's
    model; `shards` are the records of the student's parameters.
    """
    kind = DISTILLED.get(row.loss_name)
    if kind is None or kind.teacher == "stored":
        return batch
    seed = row.seed + (OTHER_SEED if kind.teacher == "live" else 0)
    weights = {
        name: initial_values(name, shard, (0,) * len(shard.full), shard.full, seed).double()
        for name, shard in shards.items()
        if MARK not in name
    }
    notes = Notes(batch["mask"], batch.get("documents"))
    with torch.no_grad():
        made = scores(dataclasses.asdict(row.config), weights, batch, notes)
    return batch | {"teacher_scores": made}
