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


RULES = ("adamw",)
SCHEDULES = ("constant", "linear", "cosine", "wsd")
