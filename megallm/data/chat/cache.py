"""Rows as tokens in a folder, made once for each content of a file. Pure.

A folder is named by what decides its rows: the file's content (not its name), tokenizer, template
and rules. It holds an indexed dataset (`data.indexed`), in which a row is a document and a sequence
of it a sequence; beside it which tokens are trained, a table with one line a row, the columns of
prompts (or the ranks of answers), and the rows that could not be used. `cache.json` has the hash of
each; a folder that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megallm.base import files
from megallm.base.errors import DataError, MegallmError
from megallm.data.chat.formats import PAIRED, RowKind
from megallm.data.chat.rows import (
    LabelledRow,
    PreferenceRow,
    PromptRow,
    RankedRow,
    Row,
    RowCounts,
    SftRow,
)
from megallm.data.indexed.dataset import IndexedDataset, IndexedWriter, dtype_for

SCHEMA = 1
_META, _PREFIX, _TRAINED, _TABLE, _COLUMNS, _REJECTS = (
    "cache.json", "rows", "trained.bin", "table.bin", "columns.bin", "rejects.jsonl",
)  # fmt: skip
_BLOCK = 1 << 20
_ROW = np.dtype([
    ("line", "<i8"), ("prompt", "<i4"), ("margin", "<f8"), ("label", "<f8"), ("columns", "<i8"),
])  # fmt: skip


def content_hash(name: str) -> str:
    """Returns the hash of a file's bytes. Errors: DataError."""
    digest = xxhash.xxh3_128()
    try:
        with open(name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def cache_key(*parts: Any) -> str:
    """Returns the name of what these JSON values decide."""
    data = json.dumps([SCHEMA, *parts], sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Made:
    """What a maker yields for a line: its rows, or the reason why it gives none."""

    line: int
    rows: list[Row]
    reason: str = ""


class Tokenised:
    """The rows of one file, read from their folder. Errors: DataError for one that is damaged."""

    def __init__(self, folder: Path, kind: RowKind) -> None:
        self.folder, self.kind = folder, kind
        try:
            found = json.loads((folder / _META).read_text(encoding="utf-8"))
            hashes: Mapping[str, str] = found["hashes"]
            self.counts, self.said, self.key = (
                RowCounts(**found["counts"]),
                found["said"],
                found["key"],
            )
            self.largest = int(found["largest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a whole cache of rows: {error}.") from error
        for name, known in hashes.items():
            if content_hash(str(folder / name)) != known:
                raise DataError(f"{folder / name} is damaged.")
        self.table = np.fromfile(folder / _TABLE, _ROW)
        self.trained = _mapped(folder / _TRAINED)

    @cached_property
    def data(self) -> IndexedDataset:
        """Returns the ids."""
        return IndexedDataset(self.prefix)

    @property
    def prefix(self) -> str:
        """Of the indexed dataset."""
        return str(self.folder / _PREFIX)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def most_sequences(self) -> int:
        """Of a row."""
        return int(np.diff(self.data.document_indices).max(initial=1))

    def rejects(self) -> Iterator[tuple[int, str]]:
        """Yields (line, reason) of the rows that could not be used."""
        with open(self.folder / _REJECTS, encoding="utf-8") as lines:
            for line in lines:
                found = json.loads(line)
                yield found["line"], found["reason"]

    def row(self, number: int) -> Row:
        """Returns a row of the file, as it was made."""
        about = self.table[number]
        first, end = self.data.document_indices[number : number + 2].tolist()
        sequences = [self._sequence(i) for i in range(first, end)]
        prompt = sequences[0].ids[: int(about["prompt"])]
        if self.kind == "prompts":
            return PromptRow(sequences[0].ids, json.loads(self._columns(number)), number)
        if self.kind in PAIRED:
            return PreferenceRow(prompt, *sequences, float(about["margin"]))
        if self.kind == "ranked":
            return RankedRow(prompt, tuple(sequences), tuple(json.loads(self._columns(number))))
        if self.kind == "sft":
            return sequences[0]
        return LabelledRow(sequences[0], float(about["label"]), prompt)

    def _sequence(self, number: int) -> SftRow:
        begin = self.data.token_index(number)
        ids = self.data.get(number)
        return SftRow(ids.astype(np.int32), np.array(self.trained[begin : begin + len(ids)], bool))

    def _columns(self, number: int) -> bytes:
        begin = int(self.table[number - 1]["columns"]) if number else 0
        with open(self.folder / _COLUMNS, "rb") as file:
            file.seek(begin)
            return file.read(int(self.table[number]["columns"]) - begin)


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def load_or_make(
    cache: Path, key: str, kind: RowKind, make: Callable[[Path], None], note: Callable[[str], None]
) -> Tokenised:
    """Returns the rows called `key`: those in the cache, or what `make` writes into the folder that
    it is given.

    Several processes may do so at once: each makes a folder of its own, and the first stays.
    """
    folder = cache / key
    if folder.exists():
        try:
            return Tokenised(folder, kind)
        except MegallmError as error:
            note(f"{error} It is made again.")
            with suppress(OSError):
                shutil.rmtree(folder)
    with files.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_name(folder)
    try:
        with files.writing(temporary):
            temporary.mkdir()
        make(temporary)
        try:
            os.rename(temporary, folder)
            files.fsync_dir(cache)
        except OSError as error:
            if not folder.exists():
                raise files.cannot_write(folder, error) from error
        return Tokenised(folder, kind)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Writer:
    """Writes a folder of rows; `finish` makes it whole."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder, self.counts = folder, RowCounts()
        self._ids = IndexedWriter(folder / _PREFIX, dtype_for(vocab_size))
        names = (_TRAINED, _TABLE, _COLUMNS, _REJECTS)
        self._open = {name: open(folder / name, "wb") for name in names}  # noqa: SIM115
        self._columns, self._largest = 0, -1

    def close(self) -> None:
        """Close the files; what has no `cache.json` is no cache."""
        self._ids.abort()
        for file in self._open.values():
            file.close()

    def add(self, made: Made) -> None:
        """Append the rows of a line, or what is wrong with it."""
        with files.writing(self.folder):
            if made.reason:
                self._write(
                    _REJECTS,
                    json.dumps({"line": made.line, "reason": made.reason}).encode() + b"\n",
                )
            for row in made.rows:
                self._row(made.line, row)

    def _row(self, line: int, row: Row) -> None:
        prompt, margin, label = 0, 0.0, 0.0
        if isinstance(row, PreferenceRow):
            sequences = [row.chosen, row.rejected]
            prompt, margin = len(row.prompt), row.margin
        elif isinstance(row, RankedRow):
            sequences, prompt = [*row.sequences], len(row.prompt)
            self._columns += self._write(_COLUMNS, json.dumps(row.ranks).encode())
        elif isinstance(row, LabelledRow):
            sequences, prompt, label = [row.sequence], len(row.prompt), row.label
        elif isinstance(row, PromptRow):
            sequences = [SftRow(row.ids, np.zeros(len(row.ids), bool))]
            self._columns += self._write(_COLUMNS, json.dumps(row.columns).encode())
        else:
            sequences = [row]
        ids = np.concatenate([one.ids for one in sequences])
        self._largest = max(self._largest, int(ids.max(initial=-1)))
        self._ids.add(
            ids, np.array([len(one.ids) for one in sequences]), np.array([len(sequences)])
        )
        self._write(
            _TRAINED, np.concatenate([one.trained for one in sequences]).astype(np.uint8).tobytes()
        )
        about = np.array([(line, prompt, margin, label, self._columns)], _ROW)
        self._write(_TABLE, about.tobytes())

    def _write(self, name: str, data: bytes) -> int:
        return self._open[name].write(data)

    def finish(self, key: str, said: str, counts: RowCounts) -> None:
        """Write what makes the folder whole."""
        self._ids.commit()
        with files.writing(self.folder):
            for file in self._open.values():
                file.close()
        names = [*self._open, f"{_PREFIX}.bin", f"{_PREFIX}.idx"]
        hashes = {name: content_hash(str(self.folder / name)) for name in names}
        files.atomic_write_json(
            self.folder / _META,
            {
                "key": key,
                "said": said,
                "counts": vars(counts),
                "largest": self._largest,
                "hashes": hashes,
            },
        )
