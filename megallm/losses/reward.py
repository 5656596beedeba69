"""Bradley-Terry losses of a reward model, with margins, centring and several answers a prompt.

Each sequence of a microbatch (a row, or a document of `cu_seqlens`) has one counted token, its last
one, whose value is its score. A sequence without one is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.losses.preference import in_pairs, pair_counted
from megallm.losses.reduce import per_sequence, tokens_per_sequence
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class BradleyTerry:
    """`-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2`, over pairs.

    The sequences are a chosen answer, its rejected one, the next chosen one, and so on. `margin`
    `[S]` of the batch is optional, the chosen one's less the rejected one's (Llama 2, arXiv
    2307.09288); `center` is TRL's `center_rewards_coefficient` (Eisenstein et al., arXiv
    2312.09244).
    """

    center: float = 0.0

    needs: ClassVar[tuple[str, ...]] = ("value",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the pairs of one microbatch. Errors: ValueError for a sequence with two counted
        tokens, and for a pair of which only one sequence has one.
        """
        scored = _scored(batch)
        counted = pair_counted(batch)
        if not torch.equal(in_pairs(scored).all(-1), counted):
            raise ValueError(
                "a pair has a score for one of its sequences only; mask must be True at the last "
                "token of the chosen and of the rejected sequence."
            )
        return {"loss": counted.sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        counted = pair_counted(batch)
        chosen, rejected = in_pairs(_scores(outputs, batch)).unbind(-1)
        margin = 0.0
        if "margin" in batch:
            high, low = in_pairs(batch["margin"]).unbind(-1)
            margin = high - low
        gap = chosen - rejected
        loss = -F.logsigmoid(gap - margin) + self.center * (chosen + rejected).square()
        gap = gap.detach()
        metrics = {
            "accuracy": ((gap > 0) * counted).sum().to(gap.dtype),
            "margin": (gap * counted).sum(),
        }
        metrics["mean_reward"] = ((chosen + rejected).detach() / 2 * counted).sum()
        extremes = _extremes(_scores(outputs, batch), _scored(batch))
        return Terms({"loss": (loss * counted).sum()}, metrics, extremes)


@dataclass(frozen=True)
class RankedReward:
    """All pairs of the K ranked answers of a prompt, each weighing 1 / C(K, 2) (InstructGPT, arXiv
    2203.02155, equation 1); divided by the number of prompts.

    `prompt` int `[S]` names the prompt of each sequence and `rank` `[S]` its place, 0 the best;
    answers of equal rank are no pair. All answers of a prompt stand in one microbatch.
    """

    center: float = 0.0

    needs: ClassVar[tuple[str, ...]] = ("value",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the prompts of one microbatch with at least one pair, as the sum of the pairs'
        weights.
        """
        _scored(batch)
        weight = self._weights(batch)
        pairs, scored = (weight > 0).sum(), _scored(batch).sum()
        metrics = {"accuracy": pairs, "margin": pairs, "mean_reward": scored}
        return {"loss": weight.sum().round()} | metrics

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        scores = _scores(outputs, batch)
        weight = self._weights(batch).to(scores.dtype)
        gap = scores[:, None] - scores[None]
        each = -F.logsigmoid(gap) + self.center * (scores[:, None] + scores[None]).square()
        apart, paired, scored = gap.detach(), weight > 0, _scored(batch)
        metrics = {
            "accuracy": ((apart > 0) & paired).sum().to(scores.dtype),
            "margin": (apart * paired).sum(),
            "mean_reward": (scores.detach() * scored).sum(),
        }
        return Terms({"loss": (each * weight).sum()}, metrics, _extremes(scores, scored))

    @staticmethod
    def _weights(batch: dict[str, Tensor]) -> Tensor:
        """`[S, S]` in float64: 1 / pairs of the prompt where the row's answer beats the
        column's.
        """
        prompt, rank, scored = batch["prompt"], batch["rank"], _scored(batch)
        same = (prompt[:, None] == prompt[None]) & scored[:, None] & scored[None]
        pair = (same & (rank[:, None] < rank[None])).to(torch.float64)
        number = same.to(torch.float64) @ pair.sum(-1)
        return pair / number.clamp(min=1)[:, None]


def _scored(batch: dict[str, Tensor]) -> Tensor:
    """True `[S]` for sequences with a score. Errors: ValueError for more than one."""
    tokens = tokens_per_sequence(batch)
    if (tokens > 1).any():
        raise ValueError("a sequence has several counted tokens; a score is that of its last one.")
    return tokens == 1


def _scores(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return per_sequence(outputs["value"].masked_fill(~batch["mask"], 0), batch)


def _extremes(scores: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """The largest score of a microbatch, and the largest of the negated scores."""
    known = scores.detach()
    pairs = {"max_reward": known, "negated_min_reward": -known}
    return {name: x.masked_fill(~scored, -torch.inf).amax() for name, x in pairs.items()}
