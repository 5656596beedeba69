"""Offline reinforcement learning on fixed answers: advantage-weighted regression and ILQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megallm.losses.reduce import check_mode, divisor, per_token, token_values, total
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class AdvantageWeighted:
    """`-min(exp(advantage / beta), max_weight) log_prob` over the counted tokens (AWR, Peng et al.,
    arXiv 1910.00177); `advantages` are `[S]` or `[B, T]`.

    With `value_coef` above 0 they are `returns` (`[S]` or `[B, T]`) less the value of the state,
    which is trained beside: `value_coef / 2 (value - return)^2`, the term `value`.
    """

    beta: float = 1.0
    max_weight: float = 20.0
    aggregate: str = "token_mean"
    temperature: float = 1.0
    value_coef: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns the label's log-probability, and the value where there is one."""
        return ("log_prob", "value") if self.value_coef else ("log_prob",)

    def __post_init__(self) -> None:
        check_mode(self.aggregate)
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens or sequences of one microbatch, as `aggregate` has it."""
        tokens = batch["mask"].sum()
        found = {"loss": divisor(batch, self.aggregate), "weight": tokens}
        return found | ({"value": tokens} if self.value_coef else {})

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        log_prob, losses = outputs["log_prob"], {}
        if self.value_coef:
            away = token_values("returns", batch).to(log_prob.dtype) - outputs["value"]
            losses["value"] = total(self.value_coef / 2 * away.square(), batch, "token_mean")
            advantage = away.detach()
        else:
            advantage = token_values("advantages", batch).to(log_prob.dtype)
        weight = (advantage / self.beta).exp().clamp(max=self.max_weight)
        losses["loss"] = total(-weight * log_prob, batch, self.aggregate)
        return Terms(losses, {"weight": total(weight, batch, "token_mean")})


@dataclass(frozen=True)
class Ilql:
    """Implicit language Q-learning (Snell et al., arXiv 2206.11871): two Q heads and a V head.

    The outputs, each `[B, T]`, are `value` V before a token, `q1` and `q2` of the token that was
    taken, and `q1_log_prob`, `q2_log_prob`, the log-softmax of all Q at that token. The batch holds
    `rewards` `[B, T]` and `target_q` `[B, T]`, the smaller of two target networks. Each term is
    divided by the counted tokens:

        q    sum over both heads (Q - r - gamma V')^2, where V' is detached and of the next counted
             token of the sequence, 0 after its last one
        v    |tau - [target_q < V]| (target_q - V)^2, the expectile tau of Q
        cql  -alpha (q1_log_prob + q2_log_prob): other tokens than those taken are held down
        nll  -nll log_prob, where `nll` is above 0: the policy pi that decoding starts from

    The metrics `mean_value` and `mean_q` are those of V and of the smaller Q.
    """

    gamma: float = 0.99
    tau: float = 0.7
    alpha: float = 0.1
    nll: float = 0.0

    temperature: ClassVar[float] = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns V, the Q of the label twice, and their log-softmax; with `nll` pi's too."""
        own = ("value", "q1", "q2", "q1_log_prob", "q2_log_prob")
        return ("log_prob", *own) if self.nll else own

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens of one microbatch that the mask lets count."""
        names = ("q", "v", "cql", *(("nll",) if self.nll else ()))
        return dict.fromkeys(names, batch["mask"].sum())

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        value = outputs["value"]
        target = batch["rewards"] + self.gamma * next_counted(value.detach(), batch)
        errors = [(outputs[head] - target).square() for head in ("q1", "q2")]
        above = batch["target_q"] - value
        expectile = self.tau + (1 - 2 * self.tau) * (above < 0).to(value.dtype)
        terms = {
            "q": errors[0] + errors[1],
            "v": expectile * above.square(),
            "cql": -self.alpha * (outputs["q1_log_prob"] + outputs["q2_log_prob"]),
        }
        if self.nll:
            terms["nll"] = -self.nll * outputs["log_prob"]
        least = torch.minimum(outputs["q1"], outputs["q2"])
        told = {"mean_value": value.detach(), "mean_q": least.detach()}
        sums = (
            {name: total(x, batch, "token_mean") for name, x in found.items()}
            for found in (terms, told)
        )
        return Terms(*sums)


def next_counted(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns `[B, T]`: `x` at the next counted token of the same sequence, 0 where there is
    none.
    """
    mask = batch["mask"]
    rows, tokens = mask.shape
    places = torch.arange(tokens, device=mask.device).expand(rows, tokens)
    if "cu_seqlens" in batch:
        numbers = torch.arange(len(batch["cu_seqlens"]) - 1, device=mask.device)
        sequence = per_token(numbers, batch)
    else:
        sequence = torch.zeros_like(places)
    counted = places.masked_fill(~mask, tokens)
    # Of the places after each token the first that counts; `tokens` where there is none.
    following = torch.nn.functional.pad(counted[:, 1:], (0, 1), value=tokens)
    following = following.flip(-1).cummin(-1).values.flip(-1)
    last = following.clamp(max=tokens - 1)
    found = (following < tokens) & (sequence.gather(-1, last) == sequence)
    return x.gather(-1, last).masked_fill(~found, 0)


def at_last(name: str, batch: dict[str, Tensor]) -> Tensor:
    """Returns `[B, T]`: `batch[name]` `[S]` at the last counted token of each sequence, 0
    elsewhere: the reward of a whole answer.
    """
    given = per_token(batch[name], batch)
    more = next_counted(torch.ones_like(given), batch)
    return given.masked_fill(~batch["mask"] | (more > 0), 0)


def perturbed_log_probs(log_probs: Tensor, q: Tensor, value: Tensor, beta: float) -> Tensor:
    """Returns the log-probs `[..., V]` that ILQL decodes with, `log pi + beta (Q - V)` normalised;
    `log_probs` and `q` are `[..., V]`, `value` `[...]`.
    """
    return torch.log_softmax(log_probs + beta * (q - value[..., None]), -1)
