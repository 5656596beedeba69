"""What happened to a run, as data: one record in events.jsonl, and sentences for a person."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Incident:
    """One end of the ranks that nobody asked for."""

    kind: str  # killed | left | failed | hang | mismatch | lost (another node)
    code: int  # the exit code of the run, should it end by this
    sentence: str
    rank: int | None = None
    host: str = ""
    pid: int | None = None
    signal: str | None = None
    step: int = 0
    phase: str = ""
    detected_seconds: float = 0.0  # from the last sign of life to this record
    expected: bool = False  # an error in a sentence of ours: the next start would meet it again
    waits: tuple[str, ...] = ()  # a line for each rank
    table: tuple[str, ...] = ()  # who issued which collective
    stacks: dict[str, str] = field(default_factory=dict)  # by rank
    at: float = field(default_factory=time.time)

    def fields(self) -> dict[str, Any]:
        """Returns what events.jsonl keeps of it."""
        kept = {
            key: value for key, value in asdict(self).items() if value not in (None, "", (), {})
        }
        return kept | {"code": self.code, "step": self.step}

    @property
    def signature(self) -> tuple[Any, ...]:
        """What makes two incidents the same error."""
        words = self.sentence.partition("\n")[0]
        return self.kind, self.code, self.rank if self.kind == "hang" else None, _without_pid(words)

    def lines(self) -> list[str]:
        """Returns the incident for a terminal: the sentence, who waits, who issued what, and the
        stack of the rank to blame.
        """
        found = [self.sentence, *(f"    {line}" for line in (*self.table, *self.waits))]
        stack = self.stacks.get(str(self.rank), "")
        if stack:
            found.append(f"    stack of rank {self.rank} (those of all are in events.jsonl):")
            found += [f"        {line}" for line in stack.splitlines()]
        return found


def _without_pid(text: str) -> str:
    return "".join("#" if letter.isdigit() else letter for letter in text)
