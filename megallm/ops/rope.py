"""Rotary position embedding (arXiv 2104.09864), rotate-half convention, as a function of positions: no buffers."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Stretch(Protocol):
    """How the frequencies are lowered for a longer context; `kind` is linear or llama3, linear uses `factor` only."""

    kind: str
    factor: float
    low_factor: float | None
    high_factor: float | None
    positions: int | None


def rope_tables(
    positions: Tensor, head_size: int, theta: float, dtype: torch.dtype, stretch: Stretch | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, E/2]` of the angles at `positions` `[B, T]`, in the wide `dtype`."""
    exponent = torch.arange(0, head_size, 2, dtype=dtype, device=positions.device) / head_size
    frequencies = theta**-exponent
    if stretch is not None:
        frequencies = stretched(frequencies, stretch)
    angles = positions.to(dtype)[..., None] * frequencies
    return angles.cos(), angles.sin()


def stretched(frequencies: Tensor, stretch: Stretch) -> Tensor:
    """Lowered frequencies `[E/2]`.

    linear divides all by `factor` (arXiv 2306.15595). llama3 (Llama 3.1, arXiv 2407.21783) divides those of waves
    that did not turn `low_factor` times within the old context of `positions`, leaves those that turned more than
    `high_factor` times, and blends in between.
    """
    if stretch.kind == "linear":
        return frequencies / stretch.factor
    turns = stretch.positions * frequencies / (2 * math.pi)
    kept = ((turns - stretch.low_factor) / (stretch.high_factor - stretch.low_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / stretch.factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[B, T, H, E]` by the tables `[B, T, E/2]`; the result has the dtype of `x`."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
