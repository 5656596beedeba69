"""Distillation: divergences of a student from a teacher, token by token.

The divergence over the whole vocabulary is an output of the head, which holds the logits; here is
its form over log-probs of K classes, such as the teacher's stored top k, and the loss that sums it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megallm.losses.reduce import check_mode, divisor, total
from megallm.losses.terms import Terms


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Returns the generalised Jensen-Shannon divergence `[...]` of log-probs `[..., K]` (GKD,
    Agarwal et al., arXiv 2306.13649, equation 1).

    With m = beta p_teacher + (1 - beta) p_student it is `beta KL(teacher || m) + (1 - beta)
    KL(student || m)`; beta 0 stands for the forward KL(teacher || student), beta 1 for the reverse
    one. Errors: ValueError for beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be in [0, 1].")
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Returns `sum p (log p - log q)` over the last dim of two log-probs; a class with p = 0 adds
    0.
    """
    impossible = p == -math.inf
    difference = (p.masked_fill(impossible, 0) - q.masked_fill(impossible, 0)) * p.exp()
    return difference.sum(-1)


def with_tail(log_probs: Tensor) -> Tensor:
    """Returns `[..., K + 1]`: the log-probs of K classes, and that of all others together.

    A stored top k of the teacher leaves out a rest; as one class it keeps the student from putting
    its mass there. The rest is at least 1e-7, so that its logarithm has a gradient.
    """
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_probs, rest.log()], dim=-1)


def reverse_kl_advantages(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Returns `teacher - student` `[B, T]`, detached, 0 where the mask is: the advantage of a token
    in on-policy distillation, whose expectation under the student is the negative reverse KL.
    """
    return (teacher - student).detach().masked_fill(~mask, 0)


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
