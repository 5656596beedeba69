"""One growing answer: its tokens, the text that is certain so far, and when it ends. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Tokens of the prompt that the first new token is decoded with: a leading space may depend on them.
CONTEXT = 4
HELD = 8  # tokens that may wait for the rest of a character; more are not the beginning of one
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What turns tokens into text."""

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class Ending:
    """An answer ends after `limit` tokens, after one of the tokens `ids`, or before one of the
    texts `strings`.
    """

    limit: int
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


@dataclass
class Answer:
    """Tokens in, text out.

    `text` leaves out the token that ended the answer and everything from a stop text on; `reason`
    says what ended it: "length", "end" (an end token), "stop" (a stop text), "interrupted", or None
    while it grows. `tokens` and `log_probs` hold every token that was generated; for the other
    log-probabilities see `samples.Sample`.
    """

    ending: Ending
    decoder: Decoder | None = None
    context: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    policy_log_probs: list[float] = field(default_factory=list)
    behaviour_log_probs: list[float] = field(default_factory=list)
    text: str = ""
    reason: str | None = None

    def __post_init__(self) -> None:
        self._window = list(self.context[-CONTEXT:])  # tokens that the next text is decoded with
        self._known = len(self._window)  # how many of them are already in `text`
        self._shown = 0

    @property
    def done(self) -> bool:
        return self.reason is not None

    def push(
        self,
        token: int,
        log_prob: float,
        policy: float | None = None,
        behaviour: float | None = None,
    ) -> None:
        """Add one token with its log-probabilities (those not given are the first); may end the
        answer.
        """
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self.policy_log_probs.append(log_prob if policy is None else policy)
        self.behaviour_log_probs.append(log_prob if behaviour is None else behaviour)
        if token in self.ending.ids:
            self.end("end")
            return
        if self.decoder is not None:
            self._window.append(token)
            self._decode(last=False)
        if not self.done and len(self.tokens) >= self.ending.limit:
            self.end("length")

    def end(self, reason: str) -> None:
        """End the answer: nothing more comes, and what was held back becomes text."""
        self._decode(last=True)
        self.reason = self.reason or reason

    def fresh(self) -> str:
        """Returns text that nobody asked for yet and that can no longer change."""
        end = len(self.text) if self.done else len(self.text) - self._open_stop()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _decode(self, last: bool) -> None:
        """Turn new tokens into text; bytes of an unfinished character wait for the rest."""
        if self.decoder is None or self._known == len(self._window):
            return
        before = self.decoder.decode(self._window[: self._known])
        whole = self.decoder.decode(self._window)
        if whole.endswith(BROKEN) and not last and len(self._window) - self._known < HELD:
            return
        start = len(self.text)
        self.text += whole[len(before) :]
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        self._cut(start)

    def _cut(self, start: int) -> None:
        """End at the first stop text that the newest characters complete."""
        found = [
            self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self.ending.strings
        ]
        found = [place for place in found if place >= 0]
        if found:
            self.text, self.reason = self.text[: min(found)], "stop"

    def _open_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        longest = 0
        for stop in self.ending.strings:
            sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
            longest = max(
                longest, next((size for size in sizes if self.text.endswith(stop[:size])), 0)
            )
        return longest
