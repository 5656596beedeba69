"""What a dataset holds, as one hash over all bytes of its two files: read once, then remembered. No torch.

xxh3-128 takes 0.1 s a GB from memory; a disk of 2 GB/s needs 0.5 s. `preprocess`, `merge` and `split` hash what they
have just written and keep it in `PREFIX.meta.json`; for other files a run keeps it in RUN/data.json. A remembered hash
counts only while size and time of change of the file are the same to the nanosecond.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megallm.base import files
from megallm.base.errors import CannotWrite, DataError
from megallm.data import meta

log = logging.getLogger(__name__)

SUFFIXES = ("bin", "idx")
_BLOCK = 1 << 23
_TOLD_BYTES = 1 << 30  # reading less than this passes without a word
_THREADS = 4  # xxh3 runs outside the interpreter's lock


def record_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """{bytes, mtime_ns, xxh3_128} of one file. Errors: `DataError`."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "xxh3_128": digest.hexdigest()}


def records_of(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, Any]:
    """The record of each file, by the same keys."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(record_of, paths.values()), strict=True))


def contents(prefixes: list[str], memory: Path) -> dict[str, str]:
    """The hash of each dataset: that of `.bin`, then that of `.idx`. `memory` is the file that remembers them.

    Errors: `DataError` for a file that cannot be read.
    """
    remembered = _load(memory)
    known = {prefix: _known(prefix, remembered) for prefix in prefixes}
    missing = {
        f"{prefix}.{suffix}": f"{prefix}.{suffix}"
        for prefix, records in known.items() for suffix in SUFFIXES if suffix not in records
    }  # fmt: skip
    size = sum(os.stat(path).st_size for path in missing.values() if os.path.exists(path))
    if size >= _TOLD_BYTES:
        log.warning("Reading %.1f GB of data once, to recognise it when the run is resumed.", size / 1e9)
    made = records_of(missing)
    for prefix, records in known.items():
        for suffix in SUFFIXES:
            records.setdefault(suffix, made.get(f"{prefix}.{suffix}"))
    if missing:
        try:
            files.atomic_write_json(memory, remembered | {os.path.abspath(p): known[p] for p in prefixes})
        except CannotWrite as error:
            log.warning("%s The data is read once more when the run is resumed.", error)
    return {prefix: "-".join(known[prefix][suffix]["xxh3_128"] for suffix in SUFFIXES) for prefix in prefixes}


def _known(prefix: str, remembered: Mapping[str, Any]) -> dict[str, Any]:
    """Records that still fit the files: those of the side-car, else those of an earlier start."""
    side_car = meta.read(prefix) or {}
    found = {}
    for records in (remembered.get(os.path.abspath(prefix)), side_car.get("content")):
        for suffix in SUFFIXES:
            record = records.get(suffix) if isinstance(records, dict) else None
            if isinstance(record, dict) and _fits(record, f"{prefix}.{suffix}"):
                found[suffix] = record
    return found


def _fits(record: Mapping[str, Any], path: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    now = (status.st_size, status.st_mtime_ns)
    return (record.get("bytes"), record.get("mtime_ns")) == now and isinstance(record.get("xxh3_128"), str)


def _load(memory: Path) -> dict[str, Any]:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
