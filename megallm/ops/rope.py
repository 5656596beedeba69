"""Rotary position embedding (arXiv 2104.09864), rotate-half convention, as a function of positions: no buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, E/2]` of the angles at `positions` `[B, T]`, in the wide `dtype`."""
    exponent = torch.arange(0, head_size, 2, dtype=dtype, device=positions.device) / head_size
    angles = positions.to(dtype)[..., None] * theta**-exponent
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[B, T, H, E]` by the tables `[B, T, E/2]`; the result has the dtype of `x`."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
