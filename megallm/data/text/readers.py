"""Raw text files, cut into chunks of bounded size: JSONL, plain text, Parquet; `textfile` opens and
unpacks them.

`chunks` runs in the parent and cuts; `parse_chunk` runs in a worker and turns a chunk into
documents and rejected lines. How a file is cut depends on nothing but the file, so neither does any
result.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, AnyStr, BinaryIO

from megallm.base.errors import DataError, UsageError
from megallm.data.text import parquet, textfile
from megallm.data.text.textfile import TextFile

CHUNK_BYTES = textfile.BLOCK_BYTES
_SEEK_BYTES = 1 << 14  # read at once where a chunk may end
_TEXT_SUFFIXES = (".txt", ".text", ".md")
_SPLITS = ("file", "lines", "paragraphs")
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_TYPES = {
    type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object",
    bytes: "binary value, or text that is not UTF-8",
}  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """What a document is: the JSON keys of its texts, how plain text is split, and how long one may
    be.
    """

    keys: tuple[str, ...] = ("text",)
    split_text: str = "file"
    max_document_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.split_text not in _SPLITS:
            raise UsageError(
                f"--split-text {self.split_text} is unknown; accepted: {', '.join(_SPLITS)}."
            )
        if (
            not self.keys
            or len(set(self.keys)) < len(self.keys)
            or any("/" in key or not key for key in self.keys)
        ):
            raise UsageError(
                f"--json-keys {' '.join(self.keys)}: give one or more different names without '/'."
            )
        if self.max_document_bytes < 1:
            raise UsageError(
                f"The longest document must be at least 1 byte; got {self.max_document_bytes}."
            )


@dataclass(frozen=True)
class Chunk:
    """Some whole documents of one file: `data`, or for a plain file its range [begin, end), or
    Parquet `rows`.

    `too_long` says that here was one document over the limit, of so many `lines`; it was not kept.
    """

    file: str
    kind: str
    begin: int = 0
    end: int = 0
    data: bytes | None = None
    rows: list[tuple[Any, ...]] | None = None
    too_long: bool = False
    lines: int = 0

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass
class Parsed:
    """Documents (line, one text per key), rejected lines (line, reason), and counts of lines; lines
    from 0.
    """

    documents: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    blank: int = 0


def check_inputs(inputs: Sequence[str]) -> None:
    """Refuse what is not a readable file before any work starts. Errors: `DataError`."""
    if not inputs:
        raise UsageError("There is no input: give at least one file.")
    textfile.check_readable(inputs)


def suffix_of(name: str) -> str:
    """Returns the suffix that says what is in a file, in lower case: .jsonl of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in textfile.SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def chunks(name: str, options: ReadOptions) -> Iterator[Chunk]:
    """Cut one file. Errors: `DataError` for a file that cannot be read or decompressed."""
    suffix = suffix_of(name)
    kind = options.split_text if suffix in _TEXT_SUFFIXES else "jsonl"
    with textfile.damage(name), textfile.opened(name) as file:
        if file.parquet or suffix == ".parquet":
            yield from _cut_parquet(file, options)
            return
        begin = 0
        if file.by_range and kind in ("jsonl", "lines"):
            for chunk in _cut_by_seeking(name, kind, file.raw, options.max_document_bytes):
                yield chunk
                begin = chunk.end
            file.raw.seek(begin)
        for chunk in _cut(name, kind, file.blocks(), options.max_document_bytes, begin):
            keep = chunk.too_long or not file.by_range
            yield chunk if keep else Chunk(name, kind, chunk.begin, chunk.end)


def _cut_parquet(file: TextFile, options: ReadOptions) -> Iterator[Chunk]:
    if file.packing:
        raise DataError(
            f"{file.name} is a packed Parquet file, which is not read: unpack it, and give that."
        )
    if textfile.is_stream(file.name):
        raise DataError(f"{file.name} is a pipe, but Parquet is read from its end: give a file.")
    for rows in parquet.row_batches(
        file.name, options.keys, CHUNK_BYTES, options.max_document_bytes
    ):
        yield Chunk(file.name, "rows", rows=rows or None, too_long=not rows, lines=1)


def read_texts(inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
    """Yields every text of every file, in order, in this process. Errors: `DataError` `file:line:
    reason`.
    """
    check_inputs(inputs)
    for name in inputs:
        first = 1
        for chunk in chunks(name, options):
            parsed = parse_chunk(chunk, options)
            for line, reason in parsed.rejects:
                raise rejected(name, first + line, reason)
            first += parsed.lines
            for _, document in parsed.documents:
                yield from document


def rejected(name: str, line: int, reason: str) -> DataError:
    """Returns the error of the policy "stop"."""
    return DataError(
        f"{name}:{line}: {reason}. Mend the line, or pass --on-error skip to leave such lines out."
    )


@dataclass(frozen=True)
class _Separator:
    """Where documents end in a stretch of a file: just after the first or the last match, 0 for
    none.
    """

    marks: tuple[bytes, ...]

    def last(self, data: bytearray) -> int:
        return max(
            (at + len(mark) for mark in self.marks if (at := data.rfind(mark)) >= 0), default=0
        )

    def first(self, data: bytearray) -> int:
        return min(
            (at + len(mark) for mark in self.marks if (at := data.find(mark)) >= 0), default=0
        )


_LINE = _Separator((b"\n",))
_SEPARATORS = {
    "jsonl": _LINE, "lines": _LINE, "paragraphs": _Separator((b"\n\n", b"\n\r\n")), "file": _Separator(()),
}  # fmt: skip


def _cut_by_seeking(name: str, kind: str, file: BinaryIO, limit: int) -> Iterator[Chunk]:
    """Ranges of whole lines of a plain file, looking only where they might end; stops before a very
    long line.
    """
    size = os.fstat(file.fileno()).st_size
    begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    while begin < size:
        end = begin + CHUNK_BYTES
        found = -1
        while found < 0 and end < size and end - begin < CHUNK_BYTES + min(limit, CHUNK_BYTES):
            file.seek(end)
            block = file.read(_SEEK_BYTES)
            found = block.find(b"\n")
            end += len(block) if found < 0 else found + 1
        if found < 0 and end < size:
            return
        end = min(end, size)
        yield Chunk(name, kind, begin, end)
        begin = end


def _cut(
    name: str, kind: str, blocks: Iterator[bytes], limit: int, begin: int = 0
) -> Iterator[Chunk]:
    """Whole documents, about CHUNK_BYTES at once; holds no more than the limit and two blocks.

    begin: where in the file the blocks begin.
    """
    separator = _SEPARATORS[kind]
    held = bytearray()  # not yet given out; held[0] is byte `begin` of the file
    dropped_lines, dropping, first = 0, False, begin == 0
    for block in blocks:
        held += block
        if first and held.startswith(_BOM):
            del held[: len(_BOM)]
            begin = len(_BOM)
        first = False
        if dropping:
            end = separator.first(held)
            gone = end or max(len(held) - 2, 0)  # a separator may straddle two blocks
            dropped_lines += held.count(b"\n", 0, gone)
            del held[:gone]
            begin += gone
            if not end:
                continue
            yield Chunk(name, kind, too_long=True, lines=dropped_lines)
            dropping, dropped_lines = False, 0
        end = separator.last(held)
        if end:
            yield Chunk(name, kind, begin, begin + end, bytes(held[:end]))
            del held[:end]
            begin += end
        dropping = len(held) > limit
    if dropping:
        yield Chunk(
            name,
            kind,
            too_long=True,
            lines=dropped_lines + held.count(b"\n") + (held[-1:] != b"\n"),
        )
    elif held:
        yield Chunk(name, kind, begin, begin + len(held), bytes(held))


def parse_chunk(chunk: Chunk, options: ReadOptions) -> Parsed:
    """Returns documents and rejected lines of a chunk."""
    if chunk.too_long:
        reason = f"the document is longer than {options.max_document_bytes} bytes"
        if chunk.kind == "file":
            reason += " (--split-text lines or paragraphs makes several of one file)"
        return Parsed(rejects=[(0, reason)], lines=chunk.lines)
    if chunk.rows is not None:
        return _parse_rows(chunk.rows, options)
    data = bytes_of(chunk)
    parsed = Parsed(lines=data.count(b"\n") + (data[-1:] not in (b"\n", b"")))
    loads = fast_loads() if chunk.kind == "jsonl" else None
    for line, raw in (
        enumerate(lines_of(data)) if loads is not None else _documents(chunk.kind, data)
    ):
        found = None if loads is None else _quick_texts(raw, options, loads)
        if found is None:
            _parse_one(line, raw, chunk.kind, options, parsed)
        else:
            parsed.documents.append((line, found))
    return parsed


def bytes_of(chunk: Chunk) -> bytes:
    """Returns the lines of a chunk, read from its file when the chunk is only a range."""
    if chunk.data is not None:
        return chunk.data
    with open(chunk.file, "rb") as file:
        file.seek(chunk.begin)
        return file.read(chunk.size)


def _parse_one(
    line: int, raw: bytes | str, kind: str, options: ReadOptions, parsed: Parsed
) -> None:
    """Add one document, or the reason against it, to `parsed`."""
    try:
        if _encoded_size(raw) > options.max_document_bytes:
            raise BadLine(f"the document is longer than {options.max_document_bytes} bytes")
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        if not text.strip():
            parsed.blank += 1
        elif kind == "jsonl":
            parsed.documents.append((line, _texts_of_json(text, options.keys)))
        else:
            whole = text if kind == "file" else text.rstrip("\r")
            parsed.documents.append((line, (whole,) * len(options.keys)))
    except UnicodeDecodeError as error:
        parsed.rejects.append((line, f"invalid UTF-8 at byte {error.start} of the document"))
    except BadLine as reject:
        parsed.rejects.append((line, reject.reason))


@cache
def fast_loads() -> Callable[[bytes], Any] | None:
    """Returns orjson's reader where it is installed. It only ever says yes: a line it refuses is
    judged by `json`.
    """
    try:
        return importlib.import_module("orjson").loads
    except ImportError:
        return None


def _quick_texts(
    raw: bytes, options: ReadOptions, loads: Callable[[bytes], Any]
) -> tuple[str, ...] | None:
    """Returns the texts of a line without any fault, else None."""
    if len(raw) > options.max_document_bytes:
        return None
    try:
        value = loads(raw)
    except ValueError:
        return None
    if type(value) is not dict:
        return None
    found = tuple([value.get(key) for key in options.keys])
    return found if all(type(text) is str for text in found) else None


def lines_of(data: AnyStr) -> list[AnyStr]:
    """Returns the lines without their ends; what a last newline ends is no line more."""
    lines = data.split("\n" if isinstance(data, str) else b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _encoded_size(raw: bytes | str) -> int:
    return len(raw) if isinstance(raw, bytes) or raw.isascii() else len(raw.encode("utf-8"))


class BadLine(Exception):
    """A line, or a document, that cannot be used, and the reason: a clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _documents(kind: str, data: bytes) -> Iterator[tuple[int, bytes | str]]:
    """(line, text) of the documents of a chunk; bytes where the chunk as a whole is not UTF-8."""
    try:
        text: bytes | str = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data
    if kind == "file":
        yield 0, text
        return
    lines, newline = lines_of(text), "\n" if isinstance(text, str) else b"\n"
    if kind != "paragraphs":
        yield from enumerate(lines)
        return
    begin = 0
    for line, one in enumerate([*lines, newline]):
        if not one.strip():  # a blank line, or the end
            if line > begin:
                yield begin, newline.join(lines[begin:line])
            begin = line + 1


def json_of_line(raw: bytes | str) -> Any:
    """Returns the JSON value on a line. Raises BadLine for one that holds none."""
    try:
        return json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not valid JSON, {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadLine(f"not usable JSON, {error}") from None
    except RecursionError:
        raise BadLine("not usable JSON, it is nested too deeply") from None


def value_of(row: dict[str, Any], key: str) -> Any:
    """Returns the value of a key. Raises BadLine with the keys that there are."""
    if key not in row:
        raise BadLine(
            f"the key '{key}' is missing; the line has {_quoted(list(row)[:8]) or 'no keys'}"
        )
    return row[key]


def is_utf8(text: str) -> bool:
    """Returns whether a text has a form in UTF-8: no lone surrogate is in it."""
    return text.isascii() or not _SURROGATE.search(text)


def _texts_of_json(line: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    value = json_of_line(line)
    if not isinstance(value, dict):
        raise BadLine(
            f"the line holds a JSON {type_name(value)}, want an object with {_quoted(keys)}"
        )
    return _sound([value_of(value, key) for key in keys], keys)


def _parse_rows(rows: list[tuple[Any, ...]], options: ReadOptions) -> Parsed:
    parsed = Parsed(lines=len(rows))
    for row, values in enumerate(rows):
        try:
            texts_of_row = _sound(list(values), options.keys)
            if any(_encoded_size(text) > options.max_document_bytes for text in texts_of_row):
                raise BadLine(f"the document is longer than {options.max_document_bytes} bytes")
            parsed.documents.append((row, texts_of_row))
        except BadLine as reject:
            parsed.rejects.append((row, reject.reason))
    return parsed


def _sound(values: list[Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the values as texts, or a `BadLine` for one that is no string or holds a lone
    surrogate.
    """
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            raise BadLine(f"the value of '{key}' is a {type_name(value)}, want a string")
        if not is_utf8(value):
            raise BadLine(f"the value of '{key}' holds a lone surrogate, which UTF-8 cannot hold")
    return tuple(values)


def type_name(value: Any) -> str:
    """Returns what JSON calls the type of a value."""
    return _TYPES.get(type(value), type(value).__name__)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
