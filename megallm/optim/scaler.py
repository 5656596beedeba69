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

    def advance(self, finite: Tensor, empty: Tensor) -> Tensor:
        """Updates the scale after a step: half where the gradients were not finite, twice after
        `growth_steps` that were; no change after one without gradients (`empty`).

        Returns the scale that this step had.
        """
        before = self.scale.clone()
        grows = self.held + 1 >= self.options.growth_steps
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        held = torch.where(finite & ~grows, self.held + 1, 0)
        self.held.copy_(torch.where(empty, self.held, held))
        self.scale.copy_(torch.where(empty, before, (before * factor).clamp(max=LARGEST)))
        return before

    def check(self) -> None:
        """Raise Diverged when the scale has fallen below its minimum; waits for the device."""
        if self.scale < self.options.minimum:
            raise Diverged(
                f"The loss scale fell to {float(self.scale):g}, below train.loss_scale.minimum "
                f"{self.options.minimum:g}: gradients overflow fp16 however small the loss is "
                "made. Lower optim.lr, take train.precision bf16, or start again from an earlier "
                "checkpoint."
            )

    def counters(self) -> dict[str, float]:
        """Returns what a checkpoint remembers."""
        return {"loss_scale": float(self.scale), "loss_scale_held": int(self.held)}

    def restore(self, counters: dict[str, float]) -> None:
        """Take up a checkpoint's scale; one of another precision has none, and the scale starts
        afresh.
        """
        self.scale.fill_(counters.get("loss_scale", self.options.initial))
        self.held.fill_(counters.get("loss_scale_held", 0))
