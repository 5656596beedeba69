"""Causal attention of query heads over (fewer) key/value heads, with an optional sliding window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """Bool `[..., Tq, Tk]`: key j is seen from query i when `i - window < j <= i` (Mistral, arXiv 2310.06825)."""
    gap = q_positions[..., :, None] - k_positions[..., None, :]
    seen = gap >= 0
    return seen if window is None else seen & (gap < window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Softmax attention, scale `E**-0.5`.

    q `[B, Tq, H, E]`, k and v `[B, Tk, K, E]` with H a multiple of K; the queries are the *last* Tq of the
    Tk positions. Returns `[B, Tq, H, E]`.
    """
    tq, tk = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = None
    square = tq == tk and (window is None or window >= tk)
    if not square and (tq > 1 or window is not None):
        places = torch.arange(tk, device=q.device)
        mask = visible(places[tk - tq :], places, window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square and tq > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
