"""Divergences of a student's distribution from a teacher's, by their log-probabilities.

Over a whole vocabulary there is a sum for each piece of it, which whoever knows the pieces adds up
(`parallel.divergence`); over a few classes, such as a teacher's stored top k, ordinary autograd.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tail = Literal["rest", "renormalize"]


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Returns the generalised Jensen-Shannon divergence `[...]` of log-probs `[..., K]` (GKD,
    Agarwal et al., arXiv 2306.13649, equation 1).

    With m = beta p_teacher + (1 - beta) p_student it is `beta KL(teacher || m) + (1 - beta)
    KL(student || m)`; beta 0 stands for the forward KL(teacher || student), beta 1 for the reverse
    one. Errors: ValueError for beta outside [0, 1].
    """
    check_beta(beta)
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    mixture = _mixture(student, teacher, beta)
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def check_beta(beta: float) -> None:
    """Errors: ValueError for beta outside [0, 1]."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be in [0, 1].")


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))


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


def top_k_divergence(student: Tensor, teacher: Tensor, beta: float, tail: Tail) -> Tensor:
    """Returns `generalized_jsd` `[...]` of the log-probs `[..., K]` of the teacher's likeliest
    classes: with all others as one further class (`rest`), or of both distributions given that one
    of the K is drawn (`renormalize`).
    """
    if tail == "renormalize":
        both = (x - x.logsumexp(-1, keepdim=True) for x in (student, teacher))
    else:
        both = (with_tail(x) for x in (student, teacher))
    return generalized_jsd(*both, beta)


class PieceSums(NamedTuple):
    """What a piece of the vocabulary adds to each token's numbers, wide `[T]`: the divergence, and
    the mean of its slope under the student (see `piece_gradient_`)."""

    value: Tensor
    slope: Tensor


def piece_sums(student: Tensor, teacher: Tensor, beta: float) -> PieceSums:
    """Returns the sums over a piece of the vocabulary of log-probs `[T, V]`, normalised over all of
    it.
    """
    if beta == 0:
        value = (teacher.exp() * (teacher - student)).sum(-1)
        return PieceSums(value, torch.zeros_like(value))
    if beta == 1:
        value = (student.exp() * (student - teacher)).sum(-1)
        return PieceSums(value, value)
    mixture = _mixture(student, teacher, beta)
    of_student = (student.exp() * (student - mixture)).sum(-1) * (1 - beta)
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1) * beta
    return PieceSums(of_teacher + of_student, of_student)


def piece_gradient_(student: Tensor, teacher: Tensor, beta: float, slope: Tensor) -> Tensor:
    """Returns the gradient `[T, V]` of each token's divergence with respect to the student's
    logits, in the place of its log-probs.

    For q = softmax(z) and teacher p it is `q - p` of the forward KL; otherwise `q (a - sum q a)`
    with a = log(q / p) of the reverse one, and (1 - beta) log(q / m) of a mixture m. `slope` `[T]`
    is `sum q a` over the whole vocabulary.
    """
    if beta == 0:
        return student.exp_().sub_(teacher.exp())
    other = teacher if beta == 1 else _mixture(student, teacher, beta)
    rise = (student - other).mul_(1 if beta == 1 else 1 - beta).sub_(slope[:, None])
    return student.exp_().mul_(rise)
