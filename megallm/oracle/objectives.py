"""The losses that rows of the layout oracle train, by name; `reference_encoder` has their referees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.losses.distill import Distillation
from megallm.losses.language import MaskedDiffusion, NextToken
from megallm.losses.offline import AdvantageWeighted, Ilql
from megallm.losses.policy import policy_loss
from megallm.losses.preference import Kto, Preference, simpo_loss
from megallm.losses.reward import BradleyTerry
from megallm.losses.scores import Regression, Value
from megallm.losses.terms import Loss, Terms
from megallm.oracle import reference_trainers as written
from megallm.oracle.reference_encoder import CLIP, ENTROPY, TEMPERATURE, WRONG
from megallm.oracle.trainers import DISTILLED


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


@dataclass(frozen=True)
class EvenPairs:
    """`-sum log sigmoid(first - second)` of the values of the counted tokens, two by two in the
    order of the microbatch, however many a sequence has.
    """

    needs: ClassVar[tuple[str, ...]] = ("value",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the pairs of one microbatch."""
        return {"loss": batch["mask"].sum() // 2}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        first, second = outputs["value"][batch["mask"]].view(-1, 2).unbind(-1)
        return Terms({"loss": -F.logsigmoid(first - second).sum()})


@dataclass(frozen=True)
class Doubled:
    """A mistake: another loss whose every term is divided by twice its count."""

    loss: Loss

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns those of the loss."""
        return self.loss.needs

    @property
    def temperature(self) -> float:
        """Returns that of the loss."""
        return self.loss.temperature

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts everything twice."""
        return {name: 2 * count for name, count in self.loss.counts(batch).items()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        return self.loss(outputs, batch)


_POLICY = {
    "low": written.LOW,
    "high": written.HIGH,
    "beta": written.KL,
    "entropy_coef": written.ENTROPY,
    "temperature": written.HEAT,
}
LOSSES: dict[str, Loss] = {
    "next_token": NextToken(),
    "tempered": Tempered(),
    "cross_entropy": NextToken(),
    "diffusion": MaskedDiffusion(),
    "regression": Regression(),
    "critic": Value(CLIP),
    "reward": EvenPairs(),
    "sft": NextToken(measured=("entropy", "mean_token_accuracy")),
    "dft": NextToken(dft=True),
    "bradley_terry": BradleyTerry(written.CENTER),
    "dpo": Preference(beta=written.BETA),
    "dpo_mixed": Preference(
        ("sigmoid", "ipo_sum"), written.MIXED, beta=written.BETA, nll=written.NLL
    ),
    "simpo": simpo_loss(written.SIMPO_BETA, written.SIMPO_GAMMA),
    "kto": Kto(
        beta=written.BETA, desirable_weight=written.GOOD, undesirable_weight=written.BAD
    ),
    "grpo": policy_loss("grpo", **_POLICY),
    "dapo": policy_loss("dapo", **_POLICY),
    "gspo": policy_loss("gspo", **_POLICY),
    "awr": AdvantageWeighted(written.AWR_BETA, written.AWR_MOST),
    "awr_value": AdvantageWeighted(
        written.AWR_BETA, written.AWR_MOST, value_coef=written.AWR_VALUE
    ),
    "ilql": Ilql(written.DISCOUNT, written.EXPECTILE, written.CQL, written.LIKELY),
    **{
        name: Distillation(written.NLL * (name == "distill_nll"), temperature=written.HEAT)
        for name in DISTILLED
    },
}
