"""A folder of distributed checkpoints `step-00001200/`: save them atomically, find the newest valid
one, keep a few.

Commit: every rank writes and syncs its shard in `step-N.tmp-<host>.<pid>.<id>/`, rank 0 writes the
manifest last, syncs, renames the folder and syncs its parent. A crash at any byte leaves the older
steps as they were, and a temporary folder that the next save sweeps once its writer is dead. A step
counts only when its manifest parses and every file has its size; the hashes are checked when bytes
are read, and by `latest_whole` before.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megallm.base.errors import (
    CannotWrite,
    CheckpointError,
    Diverged,
    InternalError,
    LeaseLost,
    MegallmError,
    NewerCheckpoint,
)
from megallm.base.files import fsync_dir, writing
from megallm.checkpoint.io import Part, write_shard
from megallm.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    TensorRecord,
    file_from_json,
    merge_tables,
    table_from_json,
)
from megallm.checkpoint.reader import (
    CheckpointReader,
    load_manifest,
    shard_file_problems,
    step_folders,
    step_name,
)
from megallm.checkpoint.retention import remove_stale_folders, retire, set_aside, temporary_step
from megallm.checkpoint.shard_file import ShardWriter, read_regular

_APPEAR_SECONDS = (
    5.0  # how long a shard of another host may take to appear on a network file system
)


class World(Protocol):
    rank: int
    size: int


class MeshProtocol(Protocol):
    """What saving needs of a mesh: all ranks, gather to rank 0 (None elsewhere), broadcast from
    rank 0.
    """

    world: World

    def gather_json(self, value: Any) -> list[Any] | None: ...
    def broadcast_json(self, value: Any) -> Any: ...


def latest(
    root: str | os.PathLike[str], without: Sequence[str] = ()
) -> tuple[Path | None, list[str]]:
    """Returns the newest valid step under `root` (None without any), and a warning for each newer
    one that is damaged.

    Steps whose names are in `without` are left out. Hashes of tensors are not looked at. Errors:
    `NewerCheckpoint` when the newest step is of a later megallm: that is no damage.
    """
    warnings = []
    for _, folder in step_folders(root):
        if folder.name in without:
            continue
        try:
            load_manifest(folder)
        except NewerCheckpoint:
            raise
        except CheckpointError as error:
            warnings.append(f"{folder.name} is damaged and passed over: {error}")
        else:
            return folder, warnings
    return None, warnings


@dataclass(frozen=True)
class RetentionPolicy:
    """What `save` does with older steps, and who may change the folder; that of rank 0 counts.

    `newest` valid steps stay, the new one included (0: all), and `proven` does. `guard` is called
    before each change of the folder and raises `LeaseLost` when it belongs to another job.
    """

    newest: int = 0
    proven: int | None = None
    guard: Callable[[], None] = lambda: None


def weights_only(name: str) -> bool:
    """Returns the tensors that a model is made of, without the optimizer's."""
    return not name.startswith("optim.")


def latest_whole(
    root: str | os.PathLike[str],
    mesh: MeshProtocol | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> tuple[Path | None, list[str]]:
    """Returns the newest step under `root` whose wanted tensors all match their hashes, and a
    warning for each newer one.

    Collective over the world: each rank reads its share, so a start reads a checkpoint once more,
    from the page cache if it fits (2 to 10 GB/s a rank, the speed of the file system or of xxh3).
    None: this process is alone. Errors, on all ranks: as of `latest`.
    """
    rank, size = (0, 1) if mesh is None else (mesh.world.rank, mesh.world.size)
    damaged: list[str] = []
    warnings: list[str] = []
    while True:
        answer = _newest(root, damaged) if rank == 0 else {}
        answer = answer if mesh is None else mesh.broadcast_json(answer)
        raise_failure(answer)
        name, passed = answer["name"], answer["passed"]
        warnings = sorted({*warnings, *passed}, reverse=True)  # by step, the newest first
        if name is None:
            return None, warnings
        problem = _first_problem(Path(root) / name, rank, size, wanted)
        told = [problem] if mesh is None else mesh.gather_json(problem)
        first = next((text for text in told or () if text), "")
        problem = first if mesh is None else mesh.broadcast_json(first)
        if not problem:
            return Path(root) / name, warnings
        damaged.append(name)
        warnings.append(f"{name} is damaged and passed over: {problem}")


def _newest(root: str | os.PathLike[str], damaged: Sequence[str]) -> dict[str, Any]:
    """What rank 0 tells the others of `latest`."""
    try:
        found, passed = latest(root, damaged)
    except CheckpointError as error:
        return failure(error)
    return {"name": found.name if found else None, "passed": passed}


def _first_problem(folder: Path, rank: int, size: int, wanted: Callable[[str], bool]) -> str:
    try:
        with CheckpointReader(folder) as reader:
            return next(reader.problems(rank, size, wanted), "")
    except CheckpointError as error:
        return str(error)


def save(
    root: str | os.PathLike[str],
    step: int,
    parts: Sequence[Part],
    meta: Any,
    mesh: MeshProtocol,
    keep: int | RetentionPolicy | None = None,
) -> Path:
    """Write one checkpoint; collective over world: every rank passes the parts it owns.

    `meta` is any JSON value (that of rank 0 counts). `keep` is how many valid steps stay, this one
    included; None or 0 keeps all. Errors, the same on every rank, with nothing left behind:
    `CannotWrite` when any rank cannot write; `LeaseLost`; `CheckpointError` or `InternalError` when
    the parts do not hold every tensor exactly once.
    """
    root = Path(root)
    keeping = keep if isinstance(keep, RetentionPolicy) else RetentionPolicy(keep or 0)
    first = mesh.world.rank == 0
    begun = mesh.broadcast_json(begin_save(root, step, keeping) if first else None)
    raise_failure(begun)
    folder = root / begun["folder"]
    reports = mesh.gather_json(_write_own(folder, mesh.world.rank, parts))
    done = (
        None
        if reports is None
        else finish_save(root, folder, keeping, lambda: assemble(step, reports, meta))
    )
    outcome = mesh.broadcast_json(done)
    if "error" in outcome:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # rank 0 did; a folder that is not shared has its own copy here
    raise_failure(outcome)
    return root / step_name(step)


_KINDS = {
    kind.__name__: kind
    for kind in (CannotWrite, CheckpointError, Diverged, InternalError, LeaseLost, NewerCheckpoint)
}


def failure(error: MegallmError) -> dict[str, str]:
    """Returns what a rank reports of an error while saving; `raise_failure` raises it again."""
    kind = type(error).__name__
    return {"error": str(error), "kind": kind if kind in _KINDS else InternalError.__name__}


def raise_failure(report: dict[str, Any]) -> None:
    """Raise the error that a report tells of, if it tells of one."""
    if "error" in report:
        raise _KINDS[report["kind"]](report["error"])


def begin_save(root: Path, step: int, keeping: RetentionPolicy) -> dict[str, str]:
    """Make the temporary folder of a save, after sweeping what dead writers left; for rank 0."""
    try:
        keeping.guard()
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            remove_stale_folders(root)
            folder = temporary_step(root / step_name(step))
            folder.mkdir()
    except CannotWrite as error:
        return failure(error)
    return {"folder": folder.name}


def _write_own(folder: Path, rank: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the shard of this rank; the report says what it holds, or why it failed. Never raises
    for either.
    """
    if not parts:
        return {"files": {}, "tensors": {}}
    path = folder / shard_name(rank)
    try:
        with writing(path):
            folder.mkdir(
                exist_ok=True
            )  # on a network file system the folder may not be visible here yet
            record, table = write_shard(path, parts)
    except (CannotWrite, CheckpointError, InternalError) as error:
        return failure(error)
    return shard_report(path.name, record, table)


def shard_name(rank: int) -> str:
    """Returns the name of the file in which a rank's parts lie."""
    return f"weights-{rank:05d}.safetensors"


def shard_report(
    name: str, record: FileRecord, table: Mapping[str, TensorRecord]
) -> dict[str, Any]:
    """Returns what a rank reports of the shard that it wrote."""
    return {
        "files": {name: record.to_json()},
        "tensors": {key: tensor.to_json() for key, tensor in table.items()},
    }


def finish_save(
    root: Path, folder: Path, keeping: RetentionPolicy, assemble: Callable[[], Manifest]
) -> dict[str, Any]:
    """Finish a save on rank 0: commit when all ranks wrote, else remove the folder. Returns the
    failure or {}.
    """
    try:
        manifest = assemble()
        with writing(folder):
            _commit(root, folder, manifest, keeping.guard)
        if keeping.newest:
            retire(root, keeping.newest, manifest.step, keeping.proven, keeping.guard)
    except MegallmError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return failure(error)
    return {}


def assemble(step: int, reports: list[Any], meta: Any) -> Manifest:
    """Returns the manifest from what all ranks report; raises what one of them reports instead."""
    for report in reports:
        raise_failure(report)
    files = {
        name: file_from_json(entry, name)
        for report in reports
        for name, entry in report["files"].items()
    }
    tensors = merge_tables([table_from_json(report["tensors"]) for report in reports])
    manifest = Manifest(step, files, tensors, meta)
    manifest.check()
    return manifest


def _commit(root: Path, folder: Path, manifest: Manifest, guard: Callable[[], None]) -> None:
    """The manifest last, then `guard`, then the rename; a step of the same number gives way (raises
    OSError).
    """
    try:
        data = manifest.encode()
    except (TypeError, ValueError) as error:
        raise InternalError(f"The 'meta' of a checkpoint must be JSON: {error}.") from error
    _await_files(folder, manifest)
    with ShardWriter(folder / MANIFEST) as file:
        file.write(data)
    fsync_dir(folder)
    final = root / step_name(manifest.step)
    guard()  # nothing slow follows until the rename
    if final.exists():
        _replace(root, folder, final, data)
    else:
        os.rename(folder, final)
    fsync_dir(root)


def _replace(root: Path, folder: Path, final: Path, data: bytes) -> None:
    """Put `folder` where an older save of the same step lies.

    The same content stays as it is. Otherwise two renames are needed; a crash between them leaves
    the step before as the newest.
    """
    with suppress(CheckpointError):
        load_manifest(final)
        if bytes(read_regular(final / MANIFEST, 0, None)) == data:
            shutil.rmtree(folder)
            return
    aside = set_aside(final)
    try:
        os.rename(folder, final)
    except OSError:
        os.rename(aside, final)
        raise
    fsync_dir(root)
    shutil.rmtree(aside, ignore_errors=True)


def _await_files(folder: Path, manifest: Manifest) -> None:
    """Wait until rank 0 sees every shard with its size. Errors: `CannotWrite` when one does not
    appear.
    """
    deadline = time.monotonic() + _APPEAR_SECONDS
    while problem := next(shard_file_problems(folder, manifest), None):
        if time.monotonic() > deadline:
            raise CannotWrite(
                f"{problem} Rank 0 must see what every rank wrote: put the run folder on a file "
                "system that all hosts share."
            )
        time.sleep(0.1)
