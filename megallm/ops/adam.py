"""One AdamW update of flat buffers (arXiv 1711.05101), through torch's fused functional form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim.adamw import adamw


class AdamRule(NamedTuple):
    """Hyperparameters of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class FlatState(NamedTuple):
    """Flat buffers of one length, dtype and device."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw_(state: FlatState, rule: AdamRule, count: Tensor, skip: Tensor) -> None:
    """Update param and both moments in place, after `count` (a float scalar tensor) earlier updates.

    p -= lr wd p, then p -= lr m_hat / (sqrt(v_hat) + eps) with bias-corrected moments. With `skip` 1.0 instead
    of 0.0 nothing changes; neither tensor is read by the host.
    """
    steps = count.clone()  # the functional form counts on it
    adamw(
        [state.param], [state.grad], [state.exp_avg], [state.exp_avg_sq], [], [steps],
        fused=True, found_inf=skip, amsgrad=False, beta1=rule.betas[0], beta2=rule.betas[1],
        lr=rule.lr, weight_decay=rule.weight_decay, eps=rule.eps, maximize=False,
    )  # fmt: skip
