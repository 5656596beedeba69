"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2): gradients too small for fp16 are
made larger.

The loss is multiplied, gradients divided again before they are clipped. An overflow anywhere shows
in the global norm, which every rank has, so all ranks decide alike. Nothing here is read by the
host within a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.base.errors import Diverged
from megallm.ops.low_precision import LossScaleOptions

LARGEST = 2.0**24  # growth ends here: gradients that are all zero would let it grow for ever


class LossScaler:
    """The scale, and for how many updates in a row it has held."""

    def __init__(self, options: LossScaleOptions, device: torch.device) -> None:
        self.options = options
        self.scale = torch.tensor(options.initial, dtype=torch.float32, device=device)
        self.held = torch.zeros((), dtype=torch.int64, device=device)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)  # at the minimum

    def advance(self, finite: Tensor, empty: Tensor) -> Tensor:
        """Updates the scale after a step: half where the gradients were not finite, twice after
        `growth_steps` that were, within the minimum and LARGEST; no change after one without
        gradients (`empty`).

        Returns the scale that this step had.
        """
        before = self.scale.clone()
        grows = self.held + 1 >= self.options.growth_steps
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        held = torch.where(finite & ~grows, self.held + 1, 0)
        self.held.copy_(torch.where(empty, self.held, held))
        changed = (before * factor).clamp(min=self.options.minimum, max=LARGEST)
        at_minimum = ~finite & (before <= self.options.minimum)
        overflows = torch.where(at_minimum, self.overflows + 1, 0)
        self.overflows.copy_(torch.where(empty, self.overflows, overflows))
        self.scale.copy_(torch.where(empty, before, changed))
        return before

    def check(self) -> None:
        """Raise Diverged when gradients overflow again and again at the smallest scale; waits for
        the device."""
        if self.overflows >= self.options.overflows:
            raise Diverged(
                f"The loss scale is at train.loss_scale.minimum {self.options.minimum:g}, and "
                f"gradients overflowed {int(self.overflows)} times in a row there: they overflow "
                "fp16 however small the loss is made. Lower optim.lr, take train.precision bf16, "
                "or start again from an earlier checkpoint."
            )

    def counters(self) -> dict[str, float]:
        """Returns what a checkpoint remembers."""
        return {
            "loss_scale": float(self.scale),
            "loss_scale_held": int(self.held),
            "loss_scale_overflows": int(self.overflows),
        }

    def restore(self, counters: dict[str, float]) -> None:
        """Take up a checkpoint's scale; one of another precision has none, and the scale starts
        afresh.
        """
        self.scale.fill_(counters.get("loss_scale", self.options.initial))
        self.held.fill_(counters.get("loss_scale_held", 0))
        self.overflows.fill_(counters.get("loss_scale_overflows", 0))
