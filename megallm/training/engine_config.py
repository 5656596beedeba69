"""What a run's configuration says to the engine, and to whoever watches it start."""

from __future__ import annotations

from megallm.engine.config import EngineConfig, PipelineOptions
from megallm.engine.engine import Engine
from megallm.optim.config import ZeroOptions
from megallm.run.config import JobConfig


def engine_config(config: JobConfig) -> EngineConfig:
    """Returns the part of the configuration that the engine needs."""
    layout, zero = config.layout, config.zero
    return EngineConfig(
        model=config.model,
        optim=config.optim,
        sp=layout.sp,
        cp_kind=layout.cp_kind,
        cp_ulysses=layout.cp_ulysses,
        pipeline=PipelineOptions(layout.schedule, layout.chunks, layout.stages, layout.group),
        zero=ZeroOptions(
            zero.stage,
            zero.shard_size,
            zero.bf16_grads,
            zero.offload,
            tree=config.train.determinism == "tree",
        ),
        precision=config.train.precision,
        fp8=config.train.fp8 if config.train.precision == "fp8" else None,
        loss_scale=config.train.loss_scale,
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
        recompute_layers=config.train.recompute_layers,
        offload=config.train.offload,
        fused_head=config.train.fused_head,
        seed=config.run.seed,
    )


def opening(config: JobConfig, engine: Engine, begin: str) -> str:
    """Returns one line about what starts or goes on; `begin` is a clause about the weights."""
    layout = engine.mesh.layout
    size = f"{config.model.num_params() / 1e6:.1f}M parameters"
    if config.model.moe.num_experts:
        size += f" ({config.model.num_params(active=True) / 1e6:.1f}M for a token)"
    where = f"tp={layout.tp} pp={layout.pp} dp={layout.dp}{' sp' if config.layout.sp else ''}"
    where += f" ep={layout.ep}" * (layout.ep > 1)
    where += (
        f" cp={layout.cp} {config.layout.cp_kind}" * (layout.cp > 1) + f" {config.train.precision}"
    )
    return (
        f"{begin}: {config.model.family}, {size}, {where}, {config.train.steps} steps, "
        f"run folder {config.run.dir}"
    )
