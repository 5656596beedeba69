"""A shard file as bytes: its safetensors header, writing and syncing it, and reading regular files
only. No torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError
from megallm.checkpoint.manifest import DTYPES

_BEGIN_BYTES = 8 << 20  # after so many the disk is told to begin


def header_bytes(
    entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]
) -> bytes:
    """Returns a safetensors header (length prefix, JSON, spaces to a multiple of 8).

    `entries` are `(key, dtype name, shape, bytes)` in the order of their data, which follows
    without gaps.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, dtype, shape, nbytes in entries:
        header[key] = {
            "dtype": DTYPES[dtype][0],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """An unbuffered new file that counts its bytes and is synced when the block ends without an
    error. The disk begins while the rest is still being written.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.position = self._begun = 0

    def write(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self.fd, view)
            self.position += count
            view = view[count:]
        if self.position - self._begun >= _BEGIN_BYTES:
            # Dirty pages are sent to the disk, not dropped: the sync at the end finds little left.
            count = self.position - self._begun
            os.posix_fadvise(self.fd, self._begun, count, os.POSIX_FADV_DONTNEED)
            self._begun = self.position

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)


def read_regular(
    path: Path, offset: int, nbytes: int | None, file_bytes: int | None = None
) -> bytearray:
    """Returns `nbytes` bytes (None: the whole file) at `offset` of a regular file that is no
    symbolic link.

    `file_bytes` is the size the file must have. Errors: `CheckpointError` when it is missing, of
    another kind or size, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            problem = size_problem(os.fstat(fd), file_bytes)
            if problem is not None:
                raise CheckpointError(f"{path} {problem}.")
            size = os.fstat(fd).st_size - offset if nbytes is None else nbytes
            return _read_exactly(fd, offset, size, path)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def size_problem(status: os.stat_result, file_bytes: int | None) -> str | None:
    """Returns why a file is not the regular file of `file_bytes` bytes that the manifest
    promises.
    """
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file (symbolic links are refused)"
    if file_bytes is not None and status.st_size != file_bytes:
        return f"has {status.st_size} bytes, the manifest says {file_bytes}"
    return None


def _read_exactly(fd: int, offset: int, nbytes: int, path: Path) -> bytearray:
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    position = 0
    while position < nbytes:
        count = os.preadv(fd, [view[position:]], offset + position)
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + position}, {nbytes - position} bytes too early."
            )
        position += count
    return buffer
