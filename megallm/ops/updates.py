"""Updates of flat buffers element by element: SGD, AdaGrad, RMSProp, Lion. All in place.

`skip` is a float scalar tensor on the buffers' device: with 1.0 instead of 0.0 nothing changes,
whatever is in the gradient, and the host never reads it. Buffers of one call have one length, dtype
and device; state starts at zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class Flat(NamedTuple):
    """A stretch of parameters with its gradient; the gradient is left as it is."""

    param: Tensor
    grad: Tensor


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def unless(skip: Tensor, grad: Tensor) -> Tensor:
    """Returns a copy of the gradient, or zeros when the update is skipped: an infinity times
    nothing would not be nothing.

    Done on bits, in one vectorised pass; a select with a scalar condition takes six times as long
    on a CPU.
    """
    bits = _BITS[grad.element_size()]
    every = -(1 - skip).to(bits)  # all bits, or none
    return (grad.view(bits) & every).view(grad.dtype)


def keeping(skip: Tensor, like: Tensor) -> Tensor:
    """Returns 1 as a scalar of the buffers' dtype, or 0 when the update is skipped."""
    return 1 - skip.to(like.dtype)


class SgdRule(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float = 0.0
    nesterov: bool = False


def sgd_(flat: Flat, buffer: Tensor | None, rule: SgdRule, skip: Tensor) -> None:
    """Applies g += wd p; b = momentum b + g; p -= lr b, or lr (g + momentum b) with Nesterov
    (Sutskever et al. 2013).

    `buffer` is None without momentum: p -= lr g. Through torch's fused functional form.
    """
    sgd(
        [flat.param],
        [flat.grad],
        [buffer],
        fused=True,
        found_inf=skip,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=rule.lr,
        dampening=0.0,
        nesterov=rule.nesterov,
        maximize=False,
    )


class ScaleRule(NamedTuple):
    """AdaGrad and RMSProp: what divides the gradient, and what becomes of it. `smoothing` None: a
    sum (AdaGrad).
    """

    lr: float
    weight_decay: float
    eps: float
    smoothing: float | None = None
    momentum: float = 0.0


def _decayed(flat: Flat, rule: ScaleRule, keep: Tensor, skip: Tensor) -> Tensor:
    """A copy of g + wd p, or zeros."""
    grad = unless(skip, flat.grad)
    return grad.addcmul_(flat.param, keep, value=rule.weight_decay) if rule.weight_decay else grad


def adagrad_(flat: Flat, squares: Tensor, rule: ScaleRule, skip: Tensor) -> None:
    """Applies g += wd p; s += g^2; p -= lr g / (sqrt(s) + eps) (Duchi et al. 2011)."""
    grad = _decayed(flat, rule, keeping(skip, flat.param), skip)
    squares.addcmul_(grad, grad)
    flat.param.addcdiv_(grad, squares.sqrt().add_(rule.eps), value=-rule.lr)


def rmsprop_(
    flat: Flat, squares: Tensor, buffer: Tensor | None, rule: ScaleRule, skip: Tensor
) -> None:
    """Applies g += wd p; s = a s + (1 - a) g^2; p -= lr g / (sqrt(s) + eps) (Hinton 2012).

    With a `buffer` the quotient q goes through momentum first: b = momentum b + q; p -= lr b.
    """
    keep = keeping(skip, flat.param)
    grad = _decayed(flat, rule, keep, skip)
    squares.lerp_(grad.square(), (1 - rule.smoothing) * keep)
    step = grad.div_(squares.sqrt().add_(rule.eps))
    if buffer is not None:
        step = buffer.lerp_(buffer.mul(rule.momentum).add_(step), keep) * keep
    flat.param.add_(step, alpha=-rule.lr)


class LionRule(NamedTuple):
    lr: float
    weight_decay: float
    betas: tuple[float, float]


def lion_(flat: Flat, exp_avg: Tensor, rule: LionRule, skip: Tensor) -> None:
    """Applies p -= lr (sign(b1 m + (1 - b1) g) + wd p); m = b2 m + (1 - b2) g (arXiv 2302.06675,
    algorithm 2).
    """
    grad, keep = unless(skip, flat.grad), keeping(skip, flat.param)
    direction = (
        exp_avg.lerp(grad, 1 - rule.betas[0]).sign_().add_(flat.param, alpha=rule.weight_decay)
    )
    flat.param.addcmul_(direction, keep, value=-rule.lr)
    exp_avg.lerp_(grad, (1 - rule.betas[1]) * keep)
