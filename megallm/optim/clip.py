"""Gradient clipping by the global norm."""

from __future__ import annotations

from torch import Tensor

from megallm.optim.zero import ShardedParameters


def clip_gradients(parameters: ShardedParameters, limit: float) -> Tensor:
    """Scale all gradients by `min(1, limit / (norm + 1e-6))` and return the norm before; 0 switches clipping off.

    Collective over the world; every rank gets the same float64 scalar, on its device: nothing waits for it.
    """
    norm = parameters.squared_norm().sqrt()
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for bucket in parameters.flat:
            bucket.shard_grads.mul_(scale)
    return norm
