"""A data file that stays open: read where it is asked for, never through a map of what may be cut
off under it.

A page of a memory map that the file no longer has ends the process with SIGBUS, and nobody learns
why. A read of it is short, and says which file it was.
"""

from __future__ import annotations

import mmap
import os
import stat
import weakref

from megallm.base.errors import DataError

_IN_MEMORY = 128 << 20  # bytes of a whole file that are held: an index of six million documents


class OpenFile:
    """A file of `size` bytes. Errors: `DataError`, of all methods."""

    def __init__(self, path: str) -> None:
        self.path, self._mapped = path, False
        try:
            # Without waiting for whoever would write to a pipe.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist. Give the common prefix of a .bin and an .idx file, "
                "without the suffix; `megallm preprocess` makes them."
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DataError(
                f"{path} is a pipe or a device, but a dataset is read in any order: give a file."
            )
        self.size = status.st_size

    def read(self, begin: int, count: int) -> bytes:
        """Returns `count` bytes from byte `begin` on."""
        parts = []
        while count > 0:
            try:
                part = os.pread(self._fd, count, begin)
            except OSError as error:
                raise DataError(
                    f"{self.path} cannot be read at byte {begin}: {error.strerror}."
                ) from error
            if not part:
                raise self._cut_off(min(begin, os.fstat(self._fd).st_size))
            parts.append(part)
            begin, count = begin + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def whole(self) -> bytes | mmap.mmap:
        """Returns the whole file, mapped when it is large; `check` before any use of a map."""
        if self.size <= _IN_MEMORY:
            return self.read(0, self.size)
        self._mapped = True
        try:
            return mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be mapped: {error}.") from error

    def check(self) -> None:
        """See that a mapped file still has its bytes."""
        if self._mapped:
            size = os.fstat(self._fd).st_size
            if size < self.size:
                raise self._cut_off(size)

    def _cut_off(self, at: int) -> DataError:
        return DataError(
            f"{self.path} was cut off at byte {at} while it was in use: it had {self.size} bytes "
            "when it was opened. Put the whole file back; what was trained until the last "
            "checkpoint stays good. Files of a running job must be replaced by renaming, not "
            "written over."
        )
