"""The losses that rows of the layout oracle train, by name; `reference_encoder` has their referees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megallm.losses.language import MaskedDiffusion, NextToken
from megallm.losses.scores import PairwiseReward, Regression, Value
from megallm.losses.terms import Loss, Terms
from megallm.oracle.reference_encoder import CLIP, ENTROPY, TEMPERATURE, WRONG


@dataclass(frozen=True)
class Tempered:
    """`-log_prob + ENTROPY entropy + WRONG (1 - correct)` at TEMPERATURE, a mean over the tokens
    that count.

    Its second term is divided by a count that is no whole number.
    """

    needs: ClassVar[tuple[str, ...]] = ("log_prob", "entropy", "correct")
    temperature: ClassVar[float] = TEMPERATURE

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens of one microbatch that count, and a third of that."""
        tokens = batch["mask"].sum(dtype=torch.float64)
        return {"loss": tokens, "entropy": tokens / 3}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        mask = batch["mask"]
        first = (WRONG * (1 - outputs["correct"]) - outputs["log_prob"]) * mask
        return Terms(
            {"loss": first.sum(), "entropy": (outputs["entropy"] * mask).sum() * (ENTROPY / 3)}
        )


LOSSES: dict[str, Loss] = {
    "next_token": NextToken(),
    "tempered": Tempered(),
    "cross_entropy": NextToken(),
    "diffusion": MaskedDiffusion(),
    "regression": Regression(),
    "critic": Value(CLIP),
    "reward": PairwiseReward(),
}
