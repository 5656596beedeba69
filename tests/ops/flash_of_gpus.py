"""The operations of a GPU that `ops.flash` calls, with the values of the textbook, on the CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _masked(q: Tensor, k: Tensor, scale: float, sight: tuple[int, int, bool]) -> Tensor:
    """Scores `[H, Tq, Tk]`; the last query and the last key stand at one place."""
    left, right, causal = sight
    right = 0 if causal else right
    scores = torch.einsum("ihe,jhe->hij", q, k) * scale
    gap = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
    hidden = torch.zeros_like(gap, dtype=torch.bool)
    if right >= 0:
        hidden |= gap > right
    if left >= 0:
        hidden |= gap < -left
    return scores.masked_fill(hidden, -torch.inf)


def _sequences(ends_q: Tensor, ends_k: Tensor):
    a, b = ends_q.tolist(), ends_k.tolist()
    for n in range(len(a) - 1):
        yield slice(a[n], a[n + 1]), slice(b[n], b[n + 1])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None,
            window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None):  # fmt: skip
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and dropout == 0.0 and not debug
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert max_q == int(ends_q.diff().max()) and max_k == int(ends_k.diff().max())
    share = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.empty(q.shape[1], len(q), dtype=_wide(q).dtype)
    for rows, keys in _sequences(ends_q, ends_k):
        mine, theirs, values = (_wide(x) for x in (q[rows], k[keys], v[keys]))
        theirs, values = (x.repeat_interleave(share, 1) for x in (theirs, values))
        scores = _masked(mine, theirs, scale, (window_size_left, window_size_right, causal))
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hij,jhe->ihe", scores.softmax(-1), values).to(q.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def backward(grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout, causal, random, unused, *, scale=None,
             window_size_left=None, window_size_right=None):  # fmt: skip
    assert grad.dtype == out.dtype == q.dtype and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
    share, heads = q.shape[1] // k.shape[1], k.shape[1]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys in _sequences(ends_q, ends_k):
        mine, theirs, values, dy, y = (_wide(x) for x in (q[rows], k[keys], v[keys], grad[rows], out[rows]))
        theirs, values = (x.repeat_interleave(share, 1) for x in (theirs, values))
        scores = _masked(mine, theirs, scale, (window_size_left, window_size_right, causal))
        weights = (scores - lse[:, rows][..., None]).exp()
        inner = torch.einsum("ihe,jhe->hij", dy, values) - (dy * y).sum(-1).T[..., None]
        inner = inner * weights * scale
        grads[0][rows] = torch.einsum("hij,jhe->ihe", inner, theirs).to(q.dtype)
        of_k, of_v = torch.einsum("hij,ihe->jhe", inner, mine), torch.einsum("hij,ihe->jhe", weights, dy)
        grads[1][keys] = of_k.unflatten(1, (heads, share)).sum(2).to(q.dtype)
        grads[2][keys] = of_v.unflatten(1, (heads, share)).sum(2).to(q.dtype)
    return tuple(grads)


@cache
def install() -> torch.library.Library:
    """Give the CPU these two operations, which torch has for GPUs only, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library
