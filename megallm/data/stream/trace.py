"""Where the text of a row came from: the line of the input file, and through a curation ledger the
raw line. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError
from megallm.data.indexed import meta, provenance
from megallm.data.text import readers

Place = tuple[str, int]  # file, line
_CURATED = ("id", "file", "line")  # what a curated row says about the raw document


def places(prefix: str, documents: Iterable[int]) -> list[dict[str, Any] | None]:
    """Returns {"file", "line"} that each document was made of; None where the side-car does not
    say.
    """
    known = (meta.read_meta(prefix) or {}).get("origins")
    return [
        provenance.locate_document(known, document) if known else None for document in documents
    ]


def raw_places(places: Iterable[Mapping[str, Any]]) -> dict[Place, tuple[str, Place]]:
    """Returns (id, raw place) by place, for those places that can still be read and hold curated
    rows.
    """
    wanted: dict[str, set[int]] = {}
    for place in places:
        if Path(place["file"]).is_file():
            wanted.setdefault(place["file"], set()).add(place["line"])
    return {
        (file, line): (str(row["id"]), (str(row["file"]), int(row["line"])))
        for file, lines in wanted.items()
        for line, row in _rows(file, lines)
        if isinstance(row.get("id"), str) and isinstance(row.get("line"), int)
    }


def _rows(file: str, lines: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects on some lines of a file (rows of Parquet), as far as they can be
    read.
    """
    first = 1
    try:
        for chunk in readers.chunks(file, readers.ReadOptions(keys=_CURATED)):
            found: list[Any] = [dict(zip(_CURATED, row, strict=True)) for row in chunk.rows or ()]
            if chunk.rows is None and not chunk.too_long:
                found = readers.lines_of(readers.bytes_of(chunk))
            for number in sorted(lines & set(range(first, first + len(found)))):
                row = _object(found[number - first])
                if row is not None:
                    yield number, row
            first += chunk.lines if chunk.too_long else len(found)
            if first > max(lines):
                return
    except DataError:
        return


def _object(row: Any) -> dict[str, Any] | None:
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def ledger_rows(
    path: str, wanted: Iterable[tuple[str, Place]]
) -> dict[tuple[str, Place], dict[str, Any]]:
    """Returns the rows of a curation ledger about these documents: id, and file and line, since ids
    of users may repeat.

    Errors: `DataError`.
    """
    left, found, number = set(wanted), {}, 0
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                key = (row["id"], (row["file"], row["line"]))
                if key in left:
                    found[key] = row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: not a row of a curation ledger: {error}.") from error
    return found
