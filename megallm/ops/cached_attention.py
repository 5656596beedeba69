"""Attention of one new token per text to that text's cached keys and values, many texts at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.attention import Prefix
from megallm.ops.precision import wide


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Softmax attention, scale `E**-0.5`: row b sees its first `lengths[b]` positions, or the last
    `window` of those.

    q `[B, 1, H, E]`, k `[B, C, K, E]` and v `[B, C, K, Ev]` with H a multiple of K, lengths int64
    `[B]`, each from 1 to C; what lies beyond a row's length must be finite and has no influence.
    Sinks `[H]` are one more score a head, of a value that is zero; a prefix is seen by every row.
    Returns `[B, 1, H, Ev]`.
    """
    places = torch.arange(k.shape[1], device=q.device)
    seen = places < lengths[:, None]
    if window is not None:
        seen = seen & (places >= lengths[:, None] - window)
    if sinks is not None or prefix is not None or k.shape[-1] != v.shape[-1]:
        return _written_out(q, k, v, seen, sinks, prefix)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None, None, :], enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, prefix: Prefix | None
) -> Tensor:
    """The same with `seen` bool `[B, C]`; no key or value is copied for the heads that share it."""
    rows = q.squeeze(1).unflatten(1, (k.shape[2], -1))  # [B, K, H/K, E]
    scores = wide(rows @ k.permute(0, 2, 3, 1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    if prefix is not None:
        ahead = wide(rows @ prefix[0].permute(1, 2, 0)) * q.shape[-1] ** -0.5
        scores = torch.cat((ahead, scores), dim=-1)
    lse = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, wide(sinks).view(k.shape[2], -1, 1))
    shares = (scores - lse).exp_().to(v.dtype)
    out = shares[..., -v.shape[1] :] @ v.transpose(1, 2)  # [B, K, H/K, Ev]
    if prefix is not None:
        out = out + shares[..., : len(prefix[1])] @ prefix[1].transpose(0, 1)
    return out.flatten(1, 2)[:, None]
