"""Documents of a packed row `[1, T]` and the sequences that they make up.

`cu_seqlens` int32 `[n+1]` holds their ends, `prefix_of` int32 `[n]`, where a batch has it, the
document that stands before each, -1: none. A sequence is then a document that stands before no
other; tokens of a shared prefix are those of the first sequence behind it. Both lie on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

OF_DOCUMENTS = ("cu_seqlens", "prefix_of")


def sequence_of(batch: dict[str, Tensor]) -> Tensor:
    """Returns the number of each document's sequence, int64 `[n]`, on the CPU."""
    count = len(batch["cu_seqlens"]) - 1
    if "prefix_of" not in batch:
        return torch.arange(count)
    last = torch.ones(count, dtype=torch.int64)
    last[batch["prefix_of"][batch["prefix_of"] >= 0].to(torch.int64)] = 0
    return last.cumsum(0) - last


def token_sequences(batch: dict[str, Tensor]) -> Tensor:
    """Returns the number of each token's sequence, int64 `[T]`, on the CPU."""
    return sequence_of(batch).repeat_interleave(batch["cu_seqlens"].to(torch.int64).diff())
