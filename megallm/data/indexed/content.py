"""What a dataset holds, as one hash over all bytes of its two files: read once, then remembered. No
torch.

xxh3-128 takes 0.2 s a GB from memory; a disk of 2 GB/s needs 0.5 s. `preprocess`, `merge` and
`split` hash what they have just written and keep it in `PREFIX.meta.json`, without a time, so that
equal data has an equal side-car. It counts while the file has its size, no later time than the
side-car, and 64 blocks that match. A run keeps what it found in RUN/data.json, with the times of
change: where these differ by a nanosecond the file is read again.
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
from megallm.data.indexed import meta

log = logging.getLogger(__name__)

SUFFIXES = ("bin", "idx")
_BLOCK = 1 << 18  # fits a cache
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_TOLD_BYTES = 1 << 30  # reading less than this passes without a word
_THREADS = 4  # xxh3 runs outside the interpreter's lock


def record_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns {bytes, xxh3_128, sampled} of one file: the hash of all of it, and of 64 blocks.
    Errors: `DataError`.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    return {"bytes": size, "xxh3_128": digest.hexdigest(), "sampled": _sampled(path, size)}


def _sampled(path: str | os.PathLike[str], size: int) -> str:
    digest, last = xxhash.xxh3_128(), max(0, size - _SAMPLE_BYTES)
    with open(path, "rb", buffering=0) as file:
        for number in range(_SAMPLES):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * number // (_SAMPLES - 1)))
    return digest.hexdigest()


def records_of(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, Any]:
    """Returns the record of each file, by the same keys."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(record_of, paths.values()), strict=True))


def contents(prefixes: list[str], memory: Path) -> dict[str, str]:
    """Returns the hash of each dataset: that of `.bin`, then that of `.idx`. `memory` is the file
    that remembers them.

    Errors: `DataError` for a file that cannot be read.
    """
    remembered = _load(memory)
    known = {prefix: _known(prefix, remembered) for prefix in prefixes}
    missing = {
        f"{prefix}.{suffix}": f"{prefix}.{suffix}"
        for prefix, records in known.items()
        for suffix in SUFFIXES
        if suffix not in records
    }
    size = sum(os.stat(path).st_size for path in missing.values() if os.path.exists(path))
    if size >= _TOLD_BYTES:
        log.warning(
            "Reading %.1f GB of data once, to recognise it when the run is resumed.", size / 1e9
        )
    made = records_of(missing)
    for prefix, records in known.items():
        for suffix in SUFFIXES:
            records.setdefault(suffix, made.get(f"{prefix}.{suffix}"))
    timed = {os.path.abspath(prefix): _timed(prefix, known[prefix]) for prefix in prefixes}
    if any(remembered.get(name) != records for name, records in timed.items()):
        try:
            files.atomic_write_json(memory, remembered | timed)
        except CannotWrite as error:
            log.warning("%s The data is read once more when the run is resumed.", error)
    return {
        prefix: "-".join(known[prefix][suffix]["xxh3_128"] for suffix in SUFFIXES)
        for prefix in prefixes
    }


def _known(prefix: str, remembered: Mapping[str, Any]) -> dict[str, Any]:
    """Records that still fit the files: those of an earlier start of this run, else those of the
    side-car.
    """
    records = remembered.get(os.path.abspath(prefix))
    fits = _is_as_it_was
    if not isinstance(records, dict):
        records, fits = (meta.read_meta(prefix) or {}).get("content"), _is_of_the_side_car
    return {
        suffix: record
        for suffix, record in (records.items() if isinstance(records, dict) else ())
        if suffix in SUFFIXES and isinstance(record, dict) and fits(record, prefix, suffix)
    }


def _is_as_it_was(record: Mapping[str, Any], prefix: str, suffix: str) -> bool:
    status = os.stat(f"{prefix}.{suffix}")
    return (record.get("bytes"), record.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)


def _is_of_the_side_car(record: Mapping[str, Any], prefix: str, suffix: str) -> bool:
    path = f"{prefix}.{suffix}"
    status, written = os.stat(path), os.stat(meta.path_of(prefix)).st_mtime_ns
    same = record.get("bytes") == status.st_size and status.st_mtime_ns <= written
    return same and record.get("sampled") == _sampled(path, status.st_size)


def _timed(prefix: str, records: Mapping[str, Any]) -> dict[str, Any]:
    return {
        suffix: record | {"mtime_ns": os.stat(f"{prefix}.{suffix}").st_mtime_ns}
        for suffix, record in records.items()
    }


def _load(memory: Path) -> dict[str, Any]:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
