"""Choosing the next token: penalty, temperature, top-k, top-p, with randomness keyed by request and
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError
from megallm.base.rng import key_of, uniform


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1 and `repetition_penalty` 1
    switch each off.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0


def choose(
    logits: Tensor, sampling: Sampling, request: int, position: int, seen: Sequence[int] = ()
) -> tuple[int, float]:
    """One token from logits `[V]`, and its log-probability before penalty, temperature and filters.

    The draw is a function of (seed, request, position), whatever layout computed the logits and
    whatever else was in the batch. `seen` are the tokens that the repetition penalty applies to.
    Raises CheckpointError when the logits are not numbers.
    """
    logits = logits.to(torch.float64)
    scores = torch.log_softmax(logits, dim=-1)
    if bool(scores.isnan().any()):
        raise CheckpointError(
            "The model's logits are not numbers (NaN): its weights are damaged or overflow."
        )
    wanted = _penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = int(wanted.argmax())
        return token, float(scores[token])
    probs = _filtered(wanted / sampling.temperature, sampling).cpu()
    draw = uniform(key_of(sampling.seed, "sample", request), position, 1)[0]
    cumulative = probs.cumsum(0)
    token = int(torch.searchsorted(cumulative, torch.tensor(draw) * cumulative[-1], right=True))
    token = min(token, int(probs.nonzero()[-1]))  # a draw that rounds up to the whole sum
    return token, float(scores[token])


def _penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where positive, else multiplied (CTRL, arXiv
    1909.05858).
    """
    if penalty == 1.0 or not seen:
        return logits
    index = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[index]
    changed = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(0, index, changed)


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
