"""What an engine is built from. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.models.config import ModelConfig
from megallm.ops.low_precision import Fp8Options, LossScaleOptions
from megallm.optim.config import OptimConfig, ZeroOptions


@dataclass(frozen=True)
class PipelineOptions:
    """`schedule` and `chunks` as in `parallel.schedule`; `stages` is a layout string; `group` the
    microbatch group.
    """

    schedule: str = "1f1b"
    chunks: int = 1
    stages: str | None = None
    group: int | None = None


@dataclass(frozen=True)
class EngineConfig:
    """`model` is resolved; `precision` is fp64, fp32, bf16, fp16 or fp8 (bf16 with FP8 linears).

    `recompute` is none, selective (the parts of a block in `recompute_modules`) or full (whole
    blocks), of the first `recompute_layers` of each stage (None: all); `offload` keeps what blocks
    save for the backward pass in CPU memory; `fused_head` says whether the head's logits exist.
    With `fp8` linears compute in it whatever the precision.

    `cp_kind` and `cp_ulysses` are those of the layout: how context-parallel ranks exchange keys.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    sp: bool = False
    precision: str = "fp32"
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("core", "activation")
    recompute_layers: int | None = None
    offload: bool = False
    fused_head: str = "auto"
    fp8: Fp8Options | None = None
    loss_scale: LossScaleOptions = field(default_factory=LossScaleOptions)
    seed: int = 1234
    cp_kind: str = "ring"
    cp_ulysses: int | None = None
