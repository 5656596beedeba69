"""The parallel model without an optimizer: this rank's stages, their storage and their pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.checkpoint.reader import Reader
from megallm.engine.config import EngineConfig
from megallm.models.build import build_stages, place_parameters
from megallm.models.decoder import Stage, StageOptions
from megallm.models.router import Routers
from megallm.ops.precision import MODEL_DTYPES
from megallm.optim.zero import Entry
from megallm.parallel.expert import expert_replicas
from megallm.parallel.fp8 import Fp8Linears
from megallm.parallel.linear import WeightGradQueue
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Batch, LossOf, Pipeline, ScheduleRun, buffer_maker
from megallm.parallel.quantized import QuantizedWeight
from megallm.parallel.schedule import WEIGHT, place, plan_schedule
from megallm.parallel.shard import named_shards
from megallm.parallel.tensor import Linear, defer_weight_grads, use_fp8

Prepare = Callable[
    [Stage], None
]  # changes a stage on the meta device: fills adapter slots, freezes parameters


class ParallelModel:
    """Built on the meta device; `place` gives it storage. Construction is collective over the
    world.

    `prepare` is called with each stage of this rank before anything is derived from its parameters.
    """

    def __init__(self, config: EngineConfig, mesh: Mesh, prepare: Prepare | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.dtype = MODEL_DTYPES[config.precision]
        options = config.pipeline
        self.placement = place(options.schedule, mesh.pp.size, options.chunks)
        stage_options = StageOptions(
            config.sp,
            config.recompute,
            config.cp_kind,
            config.cp_ulysses,
            config.fused_head,
            config.recompute_modules,
            config.recompute_layers,
            config.offload,
        )
        self.stages = build_stages(
            config.model, mesh, stage_options, self.placement, options.stages
        )
        if prepare is not None:
            for stage in self.stages.values():
                prepare(stage)
        self.routers = (
            Routers(config.model, mesh, self.stages) if config.model.moe.num_experts else None
        )
        self.quantized = self._quantized()
        self.sp = config.sp and mesh.tp.size > 1
        self.fp8 = self._use_fp8()
        self.pipeline = Pipeline(mesh, self.placement, self.stages, self._defer())

    def _defer(self) -> WeightGradQueue | None:
        """A queue for weight gradients when the schedule splits backward passes."""
        plans = plan_schedule(self.config.pipeline.schedule, self.placement, 1)
        if not any(action.op == WEIGHT for action in plans[0]):
            return None
        weight_grads = WeightGradQueue()
        for stage in self.stages.values():
            defer_weight_grads(stage, weight_grads)
        return weight_grads

    def _quantized(self) -> dict[str, QuantizedWeight]:
        """The weights of this rank that `prepare` chose to hold in 4 bit, by logical name."""
        found = {
            f"{name}.weight": module.quantized
            for stage in self.stages.values()
            for name, module in stage.named_modules()
            if isinstance(module, Linear) and module.quantized is not None
        }
        if found and self.config.fp8 is not None:
            raise UsageError("Weights in 4 bit and fp8 exclude each other; leave one of them out.")
        return found

    def _use_fp8(self) -> Fp8Linears:
        """The linears of this rank's blocks and further tokens that compute in FP8: none without
        the option.
        """
        options, found = self.config.fp8, {}
        if options is not None:
            if self.config.model.moe.num_experts:
                expert_replicas(
                    self.mesh
                )  # makes groups of the world: also where a stage has no experts
            wanted = range(options.bf16_first, self.config.model.num_layers - options.bf16_last)
            for stage in self.stages.values():
                parts = {
                    f"layers.{n}": block for n, block in stage.layers.items() if int(n) in wanted
                }
                parts |= {f"mtp.{n}": depth for n, depth in stage.mtp.items()}
                for at, part in parts.items():
                    found |= {
                        f"{at}.{name}": linear for name, linear in use_fp8(part, options).items()
                    }
        for linear in found.values():
            linear.keeps_weights = (
                self.config.zero.stage < 3
            )  # stage 3 is there to keep no whole weight
        return Fp8Linears(found, self.mesh)

    def entries(self) -> list[Entry]:
        """This rank's parameters in model order, each once, with the earliest local stage that
        holds it.
        """
        found: dict[str, Entry] = {}
        for number, stage in self.stages.items():
            for name, param, shard in named_shards(stage):
                found.setdefault(name, Entry(name, param, shard, number))
        return list(found.values())

    def shared_units(self) -> frozenset[str]:
        """Units whose parameters more than one use completes.

        That is an embedding that is whole on this rank and used at both ends, and with multi-token
        prediction the head and the embedding of the last stage, which every depth uses.
        """
        config, last = self.config.model, self.placement.num_stages - 1
        if last not in self.stages:
            return frozenset()
        embedding = config.embeds_last and (0 in self.stages or config.mtp.depth > 0)
        return frozenset({"embedding"} if embedding else ()) | frozenset(
            {"head"} if config.mtp.depth else ()
        )

    def selection_biases(self) -> Iterator[tuple[str, Tensor]]:
        """State beside the parameters: the routers' biases, the same on every rank of a stage."""
        yield from () if self.routers is None else self.routers.biases()

    def place(self, storage: dict[str, Tensor]) -> None:
        """Let the parameters live in `storage`, by logical name."""
        for stage in self.stages.values():
            place_parameters(stage, storage)

    def run_schedule(
        self, batches: list[Batch], loss_of: LossOf, training: bool, listener=None
    ) -> ScheduleRun:
        """One pass of the microbatches through the pipeline, with or without backward."""
        options = self.config.pipeline
        kind = options.schedule if training else "forward"
        plans = plan_schedule(kind, self.placement, len(batches), options.group)
        virtual = next(iter(self.stages.values())).virtual(None)
        if virtual is not None:
            multiple = 2 * self.mesh.cp.size * self.mesh.tp.size
            batches, loss_of = virtual.extend(batches, loss_of, multiple)
        return self.pipeline.run(
            plans, batches, self._new_buffer(batches[0]), loss_of, listener if training else None
        )

    def _new_buffer(self, batch: Batch) -> Callable[[], Tensor]:
        rows, tokens = batch["tokens"].shape
        pieces = self.mesh.cp.size * (self.mesh.tp.size if self.sp else 1)
        return buffer_maker(
            (rows, tokens // pieces, self.config.model.hidden_size), self.dtype, self.mesh.device
        )

    @staticmethod
    def load(
        config: EngineConfig, mesh: Mesh, reader: Reader, prepare: Prepare | None = None
    ) -> ParallelModel:
        """A model for inference: this rank's pieces of the weights of a checkpoint written at any
        layout.
        """
        model = ParallelModel(config, mesh, prepare)
        storage = {}
        for name, param, shard, _ in model.entries():
            storage[name] = torch.empty(param.shape, dtype=model.dtype, device=mesh.device)
            reader.read_into(name, shard.box(mesh.layout, mesh.coords).offset, storage[name])
        for name, bias in model.selection_biases():
            reader.read_into(name, (0,), bias)
        for name, weight in model.quantized.items():
            weight.read_from(reader, name)
        model.place(storage)
        for stage in model.stages.values():
            stage.requires_grad_(False)
        return model
