"""Gradient clipping by the global norm."""

from __future__ import annotations

from megallm.optim.grads import Buckets, squared_norm


def clip_gradients(buckets: Buckets, limit: float) -> float:
    """Scale all gradients by `min(1, limit / (norm + 1e-6))` and return the norm before; 0 switches clipping off.

    Collective over the world; every rank gets the same number.
    """
    norm = float(squared_norm(buckets).sqrt())
    scale = limit / (norm + 1e-6)
    if limit > 0 and scale < 1:
        for bucket in buckets.flat:
            bucket.grads.mul_(scale)
    return norm
