"""Distillation: divergences of a student from a teacher, token by token.

The divergence is an output of the head, which holds the logits (`parallel.divergence`); here is the
loss that sums it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megallm.losses.reduce import check_mode, divisor, total
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class Distillation:
    """The head's `divergence` `[B, T]` over the counted tokens, and `nll` times the likelihood of
    the labels; both divided as `aggregate` has it.
    """

    nll: float = 0.0
    aggregate: str = "token_mean"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_mode(self.aggregate)

    @property
    def needs(self) -> tuple[str, ...]:
        """The divergence, and the log-probability of the labels if it weighs anything."""
        return ("log_prob", "divergence") if self.nll else ("divergence",)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what divides the divergence and the likelihood of one microbatch."""
        number = divisor(batch, self.aggregate)
        return {"loss": number} | ({"nll": number} if self.nll else {})

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        losses = {"loss": total(outputs["divergence"], batch, self.aggregate)}
        if self.nll:
            losses["nll"] = -self.nll * total(outputs["log_prob"], batch, self.aggregate)
        return Terms(losses)
