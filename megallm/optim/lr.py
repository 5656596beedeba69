"""Learning-rate schedules as functions of the step. Pure."""

from __future__ import annotations

import math

from megallm.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Returns the rate of update number `step` (the first is 1) out of `total_steps`.

    Linear warm-up from 0 over `warmup_steps`, then the schedule down to `min_lr` at `total_steps`.
    WSD (arXiv 2404.06395) holds the rate and falls over the last `decay_fraction` of the steps,
    linearly, as half a cosine, or as 1 - sqrt (arXiv 2405.18392). `inverse_sqrt` (arXiv 1706.03762)
    is lr sqrt(max(warmup_steps, 1) / step), never below `min_lr`; it does not depend on
    `total_steps`.
    """
    config = config.resolve()
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "inverse_sqrt":
        return max(config.lr * math.sqrt(max(config.warmup_steps, 1) / step), config.min_lr)
    span = max(total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    shape = config.schedule
    if shape == "wsd":
        progress = max(0.0, 1.0 - (1.0 - progress) / config.decay_fraction)
        shape = config.decay_shape
    return config.min_lr + (config.lr - config.min_lr) * _SHAPES[shape](progress)


# The share of the way down to `min_lr` that is left, as a function of the progress from 0 to 1.
_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
