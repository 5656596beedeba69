"""Optimizer settings and their defaults. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimConfig:
    """`schedule` runs over `train.steps` after `warmup_steps`; `clip` 0 switches clipping off."""

    rule: str = "adamw"
    lr: float = 3e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"  # constant | linear | cosine | wsd
    decay_fraction: float = 0.2  # wsd: the last share of the steps, in which the rate falls
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class ZeroOptions:
    """What stays sharded over dp x cp between uses, and how gradients travel."""

    stage: int = 0  # 0 nothing, 1 master weights and optimizer state, 2 gradients too, 3 parameters too
    shard_size: int | None = None  # ranks that divide the state, replicated across the rest; None: all (else hybrid)
    bf16_grads: bool = False  # stages 1 to 3: gradients travel and meet in bf16; accumulation stays wide
    offload: bool = False  # master weights and optimizer state in CPU memory
    bucket_bytes: int = 32 * 2**20  # of wide gradients in one message; stage 3 has a bucket per block instead
    tree: bool = False  # gradients summed in a fixed tree: the same bits for any dp (stages 0 and 1)


RULES = ("adamw",)
SCHEDULES = ("constant", "linear", "cosine", "wsd")
