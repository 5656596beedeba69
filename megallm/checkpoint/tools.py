"""What `megallm ckpt ls|show|verify|diff|dump` do: functions that return plain data, for the
command to print.

A source is a run folder, its `checkpoints` folder or one step folder; the first two mean their
newest valid step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megallm.base.errors import CheckpointError
from megallm.base.files import atomic_path, writing
from megallm.base.progress import Progress, quiet
from megallm.checkpoint.io import raw
from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.reader import CheckpointReader, load_manifest, step_folders
from megallm.checkpoint.retention import pin, pin_file, unpin
from megallm.checkpoint.shard_file import ShardWriter, header_bytes
from megallm.checkpoint.store import latest, latest_whole

CHECKPOINTS = "checkpoints"

log = logging.getLogger(__name__)


def root_of(source: str | os.PathLike[str]) -> Path:
    """Returns the folder that holds the steps of a run folder (or of itself)."""
    source = Path(source)
    return source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source


def resolve_step(
    source: str | os.PathLike[str], wanted: Callable[[str], bool] | None = None
) -> Path:
    """Returns the step folder that a source means; of a run folder the newest whose `wanted`
    tensors are whole.

    Without `wanted` hashes are not looked at. What is passed over is logged. A step that is named
    is taken as it is. Errors: `CheckpointError` when there is none that is valid.
    """
    source = Path(source)
    if (source / MANIFEST).exists():
        return source
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is not a folder; give a run folder or a checkpoint step folder."
        )
    root = root_of(source)
    found, warnings = latest(root) if wanted is None else latest_whole(root, wanted=wanted)
    for warning in warnings if found is not None else ():
        log.warning("%s %s is used.", warning, found.name)
    if found is None:
        details = (
            " ".join(warnings)
            or "Checkpoints are folders named like step-00001200 with a manifest.json."
        )
        raise CheckpointError(f"{source} holds no valid checkpoint. {details}")
    return found


def _all(name: str) -> bool:
    return True


def ls(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns all steps, oldest first: step, path, bytes, valid, problem (None when valid), pinned.
    Hashes are not read.
    """
    if not Path(source).is_dir():
        raise CheckpointError(f"{source} is not a folder; give a run folder.")
    rows = []
    for step, folder in reversed(step_folders(root_of(source))):
        nbytes, problem = 0, None
        try:
            nbytes = load_manifest(folder).nbytes
        except CheckpointError as error:
            problem = str(error)
        rows.append(
            {
                "step": step,
                "path": str(folder),
                "bytes": nbytes,
                "valid": problem is None,
                "problem": problem,
                "pinned": pin_file(folder).exists(),
            }
        )
    return rows


def show_step(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns one step: step, path, bytes, files, meta, and tensors as rows of name, full, dtype,
    pieces, bytes.
    """
    folder = resolve_step(source)
    manifest = load_manifest(folder)
    tensors = [
        {
            "name": name,
            "full": list(record.full),
            "dtype": record.dtype,
            "pieces": len(record.pieces),
            "bytes": record.nbytes,
        }
        for name, record in sorted(manifest.tensors.items())
    ]
    return {
        "step": manifest.step,
        "path": str(folder),
        "bytes": manifest.nbytes,
        "files": sorted(manifest.files),
        "tensors": tensors,
        "meta": manifest.meta,
    }


def verify_checkpoint(source: str | os.PathLike[str], progress: Progress = quiet) -> dict[str, Any]:
    """Read every byte of one step and compare with its hash: step, path, ok, pieces, bytes,
    problems (sentences).

    A step folder that cannot even be opened is reported as a problem, not raised.
    """
    folder = resolve_step(source)
    try:
        with CheckpointReader(folder) as reader:
            manifest = reader.manifest
            found = [
                *reader.problems(progress=progress),
                *_extra_files(folder, set(manifest.files)),
            ]
            problems = list(dict.fromkeys(found))
    except CheckpointError as error:
        return {
            "step": None,
            "path": str(folder),
            "ok": False,
            "pieces": 0,
            "bytes": 0,
            "problems": [str(error)],
        }
    return {
        "step": manifest.step,
        "path": str(folder),
        "ok": not problems,
        "pieces": sum(len(record.pieces) for record in manifest.tensors.values()),
        "bytes": manifest.nbytes,
        "problems": problems,
    }


def _extra_files(folder: Path, known: set[str]) -> list[str]:
    return [
        f"{path} is not named in the manifest: it does not belong to this checkpoint."
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in known
    ]


def diff(
    first: str | os.PathLike[str], second: str | os.PathLike[str], progress: Progress = quiet
) -> dict[str, Any]:
    """Returns what differs between two steps: `same`, `tensors` (name, what, max_abs_error), `meta`
    (keys that differ) and `changes` (rows of dotted key, first, second).

    `what` is "only in first", "only in second", "shape or dtype" or "values". Values are compared
    bit by bit; max_abs_error is computed in float64 and is NaN when a NaN stands against a number,
    None without values.
    """
    rows = []
    with (
        CheckpointReader(resolve_step(first, _all)) as a,
        CheckpointReader(resolve_step(second, _all)) as b,
    ):
        names_a, names_b = set(a.names()), set(b.names())
        for number, name in enumerate(sorted(names_a | names_b)):
            progress("comparing", number, len(names_a | names_b), "tensors")
            row = None
            if name not in names_b:
                row = {"name": name, "what": "only in first", "max_abs_error": None}
            elif name not in names_a:
                row = {"name": name, "what": "only in second", "max_abs_error": None}
            elif a.info(name) != b.info(name):
                row = {"name": name, "what": "shape or dtype", "max_abs_error": None}
            elif a.manifest.tensors[name].nbytes:
                row = _value_row(name, a.read(name), b.read(name))
            if row is not None:
                rows.append(row)
        meta, changes = _differing_keys(a.meta, b.meta), list(_changes(a.meta, b.meta, ""))
    return {"same": not rows and not meta, "tensors": rows, "meta": meta, "changes": changes}


def _value_row(name: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any] | None:
    if raw(a) == raw(b):
        return None
    error = (a.double() - b.double()).abs()
    error = error[raw_differs(a, b)]
    return {"name": name, "what": "values", "max_abs_error": error.max().item()}


def raw_differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns where two tensors of one dtype and shape differ in their bits: bool of the same
    shape.
    """
    width = a.element_size()
    bytes_a = a.contiguous().reshape(-1, 1).view(torch.uint8).reshape(-1, width)
    bytes_b = b.contiguous().reshape(-1, 1).view(torch.uint8).reshape(-1, width)
    return (bytes_a != bytes_b).any(dim=1).reshape(a.shape)


def _differing_keys(a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return sorted(
            key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key]
        )
    return [] if a == b else ["meta"]


def _changes(a: Any, b: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each value of two metas that differs; what one lacks is None there."""
    if isinstance(a, dict | None) and isinstance(b, dict | None) and (a or b):
        a, b = a or {}, b or {}
        for name in sorted(a.keys() | b.keys()):
            yield from _changes(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield {"key": key, "first": a, "second": b}


def set_pin(source: str | os.PathLike[str], pinned: bool) -> dict[str, Any]:
    """Keep a step whatever retention says, or let it go again; returns step, path, pinned.

    Errors: `CheckpointError` when there is no valid step, `CannotWrite`.
    """
    folder = resolve_step(source)
    (pin if pinned else unpin)(folder)
    return {"step": load_manifest(folder).step, "path": str(folder), "pinned": pinned}


def dump(
    source: str | os.PathLike[str], output: str | os.PathLike[str], progress: Progress = quiet
) -> dict[str, Any]:
    """Write every logical tensor of one step, whole and in its stored dtype, to one safetensors
    file.

    Streamed: the header first, then one tensor after the other; the file appears only when it is
    complete. Returns step, output, tensors, bytes. Errors: `CheckpointError`, `CannotWrite`.
    """
    output = Path(output)
    with CheckpointReader(resolve_step(source, _all)) as reader:
        records = reader.manifest.tensors
        names = sorted(records, key=lambda name: (-records[name].itemsize, name))
        header = header_bytes(
            [
                (name, records[name].dtype, records[name].full, records[name].nbytes)
                for name in names
            ],
            {"format": "pt", "megallm.step": str(reader.step)},
        )
        with writing(output), atomic_path(output) as temporary, ShardWriter(temporary) as file:
            file.write(header)
            for name in names:
                progress("writing", file.position, reader.manifest.nbytes, "bytes")
                if records[name].nbytes:
                    file.write(raw(reader.read(name)))
        return {
            "step": reader.step,
            "output": str(output),
            "tensors": len(names),
            "bytes": file.position,
        }
