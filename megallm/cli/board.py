"""Where a verb notes how far it is, for the process that shows it; and how a verb says what it
made.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from dataclasses import dataclass

_SIZE = 4096
_SECONDS = (
    0.05  # between notes: writing one down takes microseconds, and some work is as quick as that
)
_DRAWN = _SIZE - 1  # the place of a byte: whether there is a line to take away
_CLEAR = "\r\x1b[2K"


@dataclass(frozen=True)
class Note:
    """The last note: see `base.progress`; `shown` is False once the verb has ended its work, `said`
    is True once it has told why."""

    phase: str = ""
    done: int = 0
    total: int | None = None
    unit: str = ""
    shown: bool = True
    said: bool = False


class Board:
    """Memory that a process shares with those that it forks. Before `open`, notes go nowhere."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._phase, self._at = "", 0.0

    def open(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)

    def show(self, phase: str, done: int, total: int | None, unit: str = "") -> None:
        """Note how far the work is; a `base.progress.Progress`."""
        now = time.monotonic()
        if self._memory is not None and (phase != self._phase or now - self._at > _SECONDS):
            self._phase, self._at = phase, now
            self._write(Note(phase[:200], done, total, unit[:50]))

    def end(self, said: bool = False) -> None:
        """End the display: the work is done, or has failed: what follows on the terminal is the
        verb's own output.
        """
        if self._memory is not None:
            self._write(Note(shown=False, said=said))
            if self._memory[_DRAWN]:
                self._memory[_DRAWN] = 0
                sys.stderr.write(_CLEAR)
                sys.stderr.flush()

    def drawn(self) -> None:
        """Record that a line of progress stands on the terminal, which `end` takes away."""
        if self._memory is not None:
            self._memory[_DRAWN] = 1

    def read(self) -> Note | None:
        """Returns the last note; None when it is being written at this moment."""
        if self._memory is None:
            return None
        size = int.from_bytes(self._memory[:4], "little")
        try:
            return Note(**json.loads(self._memory[4 : 4 + size])) if size else Note()
        except (ValueError, TypeError):
            return None

    def _write(self, note: Note) -> None:
        if self._memory is not None:
            data = json.dumps(vars(note)).encode()
            self._memory[: 4 + len(data)] = len(data).to_bytes(4, "little") + data


BOARD = Board()


def tell(made: str, then: str = "") -> None:
    """Say on standard error where the result is and what usually comes next."""
    print(f"megallm: {made}{f' Next: {then}' if then else ''}", file=sys.stderr)
