"""What is asked of a generator and what comes back: requests and samples. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from megallm.inference.answer import Answer, Ending

_LISTS = {
    "prompt": np.int64, "tokens": np.int64, "log_probs": np.float64, "behaviour_log_probs": np.float64,
}  # fmt: skip
_NUMBERS = {"id": np.int64, "version": np.int64}


@dataclass(eq=False)
class Request:
    """One prompt to continue; `id` keys its randomness, `answer` grows. `virtual` is the number of
    rows of hidden states in front of the prompt (prompt tuning), which a generator notes. `room`
    positions at least are kept for it, where it is to be continued by further requests of its id.
    """

    id: int
    prompt: list[int]
    answer: Answer
    virtual: int = 0
    room: int = 0

    @staticmethod
    def of(id: int, prompt: Iterable[int], limit: int, stop_ids: Iterable[int] = ()) -> Request:
        """Returns a request in token ids alone: at most `limit` new ones, the last one of
        `stop_ids`.
        """
        return Request(id, list(prompt), Answer(Ending(limit, frozenset(stop_ids))))

    @property
    def prefill(self) -> int:
        """Positions before the answer."""
        return self.virtual + len(self.prompt)

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.prefill + len(self.answer.tokens)

    @property
    def most(self) -> int:
        """Positions that the sequence may come to need."""
        return max(self.prefill + self.answer.ending.limit, self.room)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Returns tokens at positions `begin` to `end`; virtual token i has the number -1 - i."""
        if begin < self.virtual:
            rows = range(-1 - begin, -1 - min(end, self.virtual), -1)
            return [*rows, *self.tokens(self.virtual, max(end, self.virtual))]
        size, begin, end = len(self.prompt), begin - self.virtual, end - self.virtual
        if end <= size:
            return self.prompt[begin:end]
        return self.prompt[begin:] + self.answer.tokens[max(0, begin - size) : end - size]


@dataclass(frozen=True)
class Sample:
    """The finished answer of a request; lists and numbers only, so JSON holds it (`vars`).

    `log_probs` are those of the policy at the sampling temperature: of softmax(logits / T) over the
    whole vocabulary, as `Engine.log_probs` computes them (at temperature 0: T = 1).
    `behaviour_log_probs` are those of the distribution that was drawn from, after repetition
    penalty, top-k, top-p and min-p, renormalised. `reason` is "length", "end" (a stop id, which is
    the last token), "stop" (a stop text) or "interrupted". `version` counts the updates of the
    weights that it was made with.
    """

    id: int
    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    behaviour_log_probs: list[float]
    reason: str
    version: int

    @staticmethod
    def of(request: Request, version: int) -> Sample:
        """Returns what a finished request has become."""
        answer = request.answer
        return Sample(
            request.id,
            request.prompt,
            answer.tokens,
            answer.policy_log_probs,
            answer.behaviour_log_probs,
            answer.reason or "",
            version,
        )


def pack_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns samples as ranks tell one another: an array for each field, and of its lists their
    sizes.
    """
    made: dict[str, Any] = {"reason": [each.reason for each in samples]}
    for name, kind in _NUMBERS.items():
        made[name] = np.array([vars(each)[name] for each in samples], kind)
    for name, kind in _LISTS.items():
        lists = [vars(each)[name] for each in samples]
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        made[name] = [sizes, np.fromiter(chain.from_iterable(lists), kind, int(sizes.sum()))]
    return made


def unpack_samples(packed: Mapping[str, Any]) -> list[Sample]:
    """Returns the samples that were packed."""
    columns = {"reason": packed["reason"]}
    columns |= {name: packed[name].tolist() for name in _NUMBERS}
    for name in _LISTS:
        sizes, flat = packed[name]
        values, ends = flat.tolist(), np.cumsum([0, *sizes]).tolist()
        columns[name] = [values[a:b] for a, b in pairwise(ends)]
    rows = zip(*columns.values(), strict=True)
    return [Sample(**dict(zip(columns, row, strict=True))) for row in rows]
