"""What may be deleted in a folder of checkpoints: leftovers of dead processes, and steps that are
old enough.

A step is deleted by giving it a temporary name first, so that a crash never shows half of one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megallm.base.errors import CheckpointError
from megallm.base.files import cannot_write, writing
from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.reader import load_manifest, step_folders

log = logging.getLogger(__name__)

STALE_SECONDS = 6 * 3600.0  # a temporary folder of another host is swept when it is older
_TEMPORARY = re.compile(r"step-\d{8,}\.tmp-([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]{8}")


def temporary_step(folder: Path) -> Path:
    """Returns a new name beside a step folder that tells who made it, for `remove_stale_folders`:
    `step-N.tmp-<host>.<pid>.<id>`.
    """
    return folder.with_name(f"{folder.name}.tmp-{_host()}.{os.getpid()}.{secrets.token_hex(4)}")


def set_aside(folder: Path) -> Path:
    """Give a step a temporary name at once, so that a crash while deleting never shows half a
    step.
    """
    aside = temporary_step(folder)
    os.rename(folder, aside)
    return aside


def remove_stale_folders(root: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary folders of saves and deletions whose process is dead; returns what went.

    Only names of our own pattern. On this host a folder is dead when its process is gone or is this
    one (a process saves one step at a time); of another host, when nothing in it changed for
    `STALE_SECONDS`.
    """
    swept = []
    with os.scandir(root) as entries:
        folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for folder in folders:
        match = _TEMPORARY.fullmatch(folder.name)
        if match is None:
            continue
        if match[1] == _host():
            dead = int(match[2]) == os.getpid() or not _alive(int(match[2]))
        else:
            dead = time.time() - _changed(folder) > STALE_SECONDS
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(folder)
    return swept


def _changed(folder: Path) -> float:
    """Seconds since the epoch of the last change in a folder; infinity when it goes away
    meanwhile.
    """
    try:
        with os.scandir(folder) as entries:
            return max(
                [
                    folder.stat().st_mtime,
                    *(entry.stat(follow_symlinks=False).st_mtime for entry in entries),
                ]
            )
    except FileNotFoundError:
        return float("inf")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "unknown"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def retire(
    root: str | os.PathLike[str],
    keep: int,
    step: int,
    proven: int | None = None,
    guard: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Delete the steps older than the newest `keep` valid ones up to `step`; returns what went.

    Call it when `step` is durable. Pinned steps, `proven` and steps that a `Reader` on this host
    holds open stay. What cannot be deleted is logged and stays. `guard` is called before each
    deletion, and may raise.
    """
    gone, valid = [], 0
    for number, folder in step_folders(root):
        if number > step:
            continue
        if valid >= keep:
            if number == proven or pin_file(folder).exists():
                continue
            guard()
            if _delete(folder):
                gone.append(folder)
            continue
        with suppress(CheckpointError):
            load_manifest(folder)
            valid += 1
    return gone


def quarantine(
    root: str | os.PathLike[str], first: int, mark: str, last: int | None = None
) -> list[Path]:
    """Rename the steps `first` to `last` (None: all later ones) to `step-N.MARK`; returns their new
    names.

    No search for a checkpoint finds them any more, but by its path each can still be looked at.
    Errors: `CannotWrite`.
    """
    moved = []
    for number, folder in step_folders(root):
        if number < first or (last is not None and number > last):
            continue
        aside = folder.with_name(f"{folder.name}.{mark}")
        with writing(folder):
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(folder, aside)
        moved.append(aside)
    return moved


def _delete(folder: Path) -> bool:
    try:
        with _unread(folder) as free:
            if not free:
                return False
            aside = set_aside(folder)
        shutil.rmtree(aside)
    except OSError as error:
        log.warning("An old checkpoint stays: %s", cannot_write(folder, error))
        return False
    return True


@contextmanager
def _unread(folder: Path) -> Iterator[bool]:
    """True, and no new reader can start on this host, unless a reader holds the manifest's lock."""
    try:
        fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _lock_alone(fd)
    finally:
        os.close(fd)


def _lock_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def pin_file(folder: str | os.PathLike[str]) -> Path:
    """Returns the marker beside a step folder that keeps retention away from it:
    `step-00001200.pin`.
    """
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.pin")


def pin(folder: str | os.PathLike[str]) -> None:
    """Keep this step whatever `keep` says. Errors: `CannotWrite`."""
    with writing(pin_file(folder)):
        pin_file(folder).touch()


def unpin(folder: str | os.PathLike[str]) -> None:
    """Let retention have this step again. Errors: `CannotWrite`."""
    with writing(pin_file(folder)):
        pin_file(folder).unlink(missing_ok=True)
