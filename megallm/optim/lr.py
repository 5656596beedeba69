"""Learning-rate schedules as functions of the step. Pure."""

from __future__ import annotations

import math

from megallm.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of update number `step` (the first is 1) out of `total_steps`.

    Linear warm-up from 0 over `warmup_steps`, then the schedule down to `min_lr` at `total_steps`. WSD
    (arXiv 2404.06395) holds the rate and falls linearly over the last `decay_fraction` of the steps.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    span = max(total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * _SHAPES[config.schedule](progress, config)


def _wsd(progress: float, config: OptimConfig) -> float:
    return min(1.0, (1.0 - progress) / config.decay_fraction) if config.decay_fraction > 0 else 1.0


_SHAPES = {
    "constant": lambda progress, config: 1.0,
    "linear": lambda progress, config: 1.0 - progress,
    "cosine": lambda progress, config: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": _wsd,
}
