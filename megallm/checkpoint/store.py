"""A folder of checkpoints `step-00001200/`: save them atomically, find the newest valid one, keep a few.

Commit: every rank writes and syncs its shard in `step-N.tmp-<host>.<pid>.<id>/`, rank 0 writes the manifest last,
syncs, renames the folder and syncs its parent. A crash at any byte leaves the older steps as they were, and a
temporary folder that the next save sweeps once its writer is dead. A step counts only when its manifest parses
and every file has its size; the hashes are checked when bytes are read.
"""

from __future__ import annotations

import difflib
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from megallm.base.errors import CannotWrite, CheckpointError, InternalError, MegallmError
from megallm.base.files import cannot_write, fsync_dir, writing
from megallm.checkpoint.io import (
    TORCH_DTYPES,
    Part,
    PieceReader,
    ShardWriter,
    copy_bytes,
    read_regular,
    size_problem,
    write_shard,
)
from megallm.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    decode,
    file_from_json,
    merge_tables,
    table_from_json,
)
from megallm.checkpoint.plan import outside_problem, plan_reads
from megallm.parallel.shard import Box

log = logging.getLogger(__name__)

STALE_SECONDS = 6 * 3600.0  # a temporary folder of another host is swept when it is older
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\.tmp-([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]{8}")
_APPEAR_SECONDS = 5.0  # how long a shard of another host may take to appear on a network file system


class World(Protocol):
    rank: int
    size: int


class Mesh(Protocol):
    """What saving needs of a mesh: all ranks, gather to rank 0 (None elsewhere), broadcast from rank 0."""

    world: World

    def gather_json(self, value: Any) -> list[Any] | None: ...
    def broadcast_json(self, value: Any) -> Any: ...


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(root: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """All `(step, folder)` under `root`, newest first, valid or not; empty when `root` does not exist."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"The checkpoint folder {root} cannot be read: {error.strerror}.") from error
    matches = (_STEP.fullmatch(name) for name in names)
    return sorted(((int(match[1]), Path(root) / match[0]) for match in matches if match), reverse=True)


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a step folder; checks it and the kind and size of every file it lists.

    Errors: `CheckpointError` that names the first bad file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a checkpoint, or its save never finished.")
    if path.lstat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes.")
    manifest = decode(bytes(read_regular(path, 0, None)), str(path))
    for problem in file_problems(folder, manifest):
        raise CheckpointError(problem)
    return manifest


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for each shard file that is missing, of another size, or no regular file."""
    for name, record in manifest.files.items():
        try:
            problem = size_problem(os.lstat(folder / name), record.nbytes)
        except OSError as error:
            problem = f"is missing or cannot be read ({error.strerror})"
        if problem is not None:
            first = next((t for t, r in manifest.tensors.items() if any(p.file == name for p in r.pieces)), None)
            yield f"{folder / name} {problem}; it holds pieces of {first or 'no tensor'}."


def latest(root: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest valid step under `root` (None without any), and a warning for each newer one that is damaged."""
    warnings = []
    for _, folder in step_folders(root):
        try:
            load_manifest(folder)
        except CheckpointError as error:
            warnings.append(f"{folder.name} is damaged and passed over: {error}")
        else:
            return folder, warnings
    return None, warnings


def save(
    root: str | os.PathLike[str], step: int, parts: Sequence[Part], meta: Any, mesh: Mesh, keep: int | None = None
) -> Path:
    """Write one checkpoint; collective over world: every rank passes the parts it owns.

    `meta` is any JSON value (that of rank 0 counts). `keep` is how many valid steps stay, this one included;
    None or 0 keeps all. Errors, the same on every rank, with nothing left behind: `CannotWrite` when any rank
    cannot write; `CheckpointError` or `InternalError` when the parts do not hold every tensor exactly once.
    """
    root = Path(root)
    first = mesh.world.rank == 0
    begun = mesh.broadcast_json(_begin(root, step) if first else None)
    _raise_if_failed(begun)
    folder = root / begun["folder"]
    reports = mesh.gather_json(_write_own(folder, mesh.world.rank, parts))
    outcome = mesh.broadcast_json(_finish(root, folder, step, reports, meta) if reports is not None else None)
    if "error" in outcome:
        shutil.rmtree(folder, ignore_errors=True)  # rank 0 did; a folder that is not shared has its own copy here
    _raise_if_failed(outcome)
    if first and keep:
        retire(root, keep, step)
    return root / step_name(step)


_KINDS = {kind.__name__: kind for kind in (CannotWrite, CheckpointError, InternalError)}


def _failure(error: MegallmError) -> dict[str, str]:
    kind = type(error).__name__
    return {"error": str(error), "kind": kind if kind in _KINDS else InternalError.__name__}


def _raise_if_failed(report: dict[str, Any]) -> None:
    if "error" in report:
        raise _KINDS[report["kind"]](report["error"])


def _begin(root: Path, step: int) -> dict[str, str]:
    """Rank 0: sweep what dead writers left, and make the temporary folder of this save."""
    try:
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
            folder = root / f"{step_name(step)}.tmp-{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
            folder.mkdir()
    except CannotWrite as error:
        return _failure(error)
    return {"folder": folder.name}


def _write_own(folder: Path, rank: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the shard of this rank; the report says what it holds, or why it failed. Never raises for either."""
    if not parts:
        return {"files": {}, "tensors": {}}
    path = folder / f"weights-{rank:05d}.safetensors"
    try:
        with writing(path):
            folder.mkdir(exist_ok=True)  # on a network file system the folder may not be visible here yet
            record, table = write_shard(path, parts)
    except (CannotWrite, CheckpointError, InternalError) as error:
        return _failure(error)
    return {
        "files": {path.name: record.to_json()},
        "tensors": {name: tensor.to_json() for name, tensor in table.items()},
    }


def _finish(root: Path, folder: Path, step: int, reports: list[Any], meta: Any) -> dict[str, Any]:
    """Rank 0: commit when all ranks wrote, else remove the folder; returns the failure or {}."""
    try:
        for report in reports:
            _raise_if_failed(report)
        manifest = _assemble(step, reports, meta)
        with writing(folder):
            _commit(root, folder, manifest)
    except MegallmError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return _failure(error)
    return {}


def _assemble(step: int, reports: list[Any], meta: Any) -> Manifest:
    files = {name: file_from_json(entry, name) for report in reports for name, entry in report["files"].items()}
    tensors = merge_tables([table_from_json(report["tensors"]) for report in reports])
    manifest = Manifest(step, files, tensors, meta)
    manifest.check()
    return manifest


def _commit(root: Path, folder: Path, manifest: Manifest) -> None:
    """The manifest last, then the rename; a step of the same number gives way (raises OSError)."""
    try:
        data = manifest.encode()
    except (TypeError, ValueError) as error:
        raise InternalError(f"The 'meta' of a checkpoint must be JSON: {error}.") from error
    _await_files(folder, manifest)
    with ShardWriter(folder / MANIFEST) as file:
        file.write(data)
    fsync_dir(folder)
    final = root / step_name(manifest.step)
    if final.exists():
        _replace(root, folder, final, data)
    else:
        os.rename(folder, final)
    fsync_dir(root)


def _replace(root: Path, folder: Path, final: Path, data: bytes) -> None:
    """Put `folder` where an older save of the same step lies.

    The same content stays as it is. Otherwise two renames are needed; a crash between them leaves the step
    before as the newest.
    """
    with suppress(CheckpointError):
        load_manifest(final)
        if bytes(read_regular(final / MANIFEST, 0, None)) == data:
            shutil.rmtree(folder)
            return
    aside = _set_aside(final)
    os.rename(folder, final)
    fsync_dir(root)
    shutil.rmtree(aside, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Give a step a temporary name at once, so that a crash while deleting never shows half a step."""
    aside = folder.with_name(f"{folder.name}.tmp-{_host()}.{os.getpid()}.{secrets.token_hex(4)}")
    os.rename(folder, aside)
    return aside


def _await_files(folder: Path, manifest: Manifest) -> None:
    """Wait until rank 0 sees every shard with its size. Errors: `CannotWrite` when one does not appear."""
    deadline = time.monotonic() + _APPEAR_SECONDS
    while problem := next(file_problems(folder, manifest), None):
        if time.monotonic() > deadline:
            raise CannotWrite(
                f"{problem} Rank 0 must see what every rank wrote: put the run folder on a file system that all "
                "hosts share."
            )
        time.sleep(0.1)


def sweep(root: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary folders of saves and deletions whose process is dead; returns what went.

    Only names of our own pattern. On this host a folder is dead when its process is gone or is this one (a
    process saves one step at a time); of another host, when nothing in it changed for `STALE_SECONDS`.
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
    """Seconds since the epoch of the last change in a folder; infinity when it goes away meanwhile."""
    try:
        with os.scandir(folder) as entries:
            return max([folder.stat().st_mtime, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
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


def retire(root: str | os.PathLike[str], keep: int, step: int) -> list[Path]:
    """Delete the steps older than the newest `keep` valid ones up to `step`; returns what went.

    Call it when `step` is durable. Pinned steps and steps that a `Reader` on this host holds open stay.
    What cannot be deleted is logged and stays.
    """
    gone, valid = [], 0
    for number, folder in step_folders(root):
        if number > step:
            continue
        if valid >= keep:
            if not pin_file(folder).exists() and _delete(folder):
                gone.append(folder)
            continue
        with suppress(CheckpointError):
            load_manifest(folder)
            valid += 1
    return gone


def _delete(folder: Path) -> bool:
    try:
        with _unread(folder) as free:
            if not free:
                return False
            aside = _set_aside(folder)
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


def _hold(manifest: Path) -> int:
    """A descriptor with a shared lock on the manifest; -1 when it cannot be opened (loading it then says why)."""
    try:
        fd = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    with suppress(OSError):  # a file system without locks: only pins protect a reader there
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def pin_file(folder: str | os.PathLike[str]) -> Path:
    """The marker beside a step folder that keeps retention away from it: `step-00001200.pin`."""
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


class Reader:
    """An open checkpoint. Reads any box of any tensor, whatever layout wrote it; every byte's hash is checked.

    While it is open, retention on this host does not delete the step. Errors of all methods: `CheckpointError`.
    """

    def __init__(self, step_folder: str | os.PathLike[str]) -> None:
        self.folder = Path(step_folder)
        self._lock = _hold(self.folder / MANIFEST)
        try:
            self.manifest = load_manifest(self.folder)
        except CheckpointError:
            self.close()
            raise
        self._pieces = PieceReader(self.folder, self.manifest)

    @property
    def meta(self) -> Any:
        """The JSON value that `save` got."""
        return self.manifest.meta

    @property
    def step(self) -> int:
        return self.manifest.step

    def names(self) -> list[str]:
        return sorted(self.manifest.tensors)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Full logical shape and stored dtype of a tensor."""
        if name not in self.manifest.tensors:
            close = difflib.get_close_matches(name, self.manifest.tensors, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise CheckpointError(f"{self.folder} holds no tensor named {name}.{hint}")
        record = self.manifest.tensors[name]
        return record.full, TORCH_DTYPES[record.dtype]

    @torch.no_grad()
    def read_into(self, name: str, offset: Sequence[int], tensor: torch.Tensor) -> None:
        """Fill `tensor` with the box at `offset` of the logical tensor `name`; any strides, any device.

        The dtype must be the stored one. A piece's hash is checked before any byte of it reaches `tensor`.
        """
        full, dtype = self.info(name)
        if tensor.dtype != dtype:
            raise CheckpointError(f"Tensor {name} is stored as {dtype}; it cannot be read into {tensor.dtype}.")
        target = Box(tuple(offset), tuple(tensor.shape))
        problem = outside_problem(full, target)
        if problem is not None:
            raise CheckpointError(f"Tensor {name} of shape {full} cannot be read that way: {problem}.")
        pieces = self.manifest.tensors[name].pieces
        for index, source, destination in plan_reads(target, [piece.box for piece in pieces]):
            copy_bytes(tensor[destination], self._pieces.load(name, pieces[index])[source])

    def read(self, name: str) -> torch.Tensor:
        """A whole logical tensor on the CPU, in its stored dtype."""
        full, dtype = self.info(name)
        tensor = torch.empty(full, dtype=dtype)
        self.read_into(name, (0,) * len(full), tensor)
        return tensor

    def problems(self, rank: int = 0, size: int = 1) -> Iterator[str]:
        """Read and hash everything; a sentence for each damaged piece or header. Not collective.

        Rank `rank` of `size` looks at every `size`-th piece and header, so that ranks can share the work.
        """
        for file in sorted(self.manifest.files)[rank::size]:
            try:
                self._pieces.check_header(file)
            except CheckpointError as error:
                yield str(error)
        pieces = [(name, piece) for name in self.names() for piece in self.manifest.tensors[name].pieces]
        for name, piece in sorted(pieces, key=lambda item: (item[1].file, item[1].offset))[rank::size]:
            try:
                self._pieces.load(name, piece)
            except CheckpointError as error:
                yield str(error)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
