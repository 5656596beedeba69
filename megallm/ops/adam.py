"""One Adam or AdamW update of flat buffers (arXiv 1412.6980, 1711.05101), through torch's fused
functional form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from megallm.ops.kernels import KERNELS
from megallm.ops.precision import wide


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
    adamw_lists_([state], rule, count, skip)


def adamw_lists_(
    states: Sequence[FlatState],
    rule: AdamRule,
    count: Tensor,
    skip: Tensor,
    clip: Tensor | None = None,
    copies: Sequence[Tensor] = (),
) -> None:
    """Apply `adamw_` to many buffers at once; gradients count `clip` (a float scalar tensor) times,
    and `copies` in a narrow dtype follow the parameters: one pass over memory on a GPU.
    """
    params, grads, averages, squares = (list(each) for each in zip(*states, strict=True))
    kernels = KERNELS.of(params[0], *params, *averages, *squares)
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in copies)
    if kernels is not None and params[0].dtype == torch.float32 and narrow:
        scalars = [x if x is None else wide(x) for x in (count, skip, clip)]
        numbers = rule.lr, *rule.betas, rule.eps, rule.weight_decay, rule.decoupled
        kernels.adamw(params, grads, averages, squares, list(copies), *scalars, *numbers)
        return
    if clip is not None:
        grads = [grad * clip for grad in grads]
    adam(
        params,
        [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)],
        averages,
        squares,
        [],
        [count.clone() for _ in params],  # the functional form counts on it
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
    for copy, param in zip(copies, params, strict=False):
        copy.copy_(param)
