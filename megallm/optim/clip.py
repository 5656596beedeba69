"""Gradient clipping by the global gradient norm."""

from __future__ import annotations

from torch import Tensor

from megallm.optim.zero import ShardedParameters


def clip_gradients(
    parameters: ShardedParameters, limit: float, loss_scale: Tensor | None = None
) -> Tensor:
    """Scale all gradients by `min(1, limit / (norm + 1e-6))` and return the norm before; 0 switches
    clipping off.

    `loss_scale` is what the loss was multiplied by: the gradients are divided by it first.

    Collective over the world; every rank gets the same float64 scalar, on its device: nothing waits
    for it.
    """
    norm = parameters.squared_norm().sqrt()
    if loss_scale is not None:
        norm = norm / loss_scale
    scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else None
    if loss_scale is not None:
        scale = (1.0 if scale is None else scale) / loss_scale
    if scale is not None:
        for bucket in parameters.trainable:
            bucket.shard_grads.mul_(scale)
    return norm
