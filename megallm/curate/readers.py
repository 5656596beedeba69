"""Raw files to documents: JSONL and Parquet (cut by `data.text.readers`), whole text files, HTML;
each also packed.

`file_units` runs in the parent and cuts; `parse_unit` runs in a worker. What cannot be read becomes
a `Reject` with file and line, or one of the whole file. At most one document of the allowed size
and two blocks are held, whatever a file unfolds to. `data.text.textfile` opens and unpacks.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from glob import glob
from pathlib import Path
from typing import Any
from uuid import UUID

from megallm.base import optional
from megallm.base.errors import DataError
from megallm.curate.config import InputConfig
from megallm.curate.document import Document
from megallm.curate.html import text_of_html
from megallm.data.text import readers, textfile

_JSONL = (".jsonl", ".json", ".ndjson", ".parquet")
_HTML = (".html", ".htm", ".xhtml")
_BOMB_BYTES = 64 << 20  # a small file may unfold as much as it likes
_CHARSET = re.compile(rb"charset=[\"']?([A-Za-z0-9_-]+)")
_BOM = b"\xef\xbb\xbf"
_MAX_DEPTH = 100  # of a value that is kept


@dataclass(frozen=True)
class Unit:
    """Part of one file: a chunk of lines or rows from `line` on, or a whole file, or the reason why
    it is neither.
    """

    file: str
    kind: str  # lines | rows | text | html | damaged
    size: int  # bytes
    line: int = 1
    chunk: readers.Chunk | None = None
    reason: str = ""


@dataclass(frozen=True)
class Reject:
    """A line that is no document; `whole`: or a file that cannot be read from that line on."""

    file: str
    line: int
    reason: str
    whole: bool = False


def find_inputs(config: InputConfig) -> list[str]:
    """Returns every input file, sorted. Errors: `DataError` for a name that matches nothing, or a
    pipe; `UsageError` when a package that reads one of them is missing."""
    found: set[str] = set()
    for name in config.files:
        path = Path(name)
        if path.exists() and not (path.is_dir() or path.is_file()):
            raise DataError(
                f"input.files: {name} is a pipe or a device, but the input is read again when a "
                "run is taken up: write it to a file first."
            )
        if path.is_dir():
            matches = [str(one) for one in path.rglob("*") if one.is_file()]
        else:
            matches = (
                [name]
                if path.is_file()
                else [one for one in glob(name, recursive=True) if Path(one).is_file()]
            )
        if not matches:
            raise DataError(
                f"input.files: {name} matches no file; give files, folders or patterns that exist."
            )
        found.update(matches)
    for name in sorted(found):
        _check_file(name, config)
    return sorted(found)


def _check_file(name: str, config: InputConfig) -> None:
    """That a file can be opened, and that the library is there that reads it; what is in it is
    judged later.
    """
    try:
        with textfile.opened(name) as file:
            file.check_library()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from error
    except DataError:
        return  # an archive: `file_units` says so, and input.on_bad_file decides
    if file_kind(name, config) == "html":
        optional.check_installed("selectolax.lexbor", "give text or JSONL files")


def file_kind(name: str, config: InputConfig) -> str:
    """Returns `jsonl` (and Parquet), `html` or `text`."""
    if config.format != "auto":
        return config.format
    suffix = readers.suffix_of(name)
    return "jsonl" if suffix in _JSONL else "html" if suffix in _HTML else "text"


def file_units(name: str, config: InputConfig) -> Iterator[Unit]:
    """Cut one file; what is damaged becomes a last unit that says so."""
    kind = file_kind(name, config)
    packed_bytes = Path(name).stat().st_size
    if kind != "jsonl" and not _is_parquet(name):
        yield Unit(name, kind, min(packed_bytes, config.max_document_bytes))
        return
    options = readers.ReadOptions(keys=_keys(config), max_document_bytes=config.max_document_bytes)
    line = 1
    bomb = max(_BOMB_BYTES, packed_bytes * config.max_unpacked_ratio)
    try:
        for chunk in readers.chunks(name, options):
            if chunk.data is not None and chunk.end > bomb:
                reason = (
                    f"the file unfolds to over {config.max_unpacked_ratio} times its size; the "
                    "rest was not read"
                )
                yield Unit(name, "damaged", 0, line, reason=reason)
                return
            kind = "rows" if chunk.rows is not None else "lines"
            yield Unit(name, kind, _size(chunk), line, chunk)
            line += _count_lines(chunk)
    except DataError as error:
        yield Unit(name, "damaged", 0, line, reason=str(error))


def _is_parquet(name: str) -> bool:
    try:
        with textfile.opened(name) as file:
            return file.parquet
    except DataError:
        return False  # an archive, which `parse_unit` refuses


def document_texts(names: Iterable[str], key: str = "text") -> Iterator[str]:
    """Yields the texts that are not empty, in order; lines that are no documents are passed over.
    Errors: `DataError`, also for a file that cannot be read to its end."""
    config = InputConfig(files=tuple(names), key=key)
    for name in find_inputs(config):
        for unit in file_units(name, config):
            for item in parse_unit(unit, config):
                if isinstance(item, Reject):
                    if item.whole:
                        raise DataError(f"{item.file}:{item.line}: {item.reason}")
                elif item.text.strip():
                    yield item.text


def _keys(config: InputConfig) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys([config.key, *([config.id_key] if config.id_key else []), *config.keep_keys])
    )


def _size(chunk: readers.Chunk) -> int:
    if chunk.rows is None:
        return chunk.size
    return sum(len(value) for row in chunk.rows for value in row if isinstance(value, str))


def _count_lines(chunk: readers.Chunk) -> int:
    if chunk.rows is not None:
        return len(chunk.rows)
    if chunk.too_long:
        return chunk.lines
    return readers.bytes_of(chunk).count(b"\n")


def parse_unit(unit: Unit, config: InputConfig) -> Iterator[Document | Reject]:
    """Yields documents and rejected lines of a unit, in order; ids are made of file and line unless
    there is `id_key`.
    """
    if unit.kind == "damaged":
        yield Reject(unit.file, unit.line, unit.reason, whole=True)
    elif unit.chunk is not None and unit.chunk.too_long:
        yield Reject(unit.file, unit.line, _too_long(config))
    elif unit.kind == "rows":
        assert unit.chunk is not None and unit.chunk.rows is not None
        for number, row in enumerate(unit.chunk.rows):
            yield _document(
                dict(zip(_keys(config), row, strict=True)), unit.file, unit.line + number, config
            )
    elif unit.kind == "lines":
        assert unit.chunk is not None
        for number, raw in enumerate(readers.bytes_of(unit.chunk).split(b"\n")):
            if raw.strip():
                yield _line(raw, unit.file, unit.line + number, config)
    else:
        yield _whole_file(unit, config)


def _too_long(config: InputConfig) -> str:
    return f"the document is longer than input.max_document_bytes={config.max_document_bytes}"


def _line(raw: bytes, file: str, line: int, config: InputConfig) -> Document | Reject:
    if len(raw) > config.max_document_bytes:
        return Reject(file, line, _too_long(config))
    value = _quick(raw, config)
    if value is not None:
        return _document(value, file, line, config)
    try:
        value = readers.json_of_line(raw)
    except readers.BadLine as bad:
        return Reject(file, line, bad.reason)
    if not isinstance(value, dict):
        return Reject(
            file,
            line,
            f"the line holds a JSON {readers.type_name(value)}, want an object with '{config.key}'",
        )
    return _document(value, file, line, config)


def _quick(raw: bytes, config: InputConfig) -> dict[str, Any] | None:
    """Returns the object on a line by the fast reader; None where `json` has to judge, or might
    read a number otherwise.
    """
    loads = readers.fast_loads()
    try:
        value = None if loads is None else loads(raw)
    except ValueError:
        return None
    sure = isinstance(value, dict) and all(
        isinstance(value.get(key, ""), str) for key in _keys(config)
    )
    return value if sure else None


def _document(
    value: dict[str, Any], file: str, line: int, config: InputConfig
) -> Document | Reject:
    try:
        text = readers.value_of(value, config.key)
    except readers.BadLine as bad:
        return Reject(file, line, bad.reason)
    if not isinstance(text, str):
        return Reject(
            file, line, f"the value of '{config.key}' is a {readers.type_name(text)}, want a string"
        )
    problem = _unsound(text)
    if problem:
        return Reject(file, line, problem)
    name = value.get(config.id_key) if config.id_key else None
    if name is not None and not isinstance(name, (str, int)):
        kind = readers.type_name(name)
        return Reject(
            file,
            line,
            f"the value of '{config.id_key}' is a {kind}, want a string or a whole number",
        )
    if isinstance(name, str) and not readers.is_utf8(name):
        return Reject(file, line, f"the value of '{config.id_key}' holds a lone surrogate")
    meta = {}
    for key in config.keep_keys:
        if key in value:
            try:
                meta[key] = _plain(value[key])
            except TypeError as error:
                return Reject(file, line, f"the value of '{key}' is {error}")
    return Document(f"{file}:{line}" if name is None else str(name), text, file, line, meta=meta)


def _plain(value: Any, depth: int = 0) -> Any:
    """Returns a value that strict JSON can hold: numbers that are not finite become null; of
    Parquet's types, times become ISO 8601 and decimals text. Errors: `TypeError` for others and for
    what is nested too deeply."""
    if depth > _MAX_DEPTH:
        raise TypeError(f"nested more than {_MAX_DEPTH} levels deep")
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, Decimal, UUID)):
        return str(value)
    raise TypeError(f"of the type {type(value).__name__}, which JSON cannot hold")


def _unsound(text: str) -> str:
    if "\0" in text:
        return "the text holds NUL bytes, so it is not text"
    if not readers.is_utf8(text):
        return "the text holds a lone surrogate, which UTF-8 cannot hold"
    return ""


def _whole_file(unit: Unit, config: InputConfig) -> Document | Reject:
    try:
        with textfile.damage(unit.file), textfile.opened(unit.file) as file:
            data = file.start(config.max_document_bytes + 1)
    except DataError as error:
        return Reject(unit.file, 1, str(error), whole=True)
    if len(data) > config.max_document_bytes:
        return Reject(unit.file, 1, _too_long(config))
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        declared = _CHARSET.search(data[:2048]) if unit.kind == "html" else None
        if declared is None:
            line = data.count(b"\n", 0, error.start) + 1
            return Reject(unit.file, line, f"invalid UTF-8 at byte {error.start}")
        try:
            text = data.decode(declared[1].decode())
        except (UnicodeDecodeError, LookupError):
            return Reject(
                unit.file, 1, f"neither UTF-8 nor the charset it declares, {declared[1].decode()}"
            )
    problem = _unsound(text)
    if problem:
        return Reject(unit.file, 1, problem)
    return Document(unit.file, text_of_html(text) if unit.kind == "html" else text, unit.file, 1)
