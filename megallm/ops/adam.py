"""One AdamW update of flat buffers (arXiv 1711.05101), through torch's fused functional form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class AdamRule:
    """Hyperparameters of one update; `step` counts from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rule: AdamRule) -> None:
    """Update param and both moments in place; all four are flat and of one dtype.

    p -= lr wd p, then p -= lr m_hat / (sqrt(v_hat) + eps) with bias-corrected moments.
    """
    count = torch.tensor(float(rule.step - 1), device=param.device)  # the functional form adds 1 itself
    adamw(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [count],
        fused=True, amsgrad=False, beta1=rule.betas[0], beta2=rule.betas[1],
        lr=rule.lr, weight_decay=rule.weight_decay, eps=rule.eps, maximize=False,
    )  # fmt: skip
