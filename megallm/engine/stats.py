"""What a step returns: losses, counts, metrics and gradient norm, and the sums they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepStats:
    """One update: each term divided by its global count, the counts, the norm before clipping, and
    whether the update was left out: `skipped` because loss or norm are not finite, or beyond limits
    that skip, `empty` because nothing counted or every gradient was exactly 0. `spiked`: they were
    finite and beyond their limits."""

    losses: dict[str, float]
    counts: dict[str, float]  # int where it is a whole number
    grad_norm: float
    skipped: bool
    loss_scale: float | None = None  # fp16: what the loss was multiplied by
    # what else was measured, under the names of metrics.jsonl: the loss's own and the routers'
    metrics: dict[str, float] = field(default_factory=dict)
    empty: bool = False
    request: int = 0  # the largest `Engine.request` of all ranks at the end of the backward pass
    spiked: bool = False

    @property
    def loss(self) -> float:
        """The sum of the terms: what was differentiated."""
        return sum(self.losses.values())


class LossSums(NamedTuple):
    """What a loss returned over the global batch, still on the device.

    `sums` are those of the losses, of the metrics, and then the maxima of `largest`; `counts` what
    the terms of `counted` are divided by; both float64.
    """

    losses: list[str]
    metrics: list[str]
    largest: list[str]
    sums: Tensor
    counted: list[str]
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """The losses, each divided by its count: float64 on the device."""
        at = [self.counted.index(name) if name in self.counted else 0 for name in self.losses]
        counts = torch.stack([self.counts[i] for i in at])
        return self.sums[: len(at)] / torch.where(counts == 0, 1.0, counts)

    @property
    def main(self) -> Tensor:
        """The loss that a run is followed by, a scalar on the device: the term of that name, or
        the sum of all.
        """
        means = self.means
        return means[self.losses.index("loss")] if "loss" in self.losses else means.sum()

    @property
    def nothing(self) -> Tensor:
        """Whether no term counts anything: a bool scalar on the device."""
        return (self.counts == 0).all()

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums by name, and a count for each; waits for the device."""
        values = torch.cat((self.sums, self.counts)).tolist()
        names = [*self.losses, *self.metrics, *self.largest]
        counts = {
            name: int(count) if count.is_integer() else count
            for name, count in zip(self.counted, values[len(names) :], strict=True)
        }
        further = {name: counts.get(name, counts[self.counted[0]]) for name in names}
        further |= dict.fromkeys(self.largest, 1)
        return dict(zip(names, values[: len(names)], strict=True)), further | counts
