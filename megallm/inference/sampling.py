"""Choosing the next tokens of many sequences at once: penalty, temperature, top-k, top-p, min-p.

Randomness is keyed by request and position, so a draw does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megallm.base import extension
from megallm.base.errors import CheckpointError
from megallm.base.rng import key_of, uniform


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1, `min_p` 0 and
    `repetition_penalty` 1 switch each off.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability (arXiv 2407.01082)
    q_beta: float = 0.0  # draws from pi exp(q_beta (Q - V)) of a model with Q heads (ILQL, arXiv 2206.11871)

    @property
    def filters(self) -> bool:
        """Whether tokens are drawn from anything but softmax(logits / temperature)."""
        return bool(
            self.top_k or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1.0
        )


class Chosen(NamedTuple):
    """Tokens int64 `[n]` and float64 log-probabilities `[n]` of each: of softmax(logits), of the
    policy at the sampling temperature, and of the distribution that was drawn from.
    """

    tokens: Tensor
    log_probs: Tensor
    policy_log_probs: Tensor
    behaviour_log_probs: Tensor


class Draws:
    """The uniform numbers of one request, a stretch of positions at a time."""

    AHEAD = 64

    def __init__(self, seed: int, request: int) -> None:
        self.key, self.begin = key_of(seed, "sample", request), 0
        self.numbers: np.ndarray = np.empty(0)

    def at(self, position: int) -> float:
        """Returns the number in (0, 1) that decides the token at `position`."""
        place = position - self.begin
        if not 0 <= place < len(self.numbers):
            self.begin, place = position, 0
            self.numbers = uniform(self.key, position, self.AHEAD)
        return self.numbers[place]


def sample(
    logits: Tensor, sampling: Sampling, draws: Tensor | None, seen: Tensor | None = None
) -> Chosen:
    """Returns a token for each row of logits `[n, V]`, computed on their device in float64.

    `draws` `[n]` are numbers in (0, 1), None at temperature 0; `seen` bool `[n, V]` marks the
    tokens that the repetition penalty applies to. The draw inverts the cumulative distribution, so
    it needs nothing but its number. Raises CheckpointError when logits are not numbers.
    """
    ops = extension.ops() if logits.device.type == "cpu" and not sampling.filters else None
    takes = ops is not None and ops.isa() != "reference"
    if takes and logits.dtype in (torch.float32, torch.float64):
        return _native(logits.contiguous(), sampling.temperature, draws, ops)
    logits = logits.to(torch.float64)
    if sampling.temperature > 0 and not sampling.filters:
        return _drawn(logits, sampling.temperature, draws)
    lse = _checked(logits.logsumexp(-1, keepdim=True))
    wanted = logits
    if seen is not None and sampling.repetition_penalty != 1.0:
        wanted = _penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens = wanted.argmax(-1)
        plain = (logits.gather(-1, tokens[:, None]) - lse)[:, 0]
        return Chosen(tokens, plain, plain, torch.zeros_like(plain))
    probs = _filtered(wanted / sampling.temperature, sampling)
    tokens, total = _inverted(probs.cumsum(-1), draws)
    at = logits.gather(-1, tokens)
    plain = policy = (at - lse)[:, 0]
    if sampling.temperature != 1:
        scaled = logits / sampling.temperature
        policy = (at / sampling.temperature - scaled.logsumexp(-1, keepdim=True))[:, 0]
    behaviour = (probs.gather(-1, tokens) / total).log()[:, 0]
    return Chosen(tokens[:, 0], plain, policy, behaviour)


def _native(logits: Tensor, temperature: float, draws: Tensor | None, ops: ModuleType) -> Chosen:
    """The same by the extension: exponentials in the precision of the logits, sums in float64."""
    out = torch.empty((3, len(logits)), dtype=torch.float64)
    draws = None if temperature == 0 else draws.contiguous()  # an address keeps nothing
    addresses = logits.data_ptr(), 0 if draws is None else draws.data_ptr(), out.data_ptr()
    ops.draw(*addresses, *logits.shape, temperature, logits.dtype == torch.float64)
    tokens, plain, policy = out.unbind()
    _checked(plain)
    behaviour = torch.zeros_like(plain) if temperature == 0 else policy
    return Chosen(tokens.to(torch.int64), plain, policy, behaviour)


def _drawn(logits: Tensor, temperature: float, draws: Tensor) -> Chosen:
    """Tokens of softmax(logits / temperature): one pass of exponentials for the draw and the
    log-probabilities.
    """
    scaled = logits if temperature == 1 else logits / temperature
    most = scaled.amax(-1, keepdim=True)
    tokens, total = _inverted((scaled - most).exp_().cumsum(-1), draws)
    lse = _checked(most + total.log())
    policy = plain = (scaled.gather(-1, tokens) - lse)[:, 0]
    if temperature != 1:
        plain = (logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True))[:, 0]
    return Chosen(tokens[:, 0], plain, policy, policy)


def _inverted(cumulative: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens `[n, 1]` that draws take from cumulative weights `[n, V]`, and their sum."""
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    # A draw that rounds up to the whole sum takes the last token that can be drawn at all.
    last = torch.searchsorted(cumulative, total).clamp_(max=cumulative.shape[-1] - 1)
    return torch.minimum(tokens, last), total


def _checked(lse: Tensor) -> Tensor:
    if not bool(lse.isfinite().all()):
        raise CheckpointError(
            "The model's logits are not numbers (NaN): its weights are damaged or overflow."
        )
    return lse


def choose(
    logits: Tensor, sampling: Sampling, request: int, position: int, seen: Sequence[int] = ()
) -> tuple[int, float]:
    """Returns one token from logits `[V]`, and its log-probability before penalty, temperature and
    filters.

    The draw is a function of (seed, request, position), whatever layout computed the logits and
    whatever else was in the batch. `seen` are the tokens that the repetition penalty applies to.
    """
    draw = torch.tensor([Draws(sampling.seed, request).at(position)], dtype=torch.float64)
    marks = torch.zeros(1, len(logits), dtype=torch.bool, device=logits.device)
    marks[0, list(seen)] = True
    chosen = sample(logits[None], sampling, draw.to(logits.device), marks)
    return int(chosen.tokens), float(chosen.log_probs)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where positive, else multiplied (CTRL, arXiv
    1909.05858).
    """
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def _filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[n, V]` after top-k, top-p (arXiv 1904.09751) and min-p; what is left out is
    0.
    """
    if sampling.top_k:
        kept = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kept, -torch.inf)
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        late = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(torch.empty_like(late).scatter_(-1, index, late), 0.0)
    if sampling.min_p > 0:
        floor = probs.amax(-1, keepdim=True) * sampling.min_p
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs
