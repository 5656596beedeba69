"""Where the text of a row came from: the line of the input file, and through a curation ledger the raw line. Pure."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError
from megallm.data import meta


def origin(prefix: str, document: int) -> dict[str, Any] | None:
    """{"file", "line"} that a document was made of; None when the side-car does not say."""
    side_car = meta.read(prefix) or {}
    known = side_car.get("origins")
    if not known:
        return None
    runs = known["runs"]  # [first document, file, first line]: documents on consecutive lines
    first, file, line = runs[bisect_right(runs, document, key=lambda run: run[0]) - 1]
    return {"file": known["files"][file], "line": line + document - first}


def raw_ids(places: Iterable[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, int], str]]:
    """((file, line), id) of the places that can still be read and are curated rows, which carry an id."""
    for place in places:
        path = Path(place["file"])
        if not path.is_file():
            continue
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            line = next(islice(lines, place["line"] - 1, None), b"")
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            yield (place["file"], place["line"]), row["id"]


def ledger_rows(path: str, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows of a curation ledger with these ids. Errors: `DataError`."""
    wanted, found, number = set(ids), {}, 0
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                if row["id"] in wanted:
                    found[row["id"]] = row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: not a row of a curation ledger: {error}.") from error
    return found
