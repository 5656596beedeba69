"""What an engine is built from. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig


@dataclass(frozen=True)
class EngineConfig:
    """`model` is resolved; `precision` is fp64, fp32 or bf16; `recompute` none, selective or full."""

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    sp: bool = False
    schedule: str = "1f1b"
    precision: str = "fp32"
    recompute: str = "none"
    seed: int = 1234
