"""Attention of one new token per sequence to its cached keys and values, many sequences at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.kernels import KERNELS
from megallm.ops.precision import wide


def length_bias(
    lengths: Tensor, capacity: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Returns what is added to scores `[n, 1, 1, capacity]`: 0 where row b may look, its first
    `lengths[b]` positions or the last `window` of those, and -inf elsewhere. Lengths are int64
    `[n]`, each from 1 to `capacity`.
    """
    places = torch.arange(capacity, device=lengths.device)
    hidden = places >= lengths[:, None]
    if window is not None:
        hidden |= places < lengths[:, None] - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return bias.masked_fill_(hidden, -torch.inf)[:, None, None]


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Computes softmax attention of q `[n, 1, H, E]`, scale `E**-0.5`, to k `[n, C, K, E]` and v
    `[n, C, K, Ev]` with H a multiple of K; `bias` is that of `length_bias`.

    What the bias hides must be finite. Keys in front of the biased ones, as an adapter's prefix
    gives them, are seen by every query. Sinks `[H]` are one more score a head, of a value that is
    zero; `cap` is a soft cap of the scores. Fast where the C positions of a head lie together.
    Returns `[n, 1, H, Ev]`.
    """
    if k.shape[1] > bias.shape[-1]:
        bias = F.pad(bias, (k.shape[1] - bias.shape[-1], 0))
    rows = q.view(q.shape[0], k.shape[2], -1, q.shape[-1])  # [n, K, H/K, E]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if sinks is not None or cap is not None or k.shape[-1] != v.shape[-1]:
        out = _written_out(rows, k, v, bias, sinks, cap)
    else:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)
    return out.reshape(q.shape[0], 1, -1, v.shape[-1])


def _written_out(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    sinks: Tensor | None,
    cap: float | None,
) -> Tensor:
    """The same for q `[n, K, H/K, E]`; no key or value is copied for the heads that share it."""
    scores = wide(rows @ k.mT).mul(rows.shape[-1] ** -0.5)
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    scores.add_(bias)
    lse = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, wide(sinks).view(k.shape[1], -1, 1))
    return scores.sub_(lse).exp_().to(v.dtype) @ v


PAGE = 16  # positions of a block of the paged cache (inference/blocks.py)
KERNEL_HEAD = 256  # features of the largest head that csrc/cuda/paged_attention.cu takes
SPLIT = 512  # positions that one block of threads goes over, at least
MAX_SPLITS = 32


class Paged(NamedTuple):
    """Pools of keys and values `[K, positions, E]`, and of each of n rows the blocks of PAGE
    positions that hold its text, int64 `[n, blocks]`, and how many positions it sees, its new one
    among them, int64 `[n]`.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor


def attend_pages(
    q: Tensor,
    pages: Paged,
    window: int | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Computes what `attend_rows` does, of q `[n, H, E]` to the blocks of a paged cache where they
    lie -> `[n, H, E]`.
    """
    keys, values, table, lengths = pages
    kernels = KERNELS.of(q, keys, values) if keys.shape == values.shape else None
    if kernels is not None and keys.dtype == values.dtype == q.dtype and q.shape[-1] <= KERNEL_HEAD:
        splits = max(1, min(MAX_SPLITS, table.shape[1] * PAGE // SPLIT))
        parts = q.new_empty(*q.shape[:2], splits, q.shape[2] + 2, dtype=torch.float32)
        out, sinks = torch.empty_like(q), None if sinks is None else wide(sinks)
        numbers = window or 0, cap or 0.0
        kernels.paged_attention(q, keys, values, table, lengths, sinks, *numbers, parts, out)
        return out
    places = (table[..., None] * PAGE + torch.arange(PAGE, device=table.device)).flatten(1)
    k, v = (pool[:, places].permute(1, 2, 0, 3) for pool in (keys, values))
    bias = length_bias(lengths, places.shape[1], window, wide(q).dtype)
    exact = sinks is not None or cap is not None or k.shape[-1] != v.shape[-1]
    return attend_rows(q[:, None], k, v, bias if exact else bias.to(q.dtype), sinks, cap)[:, 0]
