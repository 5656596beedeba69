"""Reinforcement learning and demonstrations in one loss: CHORD (Zhang et al., arXiv 2508.11408),
and PPO-ptx (InstructGPT, arXiv 2203.02155).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megallm.losses.policy import Policy
from megallm.losses.reduce import token_values
from megallm.losses.terms import Terms


@dataclass(frozen=True)
class Chord:
    """`(1 - mu) policy loss + mu NLL of demonstrations`, each divided by its own count; with `keep`
    the whole policy loss + mu NLL, for any mu >= 0 (PPO-ptx).

    `demonstration` bool `[S]` says which sequences of a microbatch are demonstrations: the policy
    loss sees the others, and advantages of demonstrations are not read. With `phi` a
    demonstration's token weighs p (1 - p), detached: most where the policy is undecided, nothing
    where it knows the token or would never write it. The metric `sft_nll` is the plain NLL, in nats
    a token at the policy's temperature.
    """

    policy: Policy = field(default_factory=Policy)
    mu: float = 0.1
    phi: bool = False
    keep: bool = False

    needs: ClassVar[tuple[str, ...]] = ("log_prob", "entropy")

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= (math.inf if self.keep else 1):
            bound = "at least 0" if self.keep else "in [0, 1]"
            raise ValueError(f"mu is {self.mu}; it must be {bound}.")

    @property
    def temperature(self) -> float:
        return self.policy.temperature

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the policy's counts over sampled sequences, and the tokens of demonstrations."""
        sampled, shown = self._parts(batch)
        return self.policy.counts(sampled) | dict.fromkeys(("sft", "sft_nll"), shown.sum())

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        sampled, shown = self._parts(batch)
        terms = self.policy(outputs, sampled)
        log_prob = outputs["log_prob"].masked_fill(~shown, 0)
        nll = -log_prob
        metrics = terms.metrics | {"sft_nll": nll.detach().sum()}
        if self.phi:
            probability = log_prob.detach().exp()
            nll = nll * probability * (1 - probability)
        weight = 1.0 if self.keep else 1 - self.mu
        losses = {name: weight * x for name, x in terms.losses.items()}
        losses["sft"] = self.mu * nll.sum()
        return Terms(losses, metrics)

    @staticmethod
    def _parts(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The batch in which only sampled tokens count, and the mask of demonstrations."""
        shown = token_values("demonstration", batch)
        if shown.dtype != torch.bool:
            raise ValueError(f"demonstration has the type {shown.dtype}; it must be bool.")
        return batch | {"mask": batch["mask"] & ~shown}, batch["mask"] & shown


def mu_schedule(
    step: int, peak: float, valley: float, warmup_steps: int = 0, decay_steps: int = 200
) -> float:
    """Returns mu at `step`, counted from 0: linear from 0 to `peak`, then a cosine to `valley`.

    CHORD-mu falls from 0.9 to 0.05 over 200 steps; CHORD-phi keeps 0.1 (peak = valley).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    share = min((step - warmup_steps) / max(decay_steps, 1), 1.0)
    return valley + (peak - valley) * (1 + math.cos(math.pi * share)) / 2
