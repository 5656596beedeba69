"""Gradient clipping by the global norm."""

from __future__ import annotations

from megallm.optim.zero import ShardedParameters


def clip_gradients(parameters: ShardedParameters, limit: float) -> float:
    """Scale all gradients by `min(1, limit / (norm + 1e-6))` and return the norm before; 0 switches clipping off.

    Collective over the world; every rank gets the same number.
    """
    norm = float(parameters.squared_norm().sqrt())
    scale = limit / (norm + 1e-6)
    if limit > 0 and scale < 1:
        for bucket in parameters.flat:
            bucket.shard_grads.mul_(scale)
    return norm
