"""What an engine is built from. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig, ZeroOptions


@dataclass(frozen=True)
class PipelineOptions:
    """`schedule` and `chunks` as in `parallel.schedule`; `stages` is a layout string; `group` the microbatch group."""

    schedule: str = "1f1b"
    chunks: int = 1
    stages: str | None = None
    group: int | None = None


@dataclass(frozen=True)
class EngineConfig:
    """`model` is resolved; `precision` is fp64, fp32 or bf16; `recompute` none, selective or full.

    `cp_kind` and `cp_ulysses` are those of the layout: how context-parallel ranks exchange keys.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    sp: bool = False
    precision: str = "fp32"
    recompute: str = "none"
    seed: int = 1234
    cp_kind: str = "ring"
    cp_ulysses: int | None = None
