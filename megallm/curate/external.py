"""Records of fixed size that may not fit into memory: scattered over files by a number, taken one
file at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megallm.base import extension
from megallm.base.files import writing

_SMALL, _FILTER_BITS = 4096, 16
_HEAD_ROOM = 4  # sorting one file takes a few times its size


def parts_for(total_bytes: int, memory_bytes: int) -> int:
    """Returns how many files, so that one of them can be sorted within the memory."""
    return max(1, -(-total_bytes * _HEAD_ROOM // max(memory_bytes, 1)))


class Scatter:
    """Appends records to `parts` files in `folder`; equal numbers always meet in the same file, in
    order of arrival.
    """

    def __init__(self, folder: Path, parts: int, dtype: np.dtype) -> None:
        self.folder, self.parts, self.dtype = folder, parts, dtype
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for part in range(parts):
                self._path(part).write_bytes(b"")

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}"

    def add(self, records: np.ndarray, part: np.ndarray) -> None:
        """Put each record into the file of its number, uint or int [records] below `parts`."""
        if not len(records):
            return
        order = np.argsort(part, kind="stable")
        numbers, first = np.unique(part[order], return_index=True)
        ends = [*first[1:], len(records)]
        with writing(self.folder):
            for number, begin, end in zip(numbers, first, ends, strict=True):
                with open(self._path(int(number)), "ab") as file:
                    file.write(np.ascontiguousarray(records[order[begin:end]]).tobytes())

    def each(self) -> Iterator[np.ndarray]:
        """Yields the records of one file after the other; each file is removed once it was
        taken.
        """
        for part in range(self.parts):
            path = self._path(part)
            yield np.fromfile(path, self.dtype)
            path.unlink()


def partition_of(hashes: np.ndarray, parts: int) -> np.ndarray:
    """Returns a number below `parts` for each hash, by its high bits, so that files keep the order
    of the hashes.
    """
    return ((hashes >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)


def contains(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns which values, uint64, are in the sorted table (it may be a memory map), bool
    [values].
    """
    if not len(table) or not len(values):
        return np.zeros(len(values), bool)
    native = extension.index()
    if native is not None and len(table) <= _SMALL < len(values):
        return native.contains(table, values)
    if len(table) > _SMALL or len(values) <= _SMALL:
        place = np.minimum(np.searchsorted(table, values), len(table) - 1)
        return np.asarray(table[place]) == values
    some = np.zeros(
        1 << _FILTER_BITS, bool
    )  # says no to nearly every hash that is not in a small table
    some[table >> np.uint64(64 - _FILTER_BITS)] = True
    maybe = np.flatnonzero(some[values >> np.uint64(64 - _FILTER_BITS)])
    out = np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(table, values[maybe]), len(table) - 1)
    out[maybe] = table[place] == values[maybe]
    return out
