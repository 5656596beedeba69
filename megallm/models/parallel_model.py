"""The parallel model without an optimizer: this rank's stages, their storage and their pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.models.build import build_stages, place_parameters
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.router import Routers
from megallm.ops.low_precision import Fp8Options
from megallm.ops.precision import MODEL_DTYPES
from megallm.parallel.config import LayoutConfig
from megallm.parallel.expert import expert_replicas
from megallm.parallel.fp8 import Fp8Linears
from megallm.parallel.linear import WeightGradQueue
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Batch, LossOf, Pipeline, ScheduleRun, buffer_maker
from megallm.parallel.quantized import QuantizedWeight
from megallm.parallel.schedule import WEIGHT, place, plan_schedule
from megallm.parallel.shard import Entry, named_shards
from megallm.parallel.tensor import Linear, defer_weight_grads, use_fp8
from megallm.parallel.vocab import Wanted

Prepare = Callable[
    [Stage], None
]  # changes a stage on the meta device: fills adapter slots, freezes parameters


class WeightReader(Protocol):
    """Reads boxes of logical tensors into memory, such as a checkpoint's reader; `info` gives the
    full shape and the dtype of a tensor."""

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None: ...


def check_shape(reader: WeightReader, name: str, full: tuple[int, ...]) -> None:
    """Raise CheckpointError where a tensor of a checkpoint is missing or of another shape: a box of
    it would be read all the same, as a value head the first row of a vocabulary's."""
    stored = tuple(reader.info(name)[0])
    if stored != full:
        raise CheckpointError(
            f"The checkpoint has {name} in the shape {list(stored)}, this model needs "
            f"{list(full)}: it is another model, or has another head."
        )


class ParallelModel:
    """Built on the meta device; `place` gives it storage. Construction is collective over the
    world.

    `config` is resolved. `prepare` is called with each stage of this rank before anything is
    derived from its parameters. `frees_weights` says that whole weights do not stay between uses.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: LayoutConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        prepare: Prepare | None = None,
        frees_weights: bool = False,
    ) -> None:
        self.config, self.layout, self.mesh = config, layout, mesh
        self.dtype = MODEL_DTYPES[compute.precision]
        self.placement = place(layout.schedule, mesh.pp.size, layout.chunks)
        self.stages = build_stages(config, mesh, layout, compute, self.placement)
        if prepare is not None:
            for stage in self.stages.values():
                prepare(stage)
        self.routers = Routers(config, mesh, self.stages) if config.moe.num_experts else None
        self.quantized = self._quantized(compute.precision == "fp8")
        self.sp = layout.sp and mesh.tp.size > 1
        self.fp8 = Fp8Linears({}, mesh)
        if compute.precision == "fp8":
            self.fp8 = self._use_fp8(compute.fp8, frees_weights)
        self.pipeline = Pipeline(mesh, self.placement, self.stages, self._defer())

    def _defer(self) -> WeightGradQueue | None:
        """A queue for weight gradients when the schedule splits backward passes."""
        plans = plan_schedule(self.layout.schedule, self.placement, 1)
        if not any(action.op == WEIGHT for action in plans[0]):
            return None
        weight_grads = WeightGradQueue()
        for stage in self.stages.values():
            defer_weight_grads(stage, weight_grads)
        return weight_grads

    def _quantized(self, fp8: bool) -> dict[str, QuantizedWeight]:
        """Returns the weights of this rank that `prepare` chose to hold in 4 bit, by logical
        name.
        """
        found = {
            f"{name}.weight": module.quantized
            for stage in self.stages.values()
            for name, module in stage.named_modules()
            if isinstance(module, Linear) and module.quantized is not None
        }
        if found and fp8:
            raise UsageError("Weights in 4 bit and fp8 exclude each other; leave one of them out.")
        return found

    def _use_fp8(self, options: Fp8Options, frees_weights: bool) -> Fp8Linears:
        """Returns the linears of this rank's blocks and further tokens, which compute in FP8."""
        found = {}
        if self.config.moe.num_experts:
            expert_replicas(self.mesh)  # makes groups of the world: also where a stage has none
        wanted = range(options.bf16_first, self.config.num_layers - options.bf16_last)
        for stage in self.stages.values():
            parts = {f"layers.{n}": block for n, block in stage.layers.items() if int(n) in wanted}
            parts |= {f"mtp.{n}": depth for n, depth in stage.mtp.items()}
            for at, part in parts.items():
                made = use_fp8(part, options)
                found |= {f"{at}.{name}": linear for name, linear in made.items()}
        for linear in found.values():
            linear.keeps_weights = not frees_weights
        return Fp8Linears(found, self.mesh)

    def entries(self) -> list[Entry]:
        """Returns this rank's parameters in model order, each once, with the earliest local stage
        that holds it.
        """
        found: dict[str, Entry] = {}
        for number, stage in self.stages.items():
            for name, param, shard in named_shards(stage):
                found.setdefault(name, Entry(name, param, shard, number))
        return list(found.values())

    def shared_units(self) -> frozenset[str]:
        """Returns units whose parameters more than one use completes.

        That is an embedding that is whole on this rank and used at both ends, and with multi-token
        prediction the head and the embedding of the last stage, which every depth uses; so do
        values beside the head with its norm.
        """
        config, last = self.config, self.placement.num_stages - 1
        if last not in self.stages:
            return frozenset()
        embedding = config.embeds_last and (0 in self.stages or config.mtp.depth > 0)
        further = config.mtp.depth > 0 or config.critic is not None
        return frozenset({"embedding"} if embedding else ()) | frozenset(
            {"head"} if further else ()
        )

    def selection_biases(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the state beside the parameters: the routers' biases, the same on every rank of a
        stage.
        """
        yield from () if self.routers is None else self.routers.biases()

    def place(self, storage: dict[str, Tensor]) -> None:
        """Let the parameters live in `storage`, by logical name."""
        for stage in self.stages.values():
            place_parameters(stage, storage)

    def run_schedule(
        self, batches: list[Batch], loss_of: LossOf, wanted: Wanted, listener=None
    ) -> ScheduleRun:
        """Runs the microbatches through the pipeline for the `wanted` scalars of the head; with a
        listener also backward.
        """
        for stage in self.stages.values():
            stage.wanted = wanted
        kind = "forward" if listener is None else self.layout.schedule
        plans = plan_schedule(kind, self.placement, len(batches), self.layout.group)
        virtual = next(iter(self.stages.values())).virtual(None)
        if virtual is not None:
            multiple = 2 * self.mesh.cp.size * self.mesh.tp.size
            batches, loss_of = virtual.extend(batches, loss_of, multiple)
        return self.pipeline.run(plans, batches, self._new_buffer(batches[0]), loss_of, listener)

    def _new_buffer(self, batch: Batch) -> Callable[[], Tensor]:
        rows, tokens = batch["tokens"].shape
        pieces = self.mesh.cp.size * (self.mesh.tp.size if self.sp else 1)
        return buffer_maker(
            (rows, tokens // pieces, self.config.hidden_size), self.dtype, self.mesh.device
        )

    def load(self, reader: WeightReader) -> ParallelModel:
        """Gives the model storage of its own, for inference, and fills it with this rank's pieces
        of the weights that `reader` has, written at any layout; returns the model. Raises
        CheckpointError for a tensor of another shape.
        """
        storage = {}
        for name, param, shard, _ in self.entries():
            storage[name] = torch.empty(param.shape, dtype=self.dtype, device=self.mesh.device)
            box = shard.box(self.mesh.layout, self.mesh.coords)
            check_shape(reader, name, shard.full)
            reader.read_into(name, box.offset, storage[name])
        for name, bias in self.selection_biases():
            reader.read_into(name, (0,), bias)
        for name, weight in self.quantized.items():
            weight.read_from(reader, name)
        self.place(storage)
        for stage in self.stages.values():
            stage.requires_grad_(False)
        return self
