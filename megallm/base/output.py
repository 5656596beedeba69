"""Output that never decides over the program: a full disk, a vanished terminal or a reader that
does not read.

What cannot be written is dropped and counted. The count is told in the output itself once writing
works again, and by whoever closes the writer.
"""

from __future__ import annotations

import io
import os
import queue
import select
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from megallm.base.terminal import escaped

PENDING_BYTES = 1 << 20  # kept for a reader that is slow; what comes then is dropped
_POLL_SECONDS = 0.02


class FdWriter:
    """Writes bytes to a file descriptor. An error costs the bytes, which are counted in lines; it
    never raises.
    """

    def __init__(self, fd: int) -> None:
        self.fd, self.reason = fd, ""
        self.failed = self._untold = (
            0  # lines that could not be written, and those not yet told in the output
        )

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self.failed

    def write(self, data: bytes) -> None:
        """Write everything, or drop it."""
        if self._untold:
            note = f"megallm: {self._untold} lines of output are missing here ({self.reason}).\n"
            if not self._push(note.encode()):
                self._drop(data)
                return
            self._untold = 0
        if not self._push(data):
            self._drop(data)

    def _drop(self, data: bytes) -> None:
        lines = max(1, data.count(b"\n"))
        self.failed += lines
        self._untold += lines

    def _push(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                # somebody made it non-blocking: wait here, in the thread if there is one
                select.select((), (self.fd,), (), 1.0)
            except OSError as error:
                self.reason = error.strerror or str(error)
                return False
        return True

    def close(self, seconds: float = 0.0) -> int:
        """Finish; the number of lines that were not written. The descriptor stays open."""
        return self.dropped


class BackgroundWriter(FdWriter):
    """An FdWriter whose `write` returns at once: a thread writes, and a reader that does not read
    costs lines only.

    `write` may be called from a signal handler. The thread starts with the first write, so never
    before a fork.
    """

    def __init__(self, fd: int, limit_bytes: int = PENDING_BYTES) -> None:
        super().__init__(fd)
        self.limit_bytes = limit_bytes
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # its put is reentrant
        self._given = self._taken = 0  # bytes; each counter is written by one thread only
        self._refused = self._refused_told = 0
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        return self.failed + self._refused

    def write(self, data: bytes) -> None:
        """Hand over the bytes, or drop them when too many wait."""
        if self._given - self._taken + len(data) > self.limit_bytes:
            self._refused += max(1, data.count(b"\n"))
            return
        self._given += len(data)
        self._queue.put(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"output-{self.fd}")
            self._thread.start()

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            super().write(data)
            self._taken += len(data)
            refused = self._refused
            if (
                self._taken == self._given and refused > self._refused_told
            ):  # they came before what is next
                self._untold += refused - self._refused_told
                self._refused_told, self.reason = refused, self.reason or "nobody read them"

    def close(self, seconds: float = 0.0) -> int:
        """Wait for the reader while it goes on reading, at most `seconds` without a sign of it."""
        seen, moved = self._taken, time.monotonic()
        while self._taken < self._given and time.monotonic() - moved < seconds:
            time.sleep(_POLL_SECONDS)
            if self._taken != seen:
                seen, moved = self._taken, time.monotonic()
        if self._taken < self._given:
            self.reason = self.reason or "nobody read them"
            return self.dropped + max(1, self._queue.qsize())
        return self.dropped


class LossyText(io.TextIOBase):
    """What `sys.stdout` and `sys.stderr` are in a rank: text, line by line, into a writer that
    never raises.
    """

    encoding = "utf-8"

    def __init__(self, writer: FdWriter) -> None:
        self._writer, self._line, self._lock = writer, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            self._line += text
            if "\n" in text or "\r" in text:
                self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            line, self._line = self._line, ""
            if line:
                self._writer.write(line.encode("utf-8", "backslashreplace"))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def isatty(self) -> bool:
        return os.isatty(self._writer.fd)


def descriptor(stream: Any, default: int) -> int:
    """Returns the file descriptor of a stream; `default` for one that has none."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return default


def show_error(text: str, seconds: float = 1.0) -> None:
    """Write a text to stderr, waiting for a reader at most `seconds`; it never raises."""
    text = escaped(text)
    if descriptor(sys.stderr, -1) != 2:  # redirected inside the process
        sys.stderr.write(f"{text}\n")
        return
    writer = BackgroundWriter(2)
    writer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    writer.close(seconds)


def say(text: str, seconds: float = 1.0) -> None:
    """Write a line to stdout, waiting for a reader at most `seconds`; it never raises, and starts
    no thread.
    """
    data = escaped(text).encode("utf-8", "backslashreplace") + b"\n"
    if descriptor(sys.stdout, -1) != 1:  # redirected inside the process
        sys.stdout.write(f"{text}\n")
        return
    with suppress(OSError):
        for begin in range(
            0, len(data), select.PIPE_BUF
        ):  # so much goes into a pipe that is ready, or nothing
            if select.select((), (1,), (), seconds)[1]:
                os.write(1, data[begin : begin + select.PIPE_BUF])


def open_standard_streams() -> None:
    """Give what was closed (`megallm ... >&-`) the null device, or the next file that is opened
    would become it.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            if fd:
                setattr(sys, name, open(fd, "w", closefd=False))  # noqa: SIM115 - for the life of the process
