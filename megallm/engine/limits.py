"""What an update may show before it is a spike, and the one decision of all ranks about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megallm.engine.stats import LossSums


@dataclass(frozen=True)
class UpdateLimits:
    """Bounds of the loss and of the gradient norm. With `skips` an update beyond them is left out.

    What one rank sees of its loss, the others learn with the gradient norm: no rank decides alone.
    """

    loss: float = math.inf
    grad_norm: float = math.inf
    skips: bool = False

    def seen(self, sums: LossSums) -> Tensor:
        """Returns what this rank says of its losses, `[2]` float64 on the device: 1 where one is
        not finite, 1 where the main one is beyond its bound."""
        bad = ~sums.means.isfinite().all()
        return torch.stack((bad, sums.main > self.loss)).to(torch.float64)

    def judge(self, norm: Tensor, verdicts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns whether a step is finite, and whether it is beyond a bound, as bool scalars on
        the device; `verdicts` are what all ranks have `seen`, added up."""
        finite = norm.isfinite() & (verdicts[0] == 0)
        return finite, finite & ((norm > self.grad_norm) | (verdicts[1] > 0))
