"""The rows of a file of conversations, with their lines: JSONL, JSON, CSV and Parquet; packed files
as `text.textfile` opens them. Pure.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megallm.base import optional
from megallm.base.errors import DataError
from megallm.data.text import parquet, readers, textfile
from megallm.data.text.readers import type_name

MAX_JSON_BYTES = 1 << 30  # of a file that is one JSON array: it is held in memory
MAX_ROW_BYTES = 64 << 20


@dataclass(frozen=True)
class Record:
    """A row and its line (from 1; of Parquet its number, of JSON and CSV where it begins), or the
    `reason` why it cannot be read.
    """

    line: int
    row: dict[str, Any] | None
    reason: str = ""


def records(name: str) -> Iterator[Record]:
    """Yields the rows of a file. Errors: `DataError` for a file that cannot be read at all."""
    textfile.check_readable([name])
    with textfile.damage(name), textfile.opened(name) as file:
        suffix = readers.suffix_of(name)
        if file.parquet or suffix == ".parquet":
            found = _parquet(name)
        elif suffix in (".csv", ".tsv"):
            found = _csv(file, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and file.start(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            found = None
        else:
            found = _jsonl(name)
        if found is not None:
            yield from found
            return
    with textfile.damage(name), textfile.opened(name) as file:  # its beginning was read
        yield from _json(file)


def _row(value: Any, line: int) -> Record:
    if not isinstance(value, dict):
        return Record(line, None, f"a JSON {type_name(value)}, want an object with columns")
    return Record(line, value)


def _jsonl(name: str) -> Iterator[Record]:
    first, fast = 1, readers.fast_loads()
    for chunk in readers.chunks(name, readers.ReadOptions(max_document_bytes=MAX_ROW_BYTES)):
        if chunk.too_long:
            yield Record(first, None, f"the row is longer than {MAX_ROW_BYTES} bytes")
            first += chunk.lines
            continue
        lines = readers.lines_of(readers.bytes_of(chunk))
        for number, raw in enumerate(lines, start=first):
            if not raw.strip():
                continue
            try:
                if fast is not None:
                    yield _row(fast(raw), number)
                    continue
            except ValueError:
                pass  # `json` judges, and says where
            yield _judged(raw, number)
        first += len(lines)


def _judged(raw: bytes, line: int) -> Record:
    try:
        return _row(readers.json_of_line(raw), line)
    except readers.BadLine as bad:
        return Record(line, None, bad.reason)


def _whole(file: textfile.TextFile) -> str:
    held, size = [], 0
    for block in file.blocks():
        held.append(block)
        size += len(block)
        if size > MAX_JSON_BYTES:
            raise DataError(
                f"{file.name} is one JSON array of more than {MAX_JSON_BYTES} bytes: write it as "
                "JSONL, one row a line."
            )
    try:
        return b"".join(held).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} holds invalid UTF-8 at byte {error.start}.") from None


def _json(file: textfile.TextFile) -> Iterator[Record]:
    """The elements of an array, one by one, so that each has its line; what is broken ends it."""
    text, decoder = _whole(file), json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _skipped(text, at, " \t\r\n,")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield Record(error.lineno, None, f"not valid JSON, {error.msg} at column {error.colno}")
            return
        except (ValueError, RecursionError) as error:
            yield Record(line, None, f"not usable JSON, {str(error)[:80]}")
            return
        yield _row(value, line)


def _skipped(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _csv(file: textfile.TextFile, delimiter: str) -> Iterator[Record]:
    """Rows under a line with the names of the columns; an empty cell is None."""
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    names, line = None, 1
    try:
        for row in rows:
            if names is None:
                names = row
                if len(set(names)) < len(names):
                    raise DataError(f"{file.name}:1: a column is named twice: {', '.join(names)}.")
            elif len(row) != len(names):
                if row:
                    yield Record(line, None, f"{len(row)} cells under {len(names)} columns")
            else:
                yield Record(
                    line, {n: cell if cell else None for n, cell in zip(names, row, strict=True)}
                )
            line = rows.line_num + 1
    except csv.Error as error:
        yield Record(line, None, f"not valid CSV, {error}")


def _lines(file: textfile.TextFile) -> Iterator[str]:
    """The lines of a text with their ends; bytes that are no UTF-8 as lone surrogates, which are
    refused with the text that holds them.
    """
    held, first = b"", True
    for block in file.blocks():
        held += block
        if first:
            held, first = held.removeprefix(b"\xef\xbb\xbf"), False
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "surrogateescape") + "\n"
    if held:
        yield held.decode("utf-8", "surrogateescape")


def _parquet(name: str) -> Iterator[Record]:
    library = optional.need_for_file("pyarrow.parquet", name)
    arrow = optional.need_for_file("pyarrow", name)
    try:
        columns = library.read_schema(name).names
    except arrow.ArrowException as error:
        raise DataError(f"{name} is not a Parquet file that can be read: {error}.") from error
    number = 0
    for rows in parquet.row_batches(name, columns, readers.CHUNK_BYTES, MAX_ROW_BYTES):
        if not rows:
            number += 1
            yield Record(number, None, f"the row has a value longer than {MAX_ROW_BYTES} bytes")
        for values in rows:
            number += 1
            yield Record(number, dict(zip(columns, values, strict=True)))
