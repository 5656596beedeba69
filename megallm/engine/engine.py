"""Engine: one parallel model with its optimizer. Trainers see this and nothing below it.

`train_step`, `evaluate`, `parts` and `load` are collective over the world, and return the same values on
every rank of a replica.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import Reader
from megallm.engine.config import EngineConfig
from megallm.engine.model import ParallelModel
from megallm.engine.state import Piece, pieces
from megallm.models.build import initial_values
from megallm.optim.buckets import Treatment
from megallm.optim.clip import clip_gradients
from megallm.optim.groups import check_groups, treatment
from megallm.optim.optimizer import Optimizer
from megallm.optim.scaler import LossScaler
from megallm.optim.zero import ShardedParameters, Sharing, shard_groups
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.pipeline import Batch, Walk
from megallm.parallel.schedule import Action, Placement
from megallm.parallel.simulate import Slot, Timeline, peak_live

TIED_NAME = "embedding.weight"
AMAX = "optim.fp8_amax."


class Loss(Protocol):
    """Sums of per-token terms, and how many tokens each term is divided by."""

    def counts(self, batch: Batch) -> dict[str, Tensor]: ...

    def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]: ...


class Weights(Protocol):
    """Fills a tensor of any dtype with the box at `offset` of the logical tensor `name`."""

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None: ...


@dataclass(frozen=True)
class StepStats:
    """One update: each term divided by its global count, the counts, the norm before clipping, and
    whether the update was skipped because the norm is not finite."""

    losses: dict[str, float]
    counts: dict[str, int]
    grad_norm: float
    skipped: bool
    loss_scale: float | None = None  # fp16: what the loss was multiplied by
    metrics: dict[str, float] = field(default_factory=dict)  # what else was measured, under the names of metrics.jsonl

    @property
    def loss(self) -> float:
        """The sum of the terms: what was differentiated."""
        return sum(self.losses.values())


class LossSums(NamedTuple):
    """The terms of a loss over the global batch, still on the device."""

    names: list[str]
    sums: Tensor
    counts: dict[str, Tensor]

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """Sums and counts as numbers; waits for the device."""
        counts = {name: int(count) for name, count in self.counts.items()}
        return dict(zip(self.names, self.sums.tolist(), strict=True)), counts


class Engine:
    """The stages of this rank, their flat parameters and their optimizer."""

    def __init__(self, config: EngineConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.model = ParallelModel(config, mesh)
        tie = tie_axis(mesh, self.model.placement, config.model.embeds_last)
        sharing = Sharing(
            *shard_groups(mesh, config.zero, config.model.moe.num_experts > 0),
            tie,
            TIED_NAME,
            self.model.shared_units(),
        )
        treatments = self._treatments()
        self.parameters = ShardedParameters(
            self.model.entries(), mesh, self.model.dtype, config.zero, sharing, treatments
        )
        self.model.place(self.parameters.views)
        self.parameters.attach({entry.name: entry.param for entry in self.model.entries()})
        for stage in self.model.stages.values():
            stage.units = self.parameters
        self.optimizer = Optimizer(config.optim, self.parameters)
        self.scaler = LossScaler(config.loss_scale, mesh.device) if config.precision == "fp16" else None
        self.last_walk: Walk | None = None

    @staticmethod
    def build(config: EngineConfig, mesh: Mesh) -> Engine:
        """An engine with its initial weights, the same logical weights at every layout, bit for bit."""
        engine = Engine(config, mesh)
        for name, shard, box, tensor in engine.masters():
            tensor.copy_(initial_values(name, shard, box.offset, box.shape, config.seed))
        engine.parameters.publish()
        return engine

    def _treatments(self) -> dict[str, Treatment]:
        """How the optimizer treats each parameter of this rank; collective over the world when there are groups.

        Raises UsageError for a group that matches no parameter of the model.
        """
        optim, shards = self.config.optim.resolve(), {entry.name: entry.shard for entry in self.model.entries()}
        if optim.groups:
            gathered = self.mesh.gather_json(list(shards))
            check_groups(optim, self.mesh.broadcast_json(gathered and sorted(set(chain(*gathered)))))
        return {name: treatment(optim, name, shard) for name, shard in shards.items()}

    def num_local_params(self) -> int:
        """Parameters of this rank's stages."""
        return sum(shape.numel() for shape in self.parameters.shapes.values())

    # Steps

    def train_step(self, batches: Sequence[Batch], loss: Loss, lr: float) -> StepStats:
        """One update from this data rank's microbatches; every data rank gives the same number of them.

        An update whose gradient norm is not finite is left out (`skipped`), on all ranks alike. Raises Diverged
        when the loss scale of fp16 had to fall below its minimum, on all ranks.
        """
        self.parameters.begin_step()
        run = self._run(batches, loss, training=True)
        self.parameters.finish()
        norm = clip_gradients(self.parameters, self.config.optim.clip, self.scaler and self.scaler.scale)
        self.optimizer.step(lr, skip=~norm.isfinite())
        self.model.fp8.commit()
        loss_scale = None if self.scaler is None else self.scaler.advance(norm.isfinite())
        routing = None if self.model.routers is None else self.model.routers.finish(skip=~norm.isfinite())
        sums, counts = run.read()  # the only wait for the device, when everything is on its way
        losses = {term: sums[term] / max(counts[term], 1) for term in counts}
        further, metrics = ({}, {}) if routing is None else routing.read()
        if self.scaler is not None:
            self.scaler.check()
        skipped, loss_scale = not math.isfinite(norm), loss_scale and float(loss_scale)
        return StepStats(losses | further, counts, float(norm), skipped, loss_scale, metrics)

    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[dict[str, float], dict[str, int]]:
        """Forward only: the sum of each term over all data ranks, and its count."""
        return self._run(batches, loss, training=False).read()

    def _run(self, batches: Sequence[Batch], loss: Loss, training: bool) -> LossSums:
        batches = [self._on_device(batch) for batch in batches]
        counts = self._global_counts(batches, loss)
        if training and self.model.routers is not None:
            self.model.routers.begin(batches, 1.0 if self.scaler is None else self.scaler.scale)

        def loss_of(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            terms = loss(outputs, batch)
            total = sum(terms[term] / counts[term].clamp(min=1) for term in terms)
            if self.scaler is not None:
                total = total * self.scaler.scale
            return total, {term: value.detach() for term, value in terms.items()}

        self.last_walk = self.model.walk(batches, loss_of, training, self.parameters)
        return LossSums(list(counts), self._global_sums(self.last_walk.results, list(counts)), counts)

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the mesh's device; `cu_seqlens` stays where the plan of attention reads it, on the CPU."""
        device = self.mesh.device
        return {key: x if key == "cu_seqlens" else x.to(device, non_blocking=True) for key, x in batch.items()}

    def _global_counts(self, batches: list[Batch], loss: Loss) -> dict[str, Tensor]:
        """The number each term is divided by: this data rank's counts, summed over data before the forward pass."""
        per_micro = [loss.counts(batch) for batch in batches]
        names = list(per_micro[0])
        vector = torch.stack([sum(counts[name] for counts in per_micro) for name in names]).to(torch.int64)
        comm.all_reduce_(vector, self.mesh.data, "loss.counts")
        return dict(zip(names, vector.unbind(), strict=True))

    def _global_sums(self, results: list[dict[str, Tensor]], names: list[str]) -> Tensor:
        """Sum the reported terms over microbatches and data, and tell every stage; collective over data and pp."""
        vector = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        for terms in results:
            vector += torch.stack([terms[name].to(torch.float64) for name in names])
        comm.all_reduce_(vector, self.mesh.data, "loss.report")
        comm.all_reduce_(vector, self.mesh.pp, "loss.report")  # only the last stage holds anything but zero
        return vector

    def timeline(self) -> Timeline | None:
        """The last step on rank 0's pipeline line, from 0 seconds; None off rank 0. Collective over the world.

        Clocks are those of the machines: lines that span several machines are off by their difference.
        """
        slots = self.model.pipeline.timeline(self.last_walk)
        rows = [[slot.action.op, slot.action.micro, slot.action.stage, slot.start, slot.end] for slot in slots]
        gathered = self.mesh.gather_json(rows)
        if gathered is None:
            return None
        line = [gathered[rank] for rank in self.mesh.pp.ranks]
        begin = min(row[3] for rows in line for row in rows)
        ranks = [[Slot(Action(*row[:3]), row[3] - begin, row[4] - begin) for row in rows] for rows in line]
        return Timeline(ranks, [peak_live([slot.action for slot in slots]) for slots in ranks])

    # State

    def masters(self) -> Iterator[Piece]:
        """The wide master weights that this rank keeps, as boxes of logical tensors."""
        return pieces(self.parameters, {bucket.index: bucket.master for bucket in self.parameters.flat})

    def gradients(self) -> Iterator[Piece]:
        """The completed gradients that this rank keeps, after `train_step` (clipped)."""
        return pieces(self.parameters, {bucket.index: bucket.shard_grads for bucket in self.parameters.flat})

    def parts(self) -> Iterator[Part]:
        """What this rank owns of the logical state: weights and optimizer state, as boxes of logical tensors."""
        for prefix, flats in self._state().items():
            for name, shard, box, tensor in pieces(self.parameters, flats):
                if self.parameters.owns(name):
                    yield Part(f"{prefix}{name}", shard.full, box.offset, tensor)
        if not any(self.mesh.coords[axis] for axis in ("dp", "cp", "tp")):
            for name, bias in self.model.selection_biases():
                yield Part(name, tuple(bias.shape), (0,), bias)
        for name, history, shard in self.model.fp8.histories():
            if shard.owned(self.mesh.coords):
                yield Part(f"{AMAX}{name}", shard.full, shard.box(self.mesh.layout, self.mesh.coords).offset, history)
        for state, name, shard, tensor, owned in self.optimizer.factors():
            if owned:
                box = shard.box(self.mesh.layout, self.mesh.coords)
                yield Part(f"optim.{state}.{name}", shard.full, box.offset, tensor)

    def counters(self) -> dict[str, float]:
        """What belongs to the state besides tensors; goes into a checkpoint's meta under "engine"."""
        return {"updates": self.optimizer.updates} | ({} if self.scaler is None else self.scaler.counters())

    def load(self, reader: Reader, optimizer: bool = True) -> None:
        """Fill weights (and optimizer state) from a checkpoint written at any layout; collective over dp x cp."""
        self.parameters.land()
        if optimizer:
            self.optimizer.updates = reader.meta["engine"]["updates"]
            if self.scaler is not None:
                self.scaler.restore(reader.meta["engine"])
        for prefix, flats in self._state(optimizer).items():
            for name, _, box, tensor in pieces(self.parameters, flats):
                reader.read_into(f"{prefix}{name}", box.offset, tensor)
        for state, name, shard, tensor, _ in self.optimizer.factors() if optimizer else ():
            box = shard.box(self.mesh.layout, self.mesh.coords)
            reader.read_into(f"optim.{state}.{name}", box.offset, tensor)
        for name, bias in self.model.selection_biases():
            reader.read_into(name, (0,), bias)
        for bucket in self.parameters.flat:
            if not optimizer and bucket.master is not bucket.weights:
                bucket.master.copy_(bucket.weights)
        self._load_fp8(reader, optimizer)
        self.parameters.publish()

    def _load_fp8(self, reader: Reader, optimizer: bool) -> None:
        """Take up the histories of delayed scales; those of another length, or of none, start afresh."""
        known = set(reader.names()) if optimizer else set()
        for name, history, shard in self.model.fp8.histories():
            if f"{AMAX}{name}" in known and tuple(reader.info(f"{AMAX}{name}")[0]) == shard.full:
                offset = shard.box(self.mesh.layout, self.mesh.coords).offset
                reader.read_into(f"{AMAX}{name}", offset, history)
        self.model.fp8.loaded()

    def _state(self, optimizer: bool = True) -> dict[str, dict[int, Tensor]]:
        """Name prefix -> by bucket this rank's range of that part of the state."""
        flat = self.parameters.flat
        state = {"": {bucket.index: bucket.weights for bucket in flat}}
        if optimizer:
            if any(bucket.master is not bucket.weights for bucket in flat):
                state["optim.master."] = {bucket.index: bucket.master for bucket in flat}
            state |= {f"optim.{name}.": flats for name, flats in self.optimizer.states.items()}
        return state


def tie_axis(mesh: Mesh, placement: Placement, tied: bool) -> Axis:
    """The holders of the first and the last stage, size 1 when nothing is shared; collective over the world."""
    first, last = placement.rank_of(0), placement.rank_of(placement.num_stages - 1)
    if not tied or first == last:
        return Axis("tie")
    group = mesh.pp.group
    if mesh.pp.size > 2:
        made = {line: mesh.pair((line[first], line[last])) for line in mesh.layout.groups("pp")}
        group = made[mesh.pp.ranks]
    ends = (mesh.pp.ranks[first], mesh.pp.ranks[last])
    if mesh.rank not in ends:
        return Axis("tie")
    return Axis("tie", ends.index(mesh.rank), 2, ends, group, mesh.pp.broken)
