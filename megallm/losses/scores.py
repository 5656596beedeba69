"""Losses of a value head, which gives each token one number: regression, pairs of answers, and
critics.

`mask` `[B, T]` is True at the tokens whose number counts, such as the last one of each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megallm.losses.terms import Terms

NEEDS = ("value",)


@dataclass(frozen=True)
class Regression:
    """`sum(mask * (value - target)^2)` with `targets` `[B, T]`; divided by the number of targets
    that count.
    """

    needs: ClassVar[tuple[str, ...]] = NEEDS
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the targets of one microbatch, known before its forward pass."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        error = (outputs["value"] - batch["targets"]).square()
        return Terms({"loss": (error * batch["mask"]).sum()})


@dataclass(frozen=True)
class Value:
    """`sum(mask * (value - target)^2) / 2` for a critic, with `targets` `[B, T]`; divided by the
    tokens that count.

    With `clip` the values may leave `old_values` `[B, T]`, those of the rollout, by at most that
    before they cease to lower the loss: the larger of the clipped and the plain square counts (PPO,
    arXiv 1707.06347).
    """

    needs: ClassVar[tuple[str, ...]] = NEEDS
    temperature: ClassVar[float] = 1.0
    clip: float | None = None

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens of one microbatch that have a target."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        value, targets = outputs["value"], batch["targets"]
        error = (value - targets).square()
        if self.clip is not None:
            old = batch["old_values"]
            near = old + (value - old).clamp(-self.clip, self.clip)
            error = error.maximum((near - targets).square())
        return Terms({"loss": (error * batch["mask"]).sum() / 2})
