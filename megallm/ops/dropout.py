"""Dropout whose mask is a function of (key, sample, token, feature) and of nothing else.

So every layout drops the same numbers, and recomputation needs no state of a generator. The bits
are those of SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied to the token's key and to each feature of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; products wrap
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def token_keys(samples: Tensor, positions: Tensor) -> Tensor:
    """Returns a key int64 `[B, T]` for each token, from the number of its sample `[B, T]` or `[B]`
    and its place in the sample `[B, T]`."""
    rows = samples.to(torch.int64)
    rows = rows if rows.dim() == positions.dim() else rows[:, None]
    return _mix(_mix(rows * _GOLDEN) + positions.to(torch.int64) * _GOLDEN)


def keyed_dropout(x: Tensor, rate: float, key: int, tokens: Tensor, first: int = 0) -> Tensor:
    """Returns `x [..., F]` with a share `rate` of its numbers set to zero and the rest scaled up.

    `tokens [...]` are the keys of `token_keys`, `key` is that of the stream, and the features of
    `x` are those from number `first` on.
    """
    if not rate:
        return x
    seeded = _mix(tokens ^ _signed(key))
    features = torch.arange(first, first + x.shape[-1], device=x.device)
    bits = _mix(seeded[..., None] + features * _GOLDEN)
    keep = bits >= _signed(int(rate * 2**64) + 2**63)
    return torch.where(keep, x, 0) / (1 - rate)


def _signed(number: int) -> int:
    """The low 64 bits as a signed number."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit over all others."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shifts to the right that bring in zeros."""
    return (x >> places) & ((1 << (64 - places)) - 1)
