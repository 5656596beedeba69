"""Choosing the next token: temperature, top-k, top-p, with randomness keyed by request and position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megallm.base.rng import key_of, uniform


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 switch the filters off."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, request: int, position: int) -> tuple[int, float]:
    """One token from logits `[V]`, and its log-probability before temperature and filters.

    The draw is a function of (seed, request, position), whatever layout computed the logits and whatever
    else was in the batch.
    """
    scores = torch.log_softmax(logits.to(torch.float64), dim=-1)
    if sampling.temperature == 0:
        token = int(scores.argmax())
        return token, float(scores[token])
    probs = _filtered(scores / sampling.temperature, sampling).cpu()
    draw = uniform(key_of(sampling.seed, "sample", request), position, 1)[0]
    cumulative = probs.cumsum(0)
    token = int(torch.searchsorted(cumulative, torch.tensor(draw) * cumulative[-1], right=True))
    return token, float(scores[token])


def _filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[V]` after top-k and top-p (arXiv 1904.09751); what is left out is 0."""
    if sampling.top_k:
        kept = scores.topk(min(sampling.top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < kept, -torch.inf)
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probs[index[before >= sampling.top_p]] = 0.0
    return probs
