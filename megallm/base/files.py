"""Files that are either absent or whole: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megallm.base.errors import CannotWrite, UsageError

TEMPORARY = ".tmp-"

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "a folder on the way to it does not exist; create it first",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder; choose another name",
    errno.EIO: "the device reports an input/output error; look at the system log",
}


def cannot_write(path: str | os.PathLike[str], error: OSError) -> CannotWrite:
    """Returns the sentence for an operating system error met while writing `path`."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return CannotWrite(f"Cannot write {os.fspath(path)}: {reason}.")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every OSError inside the block into a `CannotWrite` that names `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def check_new(*paths: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuses to replace an output that is there, unless `overwrite` says so: the one rule for
    outputs.

    An empty file, an empty folder, and what is no file (a pipe, /dev/stdout) hold nothing that
    could be lost. Errors: `UsageError`, before any work.
    """
    for path in () if overwrite else paths:
        with writing(path):
            empty = is_empty(path)
        if not empty:
            raise UsageError(
                f"{os.fspath(path)} exists, and nothing is overwritten unasked: choose another "
                "name, or pass --overwrite to replace it."
            )


def is_empty(path: str | os.PathLike[str]) -> bool:
    """Returns whether nothing would be lost if `path` were replaced. A link that leads nowhere is
    something.
    """
    path = Path(path)
    if path.is_dir():
        return not path.is_symlink() and not any(path.iterdir())
    if path.is_file():
        return path.stat().st_size == 0 and not path.is_symlink()
    return path.exists() or not path.is_symlink()


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Returns a name in the folder of `path` that nobody else uses and that a sweep can
    recognise.
    """
    path = Path(path)
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success it is synced and renamed to `path`, on
    error removed.

    What the block makes there is a file or a folder.

    Errors: `CannotWrite` for an OSError of the final sync and rename; what the block raises stays
    as it is.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        with writing(path):
            fsync_file(temporary)
            os.replace(temporary, path)
            fsync_dir(path.parent)
    finally:
        if temporary.is_dir():  # there is one only when something failed
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Make the content of a file durable (raises OSError)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with writing(path), atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with a final newline to `path`; floats round-trip exactly."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    atomic_write_bytes(
        path, text.encode("utf-8", "backslashreplace")
    )  # a lone surrogate as its JSON escape


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in folder `path` durable, so that a rename survives a power cut (raises
    OSError).
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)
