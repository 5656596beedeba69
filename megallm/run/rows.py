"""Files of one JSON object a line: metrics.jsonl, which a resume rewinds, and events.jsonl. No
torch.

Logs never stop training: a row that cannot be written is kept in memory, told once, and written
when there is space again. What is lost in the end is told with its count.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from megallm.base.errors import InternalError
from megallm.base.files import atomic_path, cannot_write, writing
from megallm.base.redact import redacted

log = logging.getLogger(__name__)

LONG_FIELDS = ("stacks", "waits", "table", "sentence")  # of an incident: not for one line
_MAX_PENDING = 100_000  # rows kept in memory while the disk is full


class JsonLines:
    """A file of one JSON object a line, appended whole lines at a time.

    A half-written last line (a crash) is dropped on opening. Floats round-trip exactly; JSON has no
    NaN or infinity, they become null. Errors: `CannotWrite` on opening only; `append` never fails
    on a full disk. `guard` is called before every write and raises when the file is no longer ours.
    """

    def __init__(self, path: Path, guard: Callable[[], None] = lambda: None) -> None:
        self.path, self.guard, self.lost = path, guard, 0
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._warned = False
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _whole_lines(self._fd)
            os.ftruncate(self._fd, self._size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; on a full disk keep it and try again with the next one."""
        self.lost += len(self._pending) == _MAX_PENDING
        self._pending.append(
            json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        )
        self.flush()

    def flush(self) -> bool:
        """Write what is pending; True when nothing is left."""
        if self._pending:
            self.guard()
        try:
            while self._pending:
                line = self._pending[0]
                if os.write(self._fd, line) != len(line):
                    raise OSError(errno.ENOSPC, "short write")
                self._size += len(line)
                self._pending.popleft()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            if not self._warned:
                log.warning(
                    "%s Rows are kept in memory and written when it works again.",
                    cannot_write(self.path, error),
                )
            self._warned = True
            return False
        if self._warned:
            log.warning("%s can be written again.", self.path)
        self._warned = False
        return True

    def sync(self) -> None:
        """Make the rows durable; call it before a checkpoint that counts on them. Never fails."""
        if self.flush():
            with suppress(OSError):
                os.fsync(self._fd)

    def close(self) -> None:
        """Write what is pending; tells how many rows are lost because they cannot be written."""
        if self._fd < 0:
            return
        self.sync()
        lost = self.lost + len(self._pending)
        if lost:
            log.warning("%d rows of %s are lost: they could not be written.", lost, self.path)
        self.abandon()

    def abandon(self) -> None:
        """Close the file without writing anything more: it belongs to another job."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Metrics(JsonLines):
    """metrics.jsonl: rows in order of `step`, each step once.

    On resume at step s (`resume=s`) the rows of later steps are cut, atomically; s = 0 starts
    empty.
    """

    def __init__(self, path: Path, resume: int, guard: Callable[[], None] = lambda: None) -> None:
        guard()
        self.last_step = rewind(path, resume)
        super().__init__(path, guard)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step. Errors: InternalError when its step is not above the last
        one.
        """
        if row["step"] <= self.last_step:
            raise InternalError(
                f"metrics.jsonl already has step {self.last_step}; a row of step {row['step']} "
                "came."
            )
        self.last_step = row["step"]
        super().append(row)


class Events(JsonLines):
    """events.jsonl: what happened, when: `{"time": seconds since 1970, "event": kind, ...}`."""

    def add(self, kind: str, **fields: Any) -> None:
        self.append({"time": time.time(), "event": kind, **redacted(fields)})


def append_event(path: Path, event: str, fields: Mapping[str, Any]) -> None:
    """Add one event to events.jsonl from outside of the run; it is lost where that fails."""
    row = {"time": time.time(), "event": event, **fields}
    line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        with suppress(OSError):
            os.write(fd, b"\n" * torn + line)
    finally:
        os.close(fd)


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON lines file; a half-written or damaged line is passed over, a
    missing file has none.
    """
    try:
        with open(path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is not None:
                    yield row
    except FileNotFoundError:
        return


def rewind(path: Path, step: int) -> int:
    """Cut the rows of a metrics file that are later than `step`, damaged, or out of order; atomic.

    Returns the last step that is left, 0 without any. The file is written again only when something
    goes. Errors: `CannotWrite`.
    """
    if not path.exists():
        return 0
    with writing(path), open(path, "rb") as file:
        kept, last, total = _ranges_to_keep(file, step)
        if sum(end - begin for begin, end in kept) != total:
            with atomic_path(path) as temporary, temporary.open("wb") as copy:
                for begin, end in kept:
                    _copy_range(file, copy, begin, end)
    return last


def _ranges_to_keep(file: BinaryIO, step: int) -> tuple[list[tuple[int, int]], int, int]:
    """Byte ranges of the rows that stay, the last step among them, and the size of the file."""
    kept: list[tuple[int, int]] = []
    last = begin = 0
    for line in file:
        end = begin + len(line)
        number = _step_of(line)
        if number is not None and last < number <= step:
            last = number
            if kept and kept[-1][1] == begin:
                kept[-1] = (kept[-1][0], end)
            else:
                kept.append((begin, end))
        begin = end
    return kept, last, begin


def _copy_range(source: BinaryIO, target: BinaryIO, begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        data = source.read(min(end - begin, 1 << 20))
        target.write(data)
        begin += len(data)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: bytes) -> int | None:
    row = _parse(line)
    step = None if row is None else row.get("step")
    return step if type(step) is int else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _whole_lines(fd: int) -> int:
    """Returns the size of a file up to and with its last newline."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - 65536)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
