"""What the training stream reads when: segments, each with its weights, row length and way of
reading. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BEST_FIT, CONCAT = "best_fit", "concat"
SINGLE = "single"  # each document is a row of its own, whatever its length
DOCUMENT, CONTEXT = "document", "context"


@dataclass(frozen=True)
class Reading:
    """How documents become rows.

    seq_len: tokens of a row; packing: BEST_FIT, CONCAT or SINGLE; window: rows packed (and
    shuffled) together; fim_rate, fim_spm: see `fim`; fim_form: DOCUMENT rearranges whole documents
    before packing, CONTEXT what a row holds of them.
    """

    seq_len: int
    packing: str = BEST_FIT
    window: int = 256
    fim_rate: float = 0.0
    fim_spm: float = 0.5
    fim_form: str = DOCUMENT

    def state(self) -> list[Any]:
        return [self.seq_len, self.packing, self.window, self.fim_rate, self.fim_spm, self.fim_form]


@dataclass(frozen=True)
class StreamSegment:
    """Holds from the moment that `begin_tokens` places of rows (tokens and padding) were read."""

    begin_tokens: int
    weights: dict[
        str, float
    ]  # prefix -> weight; sources of weight 0 rest, and go on later where they stopped
    reading: Reading


@dataclass(frozen=True)
class StreamPlan:
    """Everything that decides which tokens are read: with the counts of `stream.Stream.state`, it
    is all there is.
    """

    segments: tuple[StreamSegment, ...]
    seed: int
    split: str = "100,0,0"
    which: str = "train"

    def __post_init__(self) -> None:
        begins = [segment.begin_tokens for segment in self.segments]
        if (
            not begins
            or begins[0] != 0
            or any(a >= b for a, b in zip(begins, begins[1:], strict=False))
        ):
            raise ValueError(
                f"Segments must begin at 0 and then at rising numbers of tokens, not {begins}."
            )

    @property
    def prefixes(self) -> list[str]:
        """Returns every source of every segment, in the order of their first mention."""
        return list(
            dict.fromkeys(prefix for segment in self.segments for prefix in segment.weights)
        )

    def at(self, tokens: int) -> StreamSegment:
        """Returns the segment for the step that begins after `tokens` places."""
        return [segment for segment in self.segments if segment.begin_tokens <= tokens][-1]

    def tokens_after(self, steps: int, global_batch: int) -> int:
        """Places of rows that `steps` steps from the beginning read: each step lies whole in one
        segment.
        """
        tokens = 0
        for number, segment in enumerate(self.segments):
            per_step = global_batch * segment.reading.seq_len
            until = (
                self.segments[number + 1].begin_tokens if number + 1 < len(self.segments) else None
            )
            here = steps if until is None else min(steps, max(0, -(-(until - tokens) // per_step)))
            tokens += here * per_step
            steps -= here
        return tokens


def stream_segments(
    sources: dict[str, float],
    reading: Reading,
    changes: Sequence[tuple[int | None, dict[str, Any]]],
) -> tuple[StreamSegment, ...]:
    """Returns segments from (until_tokens, what differs from `sources` and `reading`); () is one
    segment without an end.
    """
    out, begin = [], 0
    for until, change in changes or [(None, {})]:
        fields = {
            **vars(reading),
            **{key: value for key, value in change.items() if key != "sources"},
        }
        out.append(StreamSegment(begin, change.get("sources") or dict(sources), Reading(**fields)))
        begin = until if until is not None else begin
    return tuple(out)
