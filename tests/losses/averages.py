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
