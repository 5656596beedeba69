"""One Adam or AdamW update of flat buffers (arXiv 1412.6980, 1711.05101), through torch's fused
functional form.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim.adam import adam


class AdamRule(NamedTuple):
    """Hyperparameters of one update; `decoupled` decay acts on the weight (AdamW), else it joins
    the gradient.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool = True


class FlatState(NamedTuple):
    """Flat buffers of one length, dtype and device."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw_(state: FlatState, rule: AdamRule, count: Tensor, skip: Tensor) -> None:
    """Update param and both moments in place, after `count` (a float scalar tensor) earlier
    updates.

    p -= lr wd p, then p -= lr m_hat / (sqrt(v_hat) + eps) with bias-corrected moments; without
    `decoupled` wd p is added to the gradient instead. With `skip` 1.0 instead of 0.0 nothing
    changes; neither tensor is read by the host.
    """
    steps = count.clone()  # the functional form counts on it
    adam(
        [state.param],
        [state.grad],
        [state.exp_avg],
        [state.exp_avg_sq],
        [],
        [steps],
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        maximize=False,
        decoupled_weight_decay=rule.decoupled,
    )
