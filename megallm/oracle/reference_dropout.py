"""Independent dropout of hidden states, one number after another: what is kept is decided by
SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) of stream, sample, place and feature.

Nothing of megallm is imported. `config["dropout"]` has the `rate` and `key`, which gives the number
of the stream of a place in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Drop = Callable[[str, Tensor], Tensor]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _mixed(x: np.ndarray) -> np.ndarray:
    for places, factor in STEPS:
        x = (x ^ (x >> np.uint64(places))) * np.uint64(factor)
    return x


def drop_of(config: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Drop:
    """Returns what drops hidden states `[B, T, D]` at a place in the model; without
    `config["dropout"]` nothing is dropped.
    """
    if "dropout" not in config:
        return lambda place, x: x
    rate, key = config["dropout"]["rate"], config["dropout"]["key"]
    samples, places = (batch[name].numpy().astype(np.uint64) for name in ("samples", "positions"))
    tokens = _mixed(_mixed(samples * GOLDEN) + places * GOLDEN)

    def drop(place: str, x: Tensor) -> Tensor:
        seeded = _mixed(tokens ^ np.uint64(key(place)))[..., None]
        bits = _mixed(seeded + np.arange(x.shape[-1], dtype=np.uint64) * GOLDEN)
        kept = (bits ^ np.uint64(2**63)) >= np.uint64(int(rate * 2**64))
        return x * torch.from_numpy(kept) / (1 - rate)

    return drop
