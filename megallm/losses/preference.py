"""Losses of preferences between answers: DPO and its kin on pairs, KTO on single answers.

The sequences of a microbatch (rows, or documents of `cu_seqlens`) are, in order, a chosen answer,
its rejected one, the next chosen one, and so on: a pair never leaves its microbatch. A pair without
any counted token is padding and counts 0. Log-probs are sums over the counted tokens.

A batch holds `ref_log_probs`, those of the reference, one number a sequence `[S]` or one a token
`[B, T]`; and may hold `margin` `[S]`: the chosen answer's less the rejected one's is what their
scores should differ by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.losses.reduce import (
    check_mode,
    divisor,
    per_sequence,
    per_token,
    sequence_sum,
    tokens_per_sequence,
    total,
)
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class Pairs:
    """The P pairs of one microbatch; `[P, 2]` holds the chosen answer and the rejected one.

    `policy` and `reference` are log-probs, or their means over the tokens where the loss is
    length-normalised; the reference is 0 for a loss without one. `tokens` counts the answers'
    tokens, `margin` `[P]` is what beta times the gap should exceed, `shift` `[P]` the reference
    point of bco.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    margin: Tensor
    shift: Tensor

    @property
    def scores(self) -> Tensor:
        """Log-ratios `[P, 2]` of policy and reference."""
        return self.policy - self.reference

    @property
    def gap(self) -> Tensor:
        """The chosen log-ratio less the rejected one, `[P]`."""
        chosen, rejected = self.scores.unbind(-1)
        return chosen - rejected

    def means(self) -> Pairs:
        """Returns the same pairs with the means over the tokens instead of the sums."""
        return replace(
            self,
            policy=self.policy / self.tokens,
            reference=self.reference / self.tokens,
            tokens=torch.ones_like(self.tokens),
        )

    def select(self, wanted: Tensor) -> Pairs:
        """Returns the pairs where `wanted` bool `[P]` is True."""
        return Pairs(
            self.policy[wanted],
            self.reference[wanted],
            self.tokens[wanted],
            self.margin[wanted],
            self.shift[wanted],
        )


# One function a kind: pairs and the options of the loss -> the loss [P] of each pair.


def _logit(pairs: Pairs, loss: Preference) -> Tensor:
    return loss.beta * pairs.gap - pairs.margin


def sigmoid(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes DPO (Rafailov et al., arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(_logit(pairs, loss))


def sigmoid_norm(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes DPO on log-ratios per token (Tulu 3, arXiv 2411.15124)."""
    return sigmoid(pairs.means(), loss)


def cdpo(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes conservative DPO: a share `label_smoothing` of the labels is flipped (Mitchell,
    2023).
    """
    logit, flipped = _logit(pairs, loss), loss.label_smoothing
    return -(1 - flipped) * F.logsigmoid(logit) - flipped * F.logsigmoid(-logit)


def robust(pairs: Pairs, loss: Preference) -> Tensor:
    """Returns the unbiased form of cdpo (Chowdhury et al., arXiv 2403.00409)."""
    logit, flipped = _logit(pairs, loss), loss.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(logit) + flipped * F.logsigmoid(-logit)
    return clean / (1 - 2 * flipped)


def hinge(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes SLiC (Zhao et al., arXiv 2305.10425), as in RSO (arXiv 2309.06657)."""
    return torch.relu(1 - _logit(pairs, loss))


def ipo_sum(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes IPO as its paper states it, on sums over the tokens (arXiv 2310.12036, equation 17).
    """
    return (pairs.gap - 1 / (2 * loss.beta)).square()


def ipo(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes IPO on log-ratios per token, as TRL has it after asking the authors."""
    return ipo_sum(pairs.means(), loss)


def exo_pair(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes EXO for two answers (Ji et al., arXiv 2402.00856, equation 16)."""
    logit = _logit(pairs, loss)
    log_won, log_lost = F.logsigmoid(logit), F.logsigmoid(-logit)
    win, lose = math.log1p(-loss.label_smoothing), math.log(loss.label_smoothing)
    return log_won.exp() * (log_won - win) + log_lost.exp() * (log_lost - lose)


def nca_pair(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes NCA (Chen et al., arXiv 2402.05369)."""
    chosen, rejected = (loss.beta * pairs.scores).unbind(-1)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes BCO (Jung et al., arXiv 2404.04656). The paper subtracts a running mean of the
    rewards: that couples batches, so it is data, `reference_point` `[S]` in units of beta x
    log-ratio; without it 0, as in TRL.
    """
    chosen, rejected = (loss.beta * pairs.scores - pairs.shift[:, None]).unbind(-1)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes SPPO with the winner's probability 1 (Wu et al., arXiv 2405.00675)."""
    chosen, rejected = pairs.scores.unbind(-1)
    half = 0.5 / loss.beta
    return (chosen - half).square() + (rejected + half).square()


def aot(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes alignment by optimal transport (Melnyk et al., arXiv 2406.05882): the sorted gaps of
    the policy against the sorted gaps of the reference, within a microbatch.
    """
    (chosen, rejected), (ref_chosen, ref_rejected) = pairs.policy.T, pairs.reference.T
    gap = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    return _smoothed(loss.beta * gap, loss)


def aot_unpaired(pairs: Pairs, loss: Preference) -> Tensor:
    """Returns the same with the sorted log-ratios of the chosen answers against those of the
    rejected.
    """
    chosen, rejected = pairs.scores.unbind(-1)
    return _smoothed(loss.beta * (chosen.sort().values - rejected.sort().values), loss)


def _smoothed(logit: Tensor, loss: Preference) -> Tensor:
    flipped = loss.label_smoothing
    return -(1 - flipped) * F.logsigmoid(logit) - flipped * F.logsigmoid(-logit)


def apo_zero(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes APO for chosen answers that are better than the model's (arXiv 2408.06266, equation
    7).
    """
    chosen, rejected = (loss.beta * pairs.scores).unbind(-1)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes APO for chosen answers that are worse than the model's (arXiv 2408.06266, equation
    8).
    """
    chosen = loss.beta * pairs.scores[:, 0]
    return torch.sigmoid(chosen) + torch.sigmoid(-loss.beta * pairs.gap)


def discopop(pairs: Pairs, loss: Preference) -> Tensor:
    """Computes DiscoPOP, the loss that was found by search (Lu et al., arXiv 2406.08414, equation
    5).
    """
    logit = _logit(pairs, loss)
    share = torch.sigmoid(logit / loss.discopop_tau)
    return -F.logsigmoid(logit) * (1 - share) + torch.exp(-logit) * share


def orpo(pairs: Pairs, loss: Preference) -> Tensor:
    """Returns the odds ratio of the mean probability of a token (Hong et al., arXiv 2403.07691)."""
    # A probability of 1 has infinite odds: -1e-7 is what float32 still tells from it.
    scores = pairs.means().policy.clamp(max=-1e-7)
    chosen, rejected = (scores - (-torch.expm1(scores)).log()).unbind(-1)
    return -loss.beta * F.logsigmoid(chosen - rejected)


PairLoss = Callable[[Pairs, "Preference"], Tensor]
KINDS: dict[str, PairLoss] = {
    kind.__name__: kind
    for kind in (
        sigmoid, sigmoid_norm, cdpo, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair,
        sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, orpo,
    )
}  # fmt: skip
SMOOTHED = {"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"}
WITH_MARGIN = {"sigmoid", "sigmoid_norm", "cdpo", "robust", "hinge", "exo_pair", "discopop"}
# Kinds that sort over the pairs: padded ones must not take a place.
SORTED = {"aot", "aot_unpaired"}


@dataclass(frozen=True)
class Preference:
    """The loss of pairs: `kind` is a key of `KINDS`, TRL's names, or several with their `weights`.

    `beta` scales the log-ratios (tau of IPO). `label_smoothing` is the share of flipped labels,
    `gamma` a margin for every pair (SimPO). Without a reference (`reference_free`) log-ratios are
    log-probs. `length_normalized` takes means over the tokens instead of sums. `nll` weighs the
    negative log-likelihood of the chosen answers beside the loss (rpo_alpha, cpo_alpha), averaged
    by `nll_aggregate`; it keeps DPO from lowering the chosen answers too. It is over all counted
    tokens: where these include the prompt's, as in ORPO, `answer_mask` `[B, T]` of the batch says
    which of them are the answers that are compared.

    aot and aot_unpaired couple the pairs of a microbatch and depend on its size, as in TRL.
    """

    kind: str | tuple[str, ...] = "sigmoid"
    weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    gamma: float = 0.0
    reference_free: bool = False
    length_normalized: bool = False
    nll: float = 0.0
    nll_aggregate: str = "token_mean"
    temperature: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"the preference loss {unknown} is none of {', '.join(KINDS)}.")
        if len(self.weights) != len(self.kinds):
            raise ValueError(
                f"{len(self.kinds)} preference losses need as many weights, and got {self.weights}."
            )
        self._check_options()

    def _check_options(self) -> None:
        kinds = set(self.kinds)
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5).")
        if self.label_smoothing and not kinds & SMOOTHED:
            raise ValueError(
                f"label_smoothing has no effect on {', '.join(sorted(kinds))}; the losses that use "
                f"it are {', '.join(sorted(SMOOTHED))}."
            )
        if "exo_pair" in kinds and not self.label_smoothing:
            raise ValueError("exo_pair needs a label_smoothing above 0, such as 0.001.")
        if self.gamma and not kinds & WITH_MARGIN:
            raise ValueError(
                f"gamma has no effect on {', '.join(sorted(kinds))}; the losses with a margin are "
                f"{', '.join(sorted(WITH_MARGIN))}."
            )
        if "orpo" in kinds and not self.reference_free:
            raise ValueError("orpo has no reference: set reference_free.")
        check_mode(self.nll_aggregate)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the pairs of one microbatch, and what divides the likelihood of the chosen
        answers. Errors: ValueError for an odd number of sequences.
        """
        counts = {"loss": pair_counted(_answers(batch)).sum()}
        if self.nll:
            counts["nll"] = divisor(_chosen(batch), self.nll_aggregate)
        return counts

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        log_prob = outputs["log_prob"]
        answers = _answers(batch)
        pairs, counted = self._pairs(log_prob, answers), pair_counted(answers)
        losses = {"loss": self._sum(pairs, counted)}
        if self.nll:
            losses["nll"] = -self.nll * total(log_prob, _chosen(batch), self.nll_aggregate)
        return Terms(losses, self._metrics(pairs, counted))

    def _pairs(self, log_prob: Tensor, batch: dict[str, Tensor]) -> Pairs:
        policy = in_pairs(per_sequence(log_prob.masked_fill(~batch["mask"], 0), batch))
        zero = torch.zeros_like(policy)
        given = {
            name: in_pairs(batch[name]) for name in ("margin", "reference_point") if name in batch
        }
        if "margin" in given and not set(self.kinds) & WITH_MARGIN:
            raise ValueError(
                f"the batch has margins, which {', '.join(self.kinds)} cannot use; the losses with "
                f"a margin are {', '.join(sorted(WITH_MARGIN))}."
            )
        margin, reference = given.get("margin", zero), zero
        if not self.reference_free:
            reference = in_pairs(sequence_sum("ref_log_probs", batch))
        pairs = Pairs(
            policy=policy,
            reference=reference,
            tokens=in_pairs(tokens_per_sequence(batch)).clamp(min=1).to(policy.dtype),
            margin=margin[:, 0] - margin[:, 1] + self.gamma,
            shift=given.get("reference_point", zero)[:, 0],
        )
        return pairs.means() if self.length_normalized else pairs

    def _sum(self, pairs: Pairs, counted: Tensor) -> Tensor:
        loss = pairs.policy.new_zeros(())
        for kind, weight in zip(self.kinds, self.weights, strict=True):
            if kind in SORTED:
                loss = loss + weight * KINDS[kind](pairs.select(counted), self).sum()
            else:
                each = KINDS[kind](pairs, self).masked_fill(~counted, 0)
                loss = loss + weight * each.sum()
        return loss

    def _metrics(self, pairs: Pairs, counted: Tensor) -> dict[str, Tensor]:
        """TRL's metrics, each divided by the number of pairs."""
        chosen, rejected = (self.beta * pairs.scores.detach()).unbind(-1)
        each = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": pairs.policy[:, 0].detach(),
            "logps/rejected": pairs.policy[:, 1].detach(),
        }
        return {name: x.masked_fill(~counted, 0).sum() for name, x in each.items()}

    def first_loss(self) -> float | None:
        """Returns the loss per pair while the policy still equals the reference, without `nll` and
        without margins of the batch: ln 2 for sigmoid, 1 / (4 beta^2) for ipo, 1 for hinge. None
        without a reference.
        """
        if self.reference_free:
            return None
        zero = torch.zeros(1, 2, dtype=torch.float64)
        pairs = Pairs(zero, zero, torch.ones_like(zero), zero[:, 0] + self.gamma, zero[:, 0])
        return float(self._sum(pairs, torch.ones(1, dtype=torch.bool)))


def orpo_loss(beta: float = 0.1, **options: float) -> Preference:
    """Returns ORPO: the likelihood of the chosen answers and `beta` times the odds ratio. The
    paper's likelihood, like TRL's, includes the prompt: see `answer_mask` of Preference.
    """
    return Preference(
        "orpo", beta=beta, nll=1.0, reference_free=True, length_normalized=True, **options
    )


def simpo_loss(beta: float = 2.0, gamma: float = 1.0, **options: float) -> Preference:
    """Returns SimPO (Meng et al., arXiv 2405.14734); TRL's `simpo_gamma` is `gamma`."""
    return Preference(
        beta=beta, gamma=gamma, reference_free=True, length_normalized=True, **options
    )


def cpo_loss(beta: float = 0.1, alpha: float = 1.0, **options: float) -> Preference:
    """Returns CPO (Xu et al., arXiv 2401.08417); `alpha` weighs the chosen answers' likelihood."""
    return Preference(beta=beta, nll=alpha, reference_free=True, **options)


def in_pairs(x: Tensor) -> Tensor:
    """Returns `[P, 2]` of one number a sequence `[S]`; a last sequence that is left over is
    padding.
    """
    return x[: len(x) // 2 * 2].view(-1, 2)


def pair_counted(batch: dict[str, Tensor]) -> Tensor:
    """Returns True `[P]` for pairs with a counted token. Errors: ValueError for an odd number of
    sequences whose last one is no padding.
    """
    tokens = tokens_per_sequence(batch)
    if len(tokens) % 2 and tokens[-1] > 0:
        raise ValueError(
            f"a microbatch has {len(tokens)} sequences; a chosen and a rejected one belong into "
            "the same microbatch, so their number must be even."
        )
    return (in_pairs(tokens) > 0).any(-1)


def _chosen(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in which only the chosen sequences count."""
    even = torch.arange(len(tokens_per_sequence(batch)), device=batch["mask"].device) % 2 == 0
    return batch | {"mask": batch["mask"] & per_token(even, batch)}


def _answers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in which only the answers that are compared count."""
    if "answer_mask" not in batch:
        return batch
    return batch | {"mask": batch["mask"] & batch["answer_mask"]}


@dataclass(frozen=True)
class Kto:
    """The loss of single answers, each desirable or not (Ethayarajh et al., arXiv 2402.01306).

    With `log_ratio` the sum over an answer of policy less reference, the loss is `desirable_weight
    (1 - sigmoid(beta (log_ratio - z0)))`, or `undesirable_weight (1 - sigmoid(beta (z0 -
    log_ratio)))`; divided by the number of answers. The batch holds `ref_log_probs` `[S]` or `[B,
    T]`, `desirable` bool `[S]` and z0 as `reference_point` `[S]`, the same for every answer of the
    global batch, from a forward-only pass: see `reference_point`. The kind `apo_zero_unpaired`
    (arXiv 2408.06266) has no z0.
    """

    kind: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    temperature: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    def __post_init__(self) -> None:
        if self.kind not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f"the loss {self.kind!r} is none of kto, apo_zero_unpaired.")
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answers of one microbatch with a counted token; for the metrics, those of each kind."""
        counted, desirable = tokens_per_sequence(batch) > 0, batch["desirable"]
        good, bad = (counted & desirable).sum(), (counted & ~desirable).sum()
        sides = {"chosen": good, "rejected": bad}
        return {"loss": counted.sum()} | {
            f"{name}/{side}": n for name in ("rewards", "logps") for side, n in sides.items()
        }

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        policy = per_sequence(outputs["log_prob"].masked_fill(~batch["mask"], 0), batch)
        log_ratio = policy - sequence_sum("ref_log_probs", batch)
        counted, desirable = tokens_per_sequence(batch) > 0, batch["desirable"]
        point = batch["reference_point"].detach() if self.kind == "kto" else 0.0
        good = desirable.to(policy.dtype)
        weight = good * self.desirable_weight + (1 - good) * self.undesirable_weight
        loss = weight * torch.sigmoid(-self.beta * (2 * good - 1) * (log_ratio - point))
        metrics = {}
        for side, mine in (("chosen", counted & desirable), ("rejected", counted & ~desirable)):
            metrics[f"rewards/{side}"] = self.beta * (log_ratio.detach() * mine).sum()
            metrics[f"logps/{side}"] = (policy.detach() * mine).sum()
        return Terms({"loss": (loss * counted).sum()}, metrics)

    def first_loss(self, desirable_share: float = 0.5) -> float:
        """Returns the loss per answer while the policy equals the reference and z0 is 0: half the
        mean weight.
        """
        good = self.desirable_weight * desirable_share
        return (good + self.undesirable_weight * (1 - desirable_share)) / 2


def reference_point(policy: Tensor, reference: Tensor) -> Tensor:
    """Returns KTO's z0 in nats, detached: the mean log-ratio of *mismatched* answers, at least 0.

    `policy` and `reference` `[N]` are the log-probs of the answers y_j given the prompts of other
    answers, over the whole global batch: a mean of one rank's share would depend on the layout.
    """
    return (policy - reference).detach().mean().clamp(min=0)


@dataclass(frozen=True)
class LogRatio:
    """The mean over sequences of policy less reference: of mismatched answers it is what
    `reference_point` clamps at 0. For `Engine.evaluate`, which sums over all data ranks.
    """

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sequences of one microbatch with a counted token."""
        return {"log_ratio": (tokens_per_sequence(batch) > 0).sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        policy = per_sequence(outputs["log_prob"].masked_fill(~batch["mask"], 0), batch)
        return Terms({"log_ratio": (policy - sequence_sum("ref_log_probs", batch)).sum()})


def with_prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch in which the tokens of prompts count too, and `answer_mask` says which are
    the answers': for ORPO's likelihood. `prompt_tokens` `[S]` is the length of each prompt.
    """
    asked = batch["positions"] < per_token(batch["prompt_tokens"], batch) - 1
    counted = per_token(tokens_per_sequence(batch) > 0, batch)
    return batch | {"mask": batch["mask"] | (asked & counted), "answer_mask": batch["mask"]}
