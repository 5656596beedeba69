"""Sums over sequences, and the ways to average a token's loss over a batch.

A sequence of a microbatch is a row `[T]`, or a document of `cu_seqlens` in a packed row (B = 1).
Where `prefix_of` names documents that stand before others, those are no sequences: the tokens of a
shared prompt belong to the first answer behind it.
Every average is a sum of one microbatch and a count of the same microbatch; the engine divides the
sum of the sums by the sum of the counts, so any split over microbatches and data ranks gives the
same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")


def per_sequence(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns the sum `[S]` of `x` `[B, T]` over each sequence, with the dtype of `x`."""
    if "cu_seqlens" not in batch:
        return x.sum(-1)
    sums = torch.segment_reduce(x[0], "sum", lengths=_document_tokens(batch, x.device))
    if "prefix_of" not in batch:
        return sums
    sequence = _sequence_of(batch).to(x.device, non_blocking=True)
    return sums.new_zeros(num_sequences(batch)).index_add(0, sequence, sums)


def per_token(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns `[B, T]`, where each token holds what `y` `[S]` says of its sequence."""
    rows, tokens = batch["mask"].shape
    if "cu_seqlens" not in batch:
        return y[:, None].expand(rows, tokens)
    if "prefix_of" in batch:
        y = y[_sequence_of(batch).to(y.device, non_blocking=True)]
    return y.repeat_interleave(_document_tokens(batch, y.device), output_size=tokens)[None]


def _sequence_of(batch: dict[str, Tensor]) -> Tensor:
    """The number of each document's sequence, int64 `[n]`, as `ops.documents` has it too."""
    before = batch["prefix_of"]
    last = torch.ones(len(before), dtype=torch.int64)
    last[before[before >= 0].to(torch.int64)] = 0
    return last.cumsum(0) - last


def _document_tokens(batch: dict[str, Tensor], device: torch.device) -> Tensor:
    return batch["cu_seqlens"].to(torch.int64).diff().to(device, non_blocking=True)


def num_sequences(batch: dict[str, Tensor]) -> int:
    """Returns S, the sequences of a microbatch, padding included."""
    if "prefix_of" in batch:
        return int(_sequence_of(batch)[-1]) + 1
    return len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else len(batch["mask"])


def mean_by_sequence(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns the mean `[S, D]` of `x` `[B, T, D]` over the counted tokens of each sequence, 0
    where none counts.
    """
    count, mask = num_sequences(batch), batch["mask"]
    numbers = per_token(torch.arange(count, device=x.device), batch)
    sums = x.new_zeros(count, x.shape[-1]).index_add(0, numbers[mask], x[mask])
    return sums / tokens_per_sequence(batch).clamp(min=1).to(x.dtype)[:, None]


def tokens_per_sequence(batch: dict[str, Tensor]) -> Tensor:
    """Returns the number `[S]` of tokens of each sequence that `mask` counts, in float64."""
    return per_sequence(batch["mask"].to(torch.float64), batch)


def sequence_sum(name: str, batch: dict[str, Tensor]) -> Tensor:
    """Returns `batch[name]` as `[S]`: itself if it is one number a sequence, else the sum of its
    counted tokens `[B, T]`.
    """
    x = batch[name]
    return x if x.dim() == 1 else per_sequence(x.masked_fill(~batch["mask"], 0), batch)


def token_values(name: str, batch: dict[str, Tensor]) -> Tensor:
    """Returns `batch[name]` as `[B, T]`: itself, or one number a sequence `[S]` spread over its
    tokens.
    """
    x = batch[name]
    return x if x.dim() == 2 else per_token(x, batch)


def total(x: Tensor, batch: dict[str, Tensor], mode: str) -> Tensor:
    """Returns the sum of `x` `[B, T]` over one microbatch, the numerator of `divisor`.

    `seq_mean_token_mean` first averages over the counted tokens of each sequence (GRPO, arXiv
    2402.03300); the other modes only sum and differ in the divisor. Errors: ValueError for a mode
    that is not in `MODES`.
    """
    check_mode(mode)
    x = x.masked_fill(~batch["mask"], 0)
    if mode == "seq_mean_token_mean":
        return (per_sequence(x, batch) / tokens_per_sequence(batch).clamp(min=1).to(x.dtype)).sum()
    return x.sum()


def divisor(batch: dict[str, Tensor], mode: str, length: int | None = None) -> Tensor:
    """Returns what one microbatch adds to the number that `total` is divided by, a scalar.

    Counted tokens for `token_mean` (DAPO, arXiv 2503.14476); sequences with a counted token for
    `seq_mean_token_mean` and `seq_mean_token_sum`; `length`, the longest answer that is possible,
    for each such sequence for `constant` (Dr. GRPO, arXiv 2503.20783). A sequence without a counted
    token is padding and counts 0 in every mode; TRL counts it where it divides by rows.
    """
    check_mode(mode, length)
    if mode == "token_mean":
        return batch["mask"].sum()
    sequences = (tokens_per_sequence(batch) > 0).sum()
    return sequences.to(torch.float64) * length if mode == "constant" and length else sequences


def check_mode(mode: str, length: int | None = 1) -> None:
    """Errors: ValueError for a mode that is not in `MODES`, and for `constant` without a length."""
    if mode not in MODES:
        raise ValueError(f"the aggregation {mode!r} is none of {', '.join(MODES)}.")
    if mode == "constant" and not length:
        raise ValueError(
            "the aggregation 'constant' divides by a number of tokens for each sequence: set "
            "length to the longest answer that is possible."
        )
