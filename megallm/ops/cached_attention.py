"""Attention of one new token per text to that text's cached keys and values, many texts at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """Softmax attention, scale `E**-0.5`: row b sees its first `lengths[b]` positions, or the last `window` of those.

    q `[B, 1, H, E]`, k and v `[B, C, K, E]` with H a multiple of K, lengths int64 `[B]`, each from 1 to C; what lies
    beyond a row's length must be finite and has no influence. Returns `[B, 1, H, E]`.
    """
    places = torch.arange(k.shape[1], device=q.device)
    seen = places < lengths[:, None]
    if window is not None:
        seen = seen & (places >= lengths[:, None] - window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None, None, :], enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
