"""Engine: one parallel model with its optimizer. Trainers see this and nothing below it.

`train_step`, `evaluate`, `parts` and `load` are collective over the world, and return the same values on
every rank of a replica.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import Reader
from megallm.engine.config import EngineConfig
from megallm.engine.model import ParallelModel
from megallm.models.build import initialise
from megallm.optim.adamw import AdamW
from megallm.optim.clip import clip_gradients
from megallm.optim.grads import Buckets, tie_axis
from megallm.parallel import comm
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Batch
from megallm.parallel.schedule import SCHEDULES, forward_only
from megallm.parallel.shard import named_shards

TIED_NAME = "embedding.weight"


class Loss(Protocol):
    """Sums of per-token terms, and how many tokens each term is divided by."""

    def counts(self, batch: Batch) -> dict[str, Tensor]: ...

    def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class StepStats:
    """One update: each term divided by its global count, the counts, the norm before clipping, and
    whether the update was skipped because the norm is not finite."""

    losses: dict[str, float]
    counts: dict[str, int]
    grad_norm: float
    skipped: bool

    @property
    def loss(self) -> float:
        """The sum of the terms: what was differentiated."""
        return sum(self.losses.values())


class Engine:
    """The stage of this rank, its buckets and its optimizer."""

    def __init__(self, config: EngineConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.model = ParallelModel(config, mesh)
        self.stage, self.pipeline = self.model.stage, self.model.pipeline
        tie = tie_axis(mesh, bool(config.model.tie_embeddings))
        self.buckets = Buckets(list(named_shards(self.stage)), mesh, self.model.dtype, tie, TIED_NAME)
        self.model.place(self.buckets.views("params"))
        self.buckets.attach(list(named_shards(self.stage)))
        self.optimizer = AdamW(config.optim, self.buckets)

    @staticmethod
    def build(config: EngineConfig, mesh: Mesh) -> Engine:
        """An engine with its initial weights, the same logical weights at every layout, bit for bit."""
        engine = Engine(config, mesh)
        initialise(engine.stage, mesh, config.seed, engine.buckets.views("master"))
        engine.buckets.publish()
        return engine

    def num_local_params(self) -> int:
        """Parameters held by this rank."""
        return sum(bucket.plan.numel for bucket in self.buckets.flat)

    # Steps

    def train_step(self, batches: Sequence[Batch], loss: Loss, lr: float) -> StepStats:
        """One update from this data rank's microbatches; every data rank gives the same number of them.

        An update whose gradient norm is not finite is left out (`skipped`), on all ranks alike.
        """
        self.buckets.zero()
        sums, counts = self._run(batches, loss, training=True)
        self.buckets.reduce()
        norm = clip_gradients(self.buckets, self.config.optim.clip)
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step(lr)
        losses = {term: sums[term] / max(counts[term], 1) for term in counts}
        return StepStats(losses, counts, norm, skipped)

    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[dict[str, float], dict[str, int]]:
        """Forward only: the sum of each term over all data ranks, and its count."""
        return self._run(batches, loss, training=False)

    def _run(self, batches: Sequence[Batch], loss: Loss, training: bool) -> tuple[dict[str, float], dict[str, int]]:
        batches = [{key: x.to(self.mesh.device) for key, x in batch.items()} for batch in batches]
        counts = self._global_counts(batches, loss)

        def loss_of(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            terms = loss(outputs, batch)
            total = sum(terms[term] / max(counts[term], 1) for term in terms)
            return total, {term: value.detach() for term, value in terms.items()}

        schedule = SCHEDULES[self.config.schedule] if training else forward_only
        pp = self.mesh.pp.size
        plans = [schedule(rank, pp, len(batches)) for rank in range(pp)]
        walk = self.pipeline.run(plans, batches, self._hidden_shape(batches[0]), loss_of, self.buckets.collect)
        return self._global_sums(walk.results, list(counts)), counts

    def _hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        rows, tokens = batch["tokens"].shape
        return rows, tokens // self.mesh.tp.size if self.stage.sp else tokens, self.config.model.hidden_size

    def _global_counts(self, batches: list[Batch], loss: Loss) -> dict[str, int]:
        """The number each term is divided by: this data rank's counts, summed over data before the forward pass."""
        per_micro = [loss.counts(batch) for batch in batches]
        names = list(per_micro[0])
        vector = torch.stack([sum(counts[name] for counts in per_micro) for name in names]).to(torch.int64)
        comm.all_reduce_(vector, self.mesh.data, "loss.counts")
        return dict(zip(names, vector.tolist(), strict=True))

    def _global_sums(self, results: list[dict[str, Tensor]], names: list[str]) -> dict[str, float]:
        """Sum the reported terms over microbatches and data, and tell every stage; collective over data and pp."""
        vector = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        for terms in results:
            vector += torch.stack([terms[name].to(torch.float64) for name in names])
        comm.all_reduce_(vector, self.mesh.data, "loss.report")
        comm.all_reduce_(vector, self.mesh.pp, "loss.report")  # only the last stage holds anything but zero
        return dict(zip(names, vector.tolist(), strict=True))

    # State

    def parts(self) -> Iterator[Part]:
        """What this rank owns of the logical state: weights and optimizer state, as boxes of logical tensors."""
        for name, tensor in self._state().items():
            base = name.split(".", 2)[2] if name.startswith("optim.") else name
            if self.buckets.owned(base):
                shard = self.buckets.shards[base]
                yield Part(name, shard.full, shard.box(self.mesh.layout, self.mesh.coords).offset, tensor)

    def counters(self) -> dict[str, int]:
        """What belongs to the state besides tensors; goes into a checkpoint's meta under "engine"."""
        return {"updates": self.optimizer.step_count}

    def load(self, reader: Reader, optimizer: bool = True) -> None:
        """Fill weights (and optimizer state) from a checkpoint written at any layout; local, not collective."""
        if optimizer:
            self.optimizer.step_count = reader.meta["engine"]["updates"]
        for name, tensor in self._state(optimizer).items():
            base = name.split(".", 2)[2] if name.startswith("optim.") else name
            box = self.buckets.shards[base].box(self.mesh.layout, self.mesh.coords)
            reader.read_into(name, box.offset, tensor)
        if not optimizer:
            for bucket in self.buckets.flat:
                if bucket.master is not bucket.params:
                    bucket.master.copy_(bucket.params)

    def _state(self, optimizer: bool = True) -> dict[str, Tensor]:
        state = dict(self.buckets.views("params"))
        if optimizer:
            if any(bucket.master is not bucket.params for bucket in self.buckets.flat):
                state |= {f"optim.master.{name}": x for name, x in self.buckets.views("master").items()}
            for moment, views in self.optimizer.state_views().items():
                state |= {f"optim.{moment}.{name}": x for name, x in views.items()}
        return state
