"""What an engine makes of a loss: sums of all microbatches over the counts of all microbatches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def averaged(loss: Any, micros: list[tuple[Batch, Batch]]) -> tuple[Tensor, dict[str, float]]:
    """The loss, differentiable, and every term and metric, of microbatches (outputs, batch)."""
    counts: dict[str, float] = {}
    for _, batch in micros:
        for name, number in loss.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + float(number)
    first = next(iter(counts.values()))
    total, report = torch.zeros((), dtype=torch.float64), {}
    for outputs, batch in micros:
        terms = loss(outputs, batch)
        assert not any(x.requires_grad for x in terms.metrics.values())
        for name, x in terms.losses.items():
            total = total + x / max(counts[name], 1)
        for name, x in (terms.losses | terms.metrics).items():
            report[name] = report.get(name, 0.0) + float(x.detach()) / max(counts.get(name, first), 1)
    return total, report


def rows(batch: Batch, start: int, end: int) -> Batch:
    """Some rows of a batch whose tensors are `[B, T]` or `[B]`."""
    return {name: x[start:end] for name, x in batch.items()}


def split(outputs: Batch, batch: Batch, *ends: int) -> list[tuple[Batch, Batch]]:
    """Microbatches that end before the rows `ends` and at the last row."""
    edges = [0, *ends, len(batch["mask"])]
    pairs = zip(edges, edges[1:], strict=False)
    return [(rows(outputs, a, b), rows(batch, a, b)) for a, b in pairs]


def packed(outputs: Batch, batch: Batch) -> tuple[Batch, Batch]:
    """The rows of a batch as documents of one row, each cut after its last counted token, and four
    tokens of padding as a document of their own.
    """
    mask = batch["mask"]
    lengths = [max([i + 1 for i, counted in enumerate(row) if counted], default=1) for row in mask.tolist()]

    def joined(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return torch.cat([x, x.new_zeros(1)])
        parts = [row[:n] for row, n in zip(x, lengths, strict=True)]
        return torch.cat([*parts, x.new_zeros(4)])[None]

    ends = torch.tensor([0, *lengths, 4]).cumsum(0).to(torch.int32)
    whole = {name: joined(x) for name, x in batch.items()} | {"cu_seqlens": ends}
    return {name: joined(x) for name, x in outputs.items()}, whole


def shared(outputs: Batch, batch: Batch) -> tuple[Batch, Batch]:
    """The same with a prompt of three tokens before every second sequence, which it shares with the next
    one; whatever outputs say of prompts is of no interest.
    """
    outputs, batch = packed(outputs, batch)
    ends, pieces, before, sizes = batch["cu_seqlens"].tolist(), [], [], [0]
    for n, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        alone = n == len(ends) - 2  # padding
        if n % 2 == 0 and not alone:
            pieces.append(None)
            before.append(-1)
            sizes.append(3)
        before.append(-1 if alone else len(before) - 1 - n % 2)
        pieces.append(slice(begin, end))
        sizes.append(end - begin)

    def joined(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x
        fill = 7.0 if x.is_floating_point() else 0
        return torch.cat([x.new_full((1, 3), fill) if piece is None else x[:, piece] for piece in pieces], 1)

    whole = {name: joined(x) for name, x in batch.items() if name != "cu_seqlens"}
    whole["cu_seqlens"] = torch.tensor(sizes).cumsum(0).to(torch.int32)
    whole["prefix_of"] = torch.tensor(before, dtype=torch.int32)
    return {name: joined(x) for name, x in outputs.items()}, whole
