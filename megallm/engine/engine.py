"""Engine: one parallel model with its optimizer. Trainers see this and nothing below it.
`train_step` is gradient accumulation over microbatches, loss normalisation (each term divided by
its count over the global batch), gradient clipping and the update.

`train_step`, `evaluate`, `parts` and `load` are collective over the world, and return the same
values on every rank of a replica.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.config import EngineConfig
from megallm.engine.limits import UpdateLimits
from megallm.engine.state import (
    ParameterState,
    Piece,
    parameter_of,
    pieces,
    read_state,
    stored_parameters,
)
from megallm.engine.stats import LossSums, StepStats
from megallm.engine.tie import tie_axis
from megallm.inference.generator import Generator
from megallm.losses.reduce import mean_by_sequence, num_sequences
from megallm.losses.terms import Loss, Terms
from megallm.models.build import initial_values
from megallm.models.heads import MASK_ON_CPU
from megallm.models.parallel_model import ParallelModel, Prepare
from megallm.ops.documents import OF_DOCUMENTS
from megallm.ops.precision import wide, wide_dtype
from megallm.optim.buckets import ParamGroup
from megallm.optim.clip import clip_gradients
from megallm.optim.groups import check_groups, param_group
from megallm.optim.optimizer import Optimizer
from megallm.optim.scaler import LossScaler
from megallm.optim.zero import ShardedParameters, Sharing, shard_groups
from megallm.parallel import comm
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Batch, ScheduleRun
from megallm.parallel.schedule import Action
from megallm.parallel.shard import Shard, StateProvider, StateTensor, WeightSource, piece
from megallm.parallel.simulate import TimedAction, Timeline, peak_live
from megallm.parallel.tensor import ADAPTER
from megallm.parallel.vocab import Wanted

TIED_NAME = "embedding.weight"
Item = TypeVar("Item")


class StepObserver(StateProvider, Protocol):
    """Takes part in every update and has state of its own (`Engine.observe`)."""

    def begin(self, micros: int, scale: Tensor | float) -> None:
        """Prepare for the microbatches of a data rank, whose losses are multiplied by `scale`."""

    def finish(self, skipped: bool) -> dict[str, float]:
        """Returns metrics after an update, its gradients still there."""


class Engine:
    """The stages of this rank, their flat parameters and their optimizer."""

    def __init__(self, config: EngineConfig, mesh: Mesh, prepare: Prepare | None = None) -> None:
        self.config, self.mesh = config, mesh
        frees, tree = config.zero.stage == 3, config.compute.determinism == "tree"
        self.model = ParallelModel(
            config.model, config.layout, config.compute, mesh, prepare, frees
        )
        tie = tie_axis(mesh, self.model.placement, config.model.embeds_last)
        sharing = Sharing(
            *shard_groups(mesh, config.zero, config.model.moe.num_experts > 0),
            tie,
            TIED_NAME,
            self.model.shared_units(),
        )
        param_groups = self._param_groups()
        for entry in self.model.entries():
            entry.param.requires_grad_(not param_groups[entry.name].frozen)
        self.parameters = ShardedParameters(
            self.model.entries(), mesh, self.model.dtype, config.zero, sharing, param_groups, tree
        )
        self.model.place(self.parameters.views)
        self.parameters.attach({entry.name: entry.param for entry in self.model.entries()})
        for stage in self.model.stages.values():
            stage.units = self.parameters
        self.optimizer = Optimizer(config.optim, self.parameters)
        self.scaler = (
            LossScaler(config.compute.loss_scale, mesh.device)
            if config.compute.precision == "fp16"
            else None
        )
        self.providers: list[StateProvider] = [
            ParameterState(self.parameters, self.optimizer),
            *([] if self.model.routers is None else [self.model.routers]),
            self.model.fp8,
            self.optimizer,
        ]
        self.observers: list[StepObserver] = []
        self.request: Callable[[], int] = lambda: 0  # 0, 1 or 2, told to all ranks with each update
        self.limits = UpdateLimits()  # set before a step by whoever watches the run
        # Called at the end of a step whose numbers are not finite, on all ranks alike.
        self.examine: Callable[[Sequence[Batch], Loss], None] = lambda batches, loss: None
        self.last_run: ScheduleRun | None = None

    @staticmethod
    def build(config: EngineConfig, mesh: Mesh, prepare: Prepare | None = None) -> Engine:
        """Returns an engine with its initial weights, the same logical weights at every layout, bit
        for bit.

        `prepare` is called with each stage of this rank on the meta device, before buckets are
        planned: it may fill adapter slots and freeze parameters (`requires_grad_(False)`).
        """
        engine = Engine(config, mesh, prepare)
        for held in engine.masters():
            engine._initialise(held)
        for name, weight in engine.model.quantized.items():
            weight.read(partial(engine._initial_box, name, weight.shard))
        engine.parameters.publish()
        return engine

    def _param_groups(self) -> dict[str, ParamGroup]:
        """How the optimizer treats each parameter of this rank; collective over the world when
        there are groups.

        Raises UsageError for a group that matches no parameter of the model.
        """
        optim, entries = self.config.optim.resolve(), self.model.entries()
        if optim.groups:
            gathered = self.mesh.gather_json([entry.name for entry in entries])
            check_groups(
                optim, self.mesh.broadcast_json(gathered and sorted(set(chain(*gathered))))
            )
        chosen = {entry.name: param_group(optim, entry.name, entry.shard) for entry in entries}
        frozen = {entry.name for entry in entries if not entry.param.requires_grad}
        return {
            name: each._replace(frozen=each.frozen or name in frozen)
            for name, each in chosen.items()
        }

    def num_local_params(self) -> int:
        """Number of parameters of this rank's stages."""
        return sum(shape.numel() for shape in self.parameters.shapes.values())

    def observe(self, observer: StepObserver) -> None:
        """Let `observer` take part in every update from now on; its state is part of
        checkpoints.
        """
        self.observers.append(observer)
        self.providers.append(observer)

    # Steps

    def train_step(self, batches: Sequence[Batch], loss: Loss, lr: float) -> StepStats:
        """Train one update from this data rank's microbatches (gradient accumulation); every data
        rank gives the same number of them.

        An update whose loss or gradient norm is not finite, or beyond `limits` that skip, is left
        out (`skipped`), and so is one in which nothing counts or all gradients are 0 (`empty`):
        weights, moments, decay, the routers' biases and the loss scale stay as they are, on all
        ranks alike, whichever of them has seen it. Raises UsageError for a loss that needs what the
        head does not have, and Diverged when fp16 overflows again and again at its smallest loss
        scale, on all ranks.
        """
        run = self.compute_gradients(batches, loss)
        self.parameters.note(self.request(), self.limits.seen(run))
        norm = clip_gradients(
            self.parameters, self.config.optim.clip, self.scaler and self.scaler.scale
        )
        # Squares that underflow count as 0: such a gradient is far below any eps of an update.
        empty = (norm == 0) | run.nothing
        finite, spiked = self.limits.judge(norm, self.parameters.verdicts)
        skip = ~finite | empty | (spiked & self.limits.skips)
        self.optimizer.step(lr, skip=skip)
        self.model.fp8.commit()
        loss_scale = None if self.scaler is None else self.scaler.advance(finite, empty)
        routing = None if self.model.routers is None else self.model.routers.finish(skip=skip)
        sums, counts = run.read()  # the only wait for the device, when everything is on its way
        means = {name: total / (counts[name] or 1) for name, total in sums.items()}
        further, metrics = ({}, {}) if routing is None else routing.read()
        if self.scaler is not None:
            self.scaler.check()
        metrics = {name: means[name] for name in (*run.metrics, *run.largest)} | metrics
        bad, skipped = not bool(finite), bool(skip & ~empty)
        for observer in self.observers:
            metrics |= observer.finish(skipped or bool(empty))
        stats = StepStats(
            {name: means[name] for name in run.losses} | further,
            {name: counts[name] for name in run.counted},
            float(norm),
            skipped,
            loss_scale and float(loss_scale),
            metrics,
            bool(empty),
            self.parameters.largest_noted(),
            bool(spiked),
        )
        if bad:
            self.examine(batches, loss)
        return stats

    def compute_gradients(self, batches: Sequence[Batch], loss: Loss) -> LossSums:
        """Returns the losses of a step without an update; its gradients are complete where they
        accumulate, neither unscaled nor clipped. Collective over the world.
        """
        self.parameters.begin_step()
        run = self._run(batches, loss, training=True)
        self.parameters.finish()
        return run

    def evaluate(
        self, batches: Sequence[Batch], loss: Loss
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the sum of each loss and metric over all data ranks, and its count; forward
        passes only.
        """
        return self._run(batches, loss, training=False).read()

    def scores(
        self,
        batches: Sequence[Batch],
        wanted: Sequence[str] = ("log_prob",),
        temperature: float = 1.0,
    ) -> list[dict[str, Tensor]]:
        """Returns for each microbatch its per-token scalars `[B, T]`, wide and without gradient;
        forward passes only.

        Logits are divided by `temperature` before their softmax. Scalars of a vocabulary are 0
        where the mask is False. The schedule is the one of `evaluate`; the result is in the
        caller's order and the same on every rank of a replica. Every data rank gives the same
        number of microbatches. Collective over the world. Raises UsageError when the model's head
        has no such output.
        """
        asked = self._wanted("scores wants", wanted, temperature)

        def scores_of(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
            return torch.stack([outputs[name] for name in wanted])

        shapes = [(len(wanted), *batch["tokens"].shape) for batch in batches]
        found = self._outputs(batches, asked, scores_of, shapes)
        return [dict(zip(wanted, values.unbind(), strict=True)) for values in found]

    def pooled(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns the mean of the final hidden states over the counted tokens of each sequence,
        wide, `[S, D]` for each microbatch, 0 where none counts; otherwise like `scores`.
        """

        def means(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
            return mean_by_sequence(wide(outputs["whole_hidden"]), batch)

        size = self.config.model.hidden_size
        shapes = [(num_sequences(batch), size) for batch in batches]
        return self._outputs(batches, Wanted(("whole_hidden",)), means, shapes)

    def _outputs(
        self,
        batches: Sequence[Batch],
        asked: Wanted,
        made: Callable[[dict[str, Tensor], Batch], Tensor],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """What the last stage makes of each microbatch, of the given shapes, on every stage."""
        batches = [self.on_device(batch) for batch in batches]

        def outputs_of(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
            found = made(outputs, batch)
            return found.flatten()[0], found

        results = self.model.run_schedule(batches, outputs_of, asked).results
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=wide_dtype(self.model.dtype), device=self.mesh.device)
        if results:
            torch.cat([results[micro].flatten() for micro in range(len(batches))], out=flat)
        comm.broadcast_(
            flat, self.mesh.pp, self.model.placement.rank_of(self.model.placement.num_stages - 1)
        )
        return [x.view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)]

    def log_probs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[Tensor]:
        """Returns the log-probability of every label that counts of each microbatch, `[B, T]`; see
        `scores`.
        """
        return [scores["log_prob"] for scores in self.scores(batches, ("log_prob",), temperature)]

    def values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns the value head's number for every token of each microbatch, `[B, T]`; see
        `scores`.
        """
        return [scores["value"] for scores in self.scores(batches, ("value",))]

    def _wanted(self, who: str, names: Sequence[str], temperature: float) -> Wanted:
        """What the head is asked for, checked; in the head's order, each once."""
        given = self.config.model.scores
        if self.config.model.head == "lm":
            given = (*given, "divergence")
        missing = [name for name in names if name not in given]
        if missing or not names:
            raise UsageError(
                f"{who} {', '.join(missing) or 'nothing'}; the head "
                f"model.head={self.config.model.head} gives {', '.join(given) or 'none'}."
            )
        if not 0 < temperature < math.inf:
            raise UsageError(f"{who} the temperature {temperature}; it takes numbers above 0.")
        return Wanted(tuple(name for name in given if name in names), temperature)

    @contextmanager
    def generator(
        self,
        batch: int = 64,
        blocks: int | None = None,
        chunk: int = 2048,
        keep: bool = False,
    ) -> Iterator[Generator]:
        """Yields a generator on the very weights that are trained, gathered once for the whole
        rollout and let go afterwards; its samples say how many updates the weights have seen.

        `batch`, `blocks`, `chunk` and `keep` are those of `Generator`. Entering is collective over
        the ranks that divide the weights; each data rank then generates from its own requests
        (`mine`).
        """
        with self.parameters.gathered():
            yield Generator(
                self.model, batch, blocks, chunk, lambda: self.optimizer.updates, keep
            )

    # A batch divided over data ranks

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Returns this data rank's contiguous share of `items`, the same on every rank of a
        replica.
        """
        begin, end = piece(len(items), self.mesh.data.size, self.mesh.data.rank)
        return list(items[begin:end])

    def all(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items of all data ranks, in the order of the ranks; collective over data. The
        ranks of a replica give the same ones.

        Items are what JSON can hold, in which arrays of numpy may stand: they are sent in binary,
        bit for bit. `all(mine(items))` is `items`.
        """
        shares = self.mesh.all_values(list(items), self.mesh.data)
        return [item for share in shares for item in share]

    def _run(self, batches: Sequence[Batch], loss: Loss, training: bool) -> LossSums:
        wanted = self._wanted(f"{type(loss).__name__} needs", loss.needs, loss.temperature)
        batches = [self.on_device(batch) for batch in batches]
        counted, counts = self._global_counts(batches, loss)
        divisors = dict(zip(counted, torch.where(counts == 0, 1.0, counts).unbind(), strict=True))
        if training and self.model.routers is not None:
            self.model.routers.begin(batches, 1.0 if self.scaler is None else self.scaler.scale)
        for observer in self.observers if training else ():
            observer.begin(len(batches), 1.0 if self.scaler is None else self.scaler.scale)

        def loss_of(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Terms]:
            terms = loss(outputs, batch)
            total = sum(
                value / divisors[name].to(value.dtype) for name, value in terms.losses.items()
            )
            if self.scaler is not None:
                total = total * self.scaler.scale
            return total, Terms(*map(_detached, vars(terms).values()))

        listener = self.parameters if training else None
        self.last_run = self.model.run_schedule(batches, loss_of, wanted, listener)
        results = self.last_run.results.values()
        terms = next(iter(results), None) or self._terms_of_nothing(batches[0], loss)
        names = list(terms.losses), list(terms.metrics), list(terms.largest)
        sums = self._joined(results, [*names[0], *names[1]])
        if terms.largest:
            sums = torch.cat((sums, self._joined(results, names[2], largest=True)))
        return LossSums(*names, sums, counted, counts)

    def _terms_of_nothing(self, batch: Batch, loss: Loss) -> Terms:
        """Terms with the names that the last stage has, made where it is not; their values are of
        no use.
        """
        zeros = torch.zeros(
            batch["tokens"].shape, dtype=wide_dtype(self.model.dtype), device=self.mesh.device
        )
        with torch.no_grad():
            return loss(dict.fromkeys(loss.needs, zeros), batch)

    def on_device(self, batch: Batch) -> Batch:
        """Returns the batch on the mesh's device; `cu_seqlens`, `prefix_of` and a second copy of
        the mask stay on the CPU, where the plan of attention and the head read them.
        """
        device = self.mesh.device
        here = {
            key: x if key in OF_DOCUMENTS else x.to(device, non_blocking=True)
            for key, x in batch.items()
        }
        copied = here["mask"] is not batch["mask"]
        return here | {MASK_ON_CPU: batch["mask"]} if copied else here

    def _global_counts(self, batches: list[Batch], loss: Loss) -> tuple[list[str], Tensor]:
        """The names of what is counted, and the numbers, float64: this data rank's counts, summed
        over data before the forward pass.
        """
        per_micro = [loss.counts(batch) for batch in batches]
        names = list(per_micro[0])
        vector = torch.stack([sum(counts[name] for counts in per_micro) for name in names])
        vector = vector.to(self.mesh.device, torch.float64)  # exact for whole numbers below 2^53
        return names, comm.all_reduce_(vector, self.mesh.data, "loss.counts")

    def _joined(
        self, results: Iterable[Terms], names: list[str], largest: bool = False
    ) -> Tensor:
        """The sum of reported terms, or the `largest` of each, over microbatches and data, on every
        stage; collective over data and pp.
        """
        vector = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        vector -= math.inf if largest else 0  # which a stage without results leaves as it is
        for terms in results:
            values = terms.largest if largest else terms.losses | terms.metrics
            row = torch.stack([values[name].to(torch.float64) for name in names])
            vector = torch.maximum(vector, row) if largest else vector + row
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        for axis in (self.mesh.data, self.mesh.pp):
            comm.all_reduce_(vector, axis, "loss.report", op)
        return vector

    def timeline(self) -> Timeline | None:
        """Returns the last step on rank 0's pipeline line, from 0 seconds; None off rank 0.
        Collective over the world.

        Clocks are those of the machines: lines that span several machines are off by their
        difference.
        """
        slots = self.model.pipeline.timeline(self.last_run)
        rows = [
            [slot.action.op, slot.action.micro, slot.action.stage, slot.start, slot.end]
            for slot in slots
        ]
        gathered = self.mesh.gather_json(rows)
        if gathered is None:
            return None
        line = [gathered[rank] for rank in self.mesh.pp.ranks]
        begin = min(row[3] for rows in line for row in rows)
        ranks = [
            [TimedAction(Action(*row[:3]), row[3] - begin, row[4] - begin) for row in rows]
            for rows in line
        ]
        return Timeline(ranks, [peak_live([slot.action for slot in slots]) for slots in ranks])

    # State

    def masters(self) -> Iterator[Piece]:
        """Yields the wide master weights that this rank keeps, as boxes of logical tensors; frozen:
        the weights.
        """
        return pieces(
            self.parameters, {bucket.index: bucket.master for bucket in self.parameters.flat}
        )

    def gradients(self) -> Iterator[Piece]:
        """Yields the completed gradients that this rank keeps, after `train_step` (clipped)."""
        return pieces(
            self.parameters,
            {bucket.index: bucket.shard_grads for bucket in self.parameters.trainable},
        )

    def state(self) -> Iterator[StateTensor]:
        """Yields everything that a checkpoint remembers, as this rank's boxes of logical tensors,
        from all providers.
        """
        for provider in self.providers:
            yield from provider.state()

    def parts(self) -> Iterator[Part]:
        """Yields what this rank owns of the logical state: weights and optimizer state, as boxes of
        logical tensors.
        """
        for held in self.state():
            if held.owned:
                yield Part(held.name, held.shard.full, held.box.offset, held.tensor)

    def counters(self) -> dict[str, float]:
        """Returns what belongs to the state besides tensors; goes into a checkpoint's meta under
        "engine".
        """
        return {"updates": self.optimizer.updates} | (
            {} if self.scaler is None else self.scaler.counters()
        )

    def load(self, reader: CheckpointReader, optimizer: bool = True) -> None:
        """Fill weights (and optimizer state) from a checkpoint written at any layout; collective
        over dp x cp.

        A parameter that was frozen when the checkpoint was written has no optimizer state there: it
        starts with its weights and nothing else, like a new one. Raises CheckpointError for a
        tensor that is missing or has another shape there, heads included: `fill` is what gives a
        model another head.
        """
        self.parameters.wait_and_reshard()
        if optimizer:
            self.optimizer.updates = reader.meta["engine"]["updates"]
            if self.scaler is not None:
                self.scaler.restore(reader.meta["engine"])
        for held in self.state():
            if not held.optimizer:
                read_state(reader, held)
        known = set(reader.names()) if self.model.quantized else ()
        for name, weight in self.model.quantized.items():
            if name in known:  # else they are those of the base that was filled in
                weight.read_from(reader, name)
        for bucket in self.parameters.trainable:
            if bucket.master is not bucket.weights:
                bucket.master.copy_(bucket.weights)
        if optimizer:
            self._load_optimizer(reader)
        self.model.fp8.loaded()
        self.parameters.publish()

    def _load_optimizer(self, reader: CheckpointReader) -> None:
        known = set(reader.names())
        stored = stored_parameters(known)
        for held in self.state():
            if held.optional:
                there = held.name in known and tuple(reader.info(held.name)[0]) == held.shard.full
            else:
                there = parameter_of(held.name) in stored
            if held.optimizer and there:
                read_state(reader, held)

    def fill(self, source: WeightSource) -> None:
        """Fill the weights from `source`, whatever dtype it has; each rank reads what it keeps.

        A head that the source lacks, or has in another shape, starts afresh, from the seed; so do
        adapters that it lacks. Raises UsageError for any other parameter whose shape differs.
        """
        self.parameters.wait_and_reshard()
        known = set(source.names())
        for name, shard, box, tensor in self.masters():
            stored = tuple(source.info(name)[0]) if name in known else None
            new_head = name.startswith(("head.", "critic.")) and stored != shard.full
            if new_head or (stored is None and ADAPTER in name):
                self._initialise(Piece(name, shard, box, tensor))
            else:
                self._check_shape(source, known, name, shard)
                source.read_into(name, box.offset, tensor)
        for name, weight in self.model.quantized.items():
            self._check_shape(source, known, name, weight.shard)
            weight.read_from(source, name)
        for name, bias in self.model.selection_biases():
            source.read_into(name, (0,), bias)
        self.model.fp8.loaded()
        self.parameters.publish()

    @staticmethod
    def _check_shape(source: WeightSource, known: set[str], name: str, shard: Shard) -> None:
        stored = tuple(source.info(name)[0]) if name in known else shard.full
        if stored != shard.full:
            raise UsageError(
                f"The source has {name} in the shape {list(stored)}, this model needs "
                f"{list(shard.full)}: it is another model. Check the sizes of the section "
                "`model`."
            )

    def _initialise(self, held: Piece) -> None:
        """Give a piece of the weights its start, by way of the wide dtype also where none is
        kept.
        """
        self._initial_box(held.name, held.shard, held.box.offset, held.tensor)

    def _initial_box(
        self, name: str, shard: Shard, offset: tuple[int, ...], tensor: Tensor
    ) -> None:
        """Fill `tensor` with the box of a parameter's start at `offset`."""
        values = initial_values(name, shard, offset, tuple(tensor.shape), self.config.seed)
        tensor.copy_(values.to(wide_dtype(tensor.dtype)))


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}
