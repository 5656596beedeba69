"""Megatron-LM's greedy blend: which source, and which sample of it, item i of a mixture is.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf

import numpy as np

from megallm.base import extension
from megallm.base.errors import UsageError

SURPLUS = 0.005  # the greedy rule may take a little more of a source than its share
MAX_SOURCES = 32766  # sources are numbered in int16


def normalise(weights: Sequence[float]) -> np.ndarray:
    """Returns weights divided by their sum, float64 [sources].

    The sum is numpy's, whose order of additions from eight weights on is not that of Python's.
    """
    if not len(weights) or not all(0 < w < inf for w in weights):
        raise UsageError(
            f"data.sources needs a finite weight > 0 for each source; got {list(weights)}."
        )
    if len(weights) > MAX_SOURCES:
        raise UsageError(
            f"data.sources has {len(weights)} sources; a blend holds at most {MAX_SOURCES}."
        )
    array = np.asarray(weights, dtype=np.float64)
    return array / np.sum(array)


def source_sizes(weights: np.ndarray, size: int, surplus: float = SURPLUS) -> list[int]:
    """Returns how many samples to build of each source for a blend of `size`, a share `surplus` on
    top.
    """
    return [ceil(ceil(size * w) * (1 + surplus)) for w in weights.tolist()]


def blend(
    weights: np.ndarray, size: int, native: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns source (int16 [size]) and sample in that source (int64 [size]) of each item.

    Item i comes from argmax over d of weights[d] * max(i, 1) - taken[d], in float64, ties to the
    lowest d. `native` as in `base.extension.index`.
    """
    return build_blending_indices(
        weights, size, np.full(len(weights), size, dtype=np.int64), native
    )


def exhaustive(sizes: Sequence[int], native: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same rule until every sample of every source was taken once; weights are the
    shares of `sizes`.
    """
    limits = np.asarray(sizes, dtype=np.int64)
    total = int(limits.sum())
    return build_blending_indices(limits / max(total, 1), total, limits, native)


def build_blending_indices(
    weights: np.ndarray, size: int, limits: np.ndarray, native: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the greedy rule; a source leaves once it has given `limits[d]` samples (int64
    [sources]).
    """
    module = extension.index(native)
    if module is not None:
        return module.build_blending_indices(weights, size, limits)
    taken = np.zeros(len(weights), dtype=np.int64)
    spent = np.where(taken >= limits, -inf, 0.0)
    source_of = np.empty(size, dtype=np.int16)
    sample_of = np.empty(size, dtype=np.int64)
    for i in range(size):
        best = int(np.argmax(weights * max(i, 1) - taken + spent))
        source_of[i] = best
        sample_of[i] = taken[best]
        taken[best] += 1
        if taken[best] >= limits[best]:
            spent[best] = -inf
    return source_of, sample_of
