"""What is asked of a generator and what comes back: requests and samples. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megallm.inference.answer import Answer, Ending


@dataclass(eq=False)
class Request:
    """One prompt to continue; `id` keys its randomness, `answer` grows. `virtual` is the number of
    rows of hidden states in front of the prompt (prompt tuning), which a generator notes.
    """

    id: int
    prompt: list[int]
    answer: Answer
    virtual: int = 0

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
        return self.prefill + self.answer.ending.limit

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
