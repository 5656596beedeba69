"""Weights that correct for samples of another policy than the one whose log-probs are trained.

`old_log_probs` are the trainer's at the start of the step, `rollout_log_probs` those that the
sampler saw: another kernel, another precision, or weights of some steps ago. Every function reads
`[B, T]` and the batch's mask, and returns data without gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megallm.losses.reduce import counted_tokens, per_sequence, per_token

# TRL's names; "sequence" is the product over T tokens, "geometric" its T-th root (verl: seq_mean).
CORRECTIONS = tuple(
    f"{level}_{action}"
    for level in ("token", "sequence", "geometric")
    for action in ("truncate", "mask")
)


def log_ratios(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """Returns `new - old` `[B, T]` where the mask counts and both are finite, 0 elsewhere."""
    difference = new - old
    return difference.masked_fill(~(mask & difference.isfinite()), 0)


@torch.no_grad()
def importance_weights(
    old: Tensor,
    rollout: Tensor,
    batch: dict[str, Tensor],
    correction: str = "token_truncate",
    low: float | None = None,
    high: float = 2.0,
) -> Tensor:
    """Returns weights `[B, T]` for the batch's `importance_weights`: `exp(old - rollout)` of each
    token, or of each sequence at each of its tokens.

    `truncate` clamps them to [low, high] (TIS, truncated importance sampling; Ionides 2008), `mask`
    makes those outside 0 (MIS). A token that the sampler did not score has the ratio 1. Errors:
    ValueError for a correction that is not in `CORRECTIONS`.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"the correction {correction!r} is none of {', '.join(CORRECTIONS)}.")
    level, _, action = correction.partition("_")
    log_ratio = log_ratios(old, rollout, batch["mask"])
    if level != "token":
        summed = per_sequence(log_ratio, batch)
        if level == "geometric":
            summed = summed / counted_tokens(batch).clamp(min=1).to(summed.dtype)
        log_ratio = per_token(summed, batch)
    weight = log_ratio.exp()
    if action == "truncate":
        return weight.clamp(min=low, max=high)
    return weight.masked_fill((weight < (-math.inf if low is None else low)) | (weight > high), 0)


@torch.no_grad()
def off_policy_mask(
    new: Tensor, rollout: Tensor, advantages: Tensor, batch: dict[str, Tensor], threshold: float
) -> Tensor:
    """Returns 0 `[B, T]` for tokens of a negative advantage whose sequence the policy has left,
    else 1 (OPSM, DeepSeek-V3.2, arXiv 2512.02556): its mean `rollout - new` is above `threshold`
    nats.
    """
    drift = per_sequence(log_ratios(rollout, new, batch["mask"]), batch)
    mean = drift / counted_tokens(batch).clamp(min=1).to(drift.dtype)
    return ((advantages >= 0) | (per_token(mean, batch) <= threshold)).to(new.dtype)


@torch.no_grad()
def compare_log_probs(new: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """Returns how far two log-probs `[B, T]` of the same tokens lie apart, such as the trainer's
    and the rollout's: `max_difference` and `mean_difference` in nats, `ess_fraction`, the effective
    share of the tokens as samples of `new`, `chi_square` between the two, and `perplexity_ratio`.
    """
    log_ratio = log_ratios(new, old, mask)[mask]
    if not log_ratio.numel():
        return dict.fromkeys(_FIGURES, 0.0) | {"ess_fraction": 1.0, "perplexity_ratio": 1.0}
    ratio = log_ratio.exp()
    square = ratio.square().mean()
    values = (
        log_ratio.abs().max(),
        log_ratio.abs().mean(),
        ratio.mean().square() / square,
        square - 1,
        (-log_ratio.mean()).exp(),
    )
    return {name: float(value) for name, value in zip(_FIGURES, values, strict=True)}


_FIGURES = ("max_difference", "mean_difference", "ess_fraction", "chi_square", "perplexity_ratio")
