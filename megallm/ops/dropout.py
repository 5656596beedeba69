"""Dropout and noise that are functions of (key, sample, token, feature) and of nothing else.

So every layout draws the same numbers, and recomputation needs no state of a generator. The bits
are those of SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied to the token's key and to each feature of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.ops.precision import wide_dtype

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; products wrap
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def token_keys(samples: Tensor, positions: Tensor, epochs: Tensor | None = None) -> Tensor:
    """Returns a key int64 `[B, T]` for each token, from the number of its sample `[B, T]` or `[B]`
    and its place in the sample `[B, T]`; `epochs`, shaped like `samples`, says how often the sample
    was read before."""
    rows = samples.to(torch.int64)
    if epochs is not None:
        rows = rows ^ _mix(epochs.to(torch.int64) * _GOLDEN)
    rows = rows if rows.dim() == positions.dim() else rows[:, None]
    return _mix(_mix(rows * _GOLDEN) + positions.to(torch.int64) * _GOLDEN)


def keyed_dropout(x: Tensor, rate: float, key: int, tokens: Tensor, first: int = 0) -> Tensor:
    """Returns `x [..., F]` with a share `rate` of its numbers set to zero and the rest scaled up.

    `tokens [...]` are the keys of `token_keys`, `key` is that of the stream, and the features of
    `x` are those from number `first` on.
    """
    if not rate:
        return x
    keep = _bits(x, key, tokens, first) >= _signed(int(rate * 2**64) + 2**63)
    return torch.where(keep, x, 0) / (1 - rate)


def keyed_uniform(x: Tensor, key: int, tokens: Tensor) -> Tensor:
    """Returns numbers from -1 to 1 in the shape `[..., F]` and the dtype of `x`, at least float32;
    see `keyed_dropout`.
    """
    return _bits(x, key, tokens, 0).to(wide_dtype(x.dtype)) * 2.0**-63


def _bits(x: Tensor, key: int, tokens: Tensor, first: int) -> Tensor:
    """64 bits for each number of `x`, as int64."""
    seeded = _mix(tokens ^ _signed(key))
    features = torch.arange(first, first + x.shape[-1], device=x.device)
    return _mix(seeded[..., None] + features * _GOLDEN)


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
