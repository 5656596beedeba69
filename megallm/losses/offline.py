"""Offline reinforcement learning on fixed answers: advantage-weighted regression and ILQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megallm.losses.reduce import (
    check_mode,
    divisor,
    per_token,
    token_values,
    tokens_per_sequence,
    total,
)
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class AdvantageWeighted:
    """`-min(exp(advantage / beta), max_weight) log_prob` over the counted tokens (AWR, Peng et al.,
    arXiv 1910.00177); `advantages` are `[S]` or `[B, T]`.
    """

    beta: float = 1.0
    max_weight: float = 20.0
    aggregate: str = "token_mean"
    temperature: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    def __post_init__(self) -> None:
        check_mode(self.aggregate)
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens or sequences of one microbatch, as `aggregate` has it."""
        return {"loss": divisor(batch, self.aggregate), "weight": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        log_prob = outputs["log_prob"]
        advantage = token_values("advantages", batch).to(log_prob.dtype)
        weight = (advantage / self.beta).exp().clamp(max=self.max_weight)
        loss = total(-weight * log_prob, batch, self.aggregate)
        return Terms({"loss": loss}, {"weight": total(weight, batch, "token_mean")})


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
    """

    gamma: float = 0.99
    tau: float = 0.7
    alpha: float = 0.1

    needs: ClassVar[tuple[str, ...]] = ("value", "q1", "q2", "q1_log_prob", "q2_log_prob")
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens of one microbatch that the mask lets count."""
        return dict.fromkeys(("q", "v", "cql"), batch["mask"].sum())

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
        return Terms({name: total(x, batch, "token_mean") for name, x in terms.items()})


def next_counted(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns `[B, T]`: `x` at the next counted token of the same sequence, 0 where there is
    none.
    """
    mask = batch["mask"]
    rows, tokens = mask.shape
    places = torch.arange(tokens, device=mask.device).expand(rows, tokens)
    if "cu_seqlens" in batch:
        numbers = torch.arange(len(tokens_per_sequence(batch)), device=mask.device)
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


def perturbed_log_probs(log_probs: Tensor, q: Tensor, value: Tensor, beta: float) -> Tensor:
    """Returns the log-probs `[..., V]` that ILQL decodes with, `log pi + beta (Q - V)` normalised;
    `log_probs` and `q` are `[..., V]`, `value` `[...]`.
    """
    return torch.log_softmax(log_probs + beta * (q - value[..., None]), -1)
