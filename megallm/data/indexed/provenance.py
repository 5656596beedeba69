"""Which line of which file every document was made of, as it stands in a side-car: `{"files": [..],
"runs": [..]}`.

A run `[first document, file, first line]` holds until the next one: its documents stand on
consecutive lines. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

MAX_RUNS = 100_000  # more are not kept: a side-car is read whole


def locate_document(known: Mapping[str, Any], document: int) -> dict[str, Any]:
    """Returns {"file", "line"} of a document."""
    runs = known["runs"]
    first, file, line = runs[bisect_right(runs, document, key=lambda run: run[0]) - 1]
    return {"file": known["files"][file], "line": line + document - first}


def append(runs: list[list[int]], document: int, file: int, line: int) -> None:
    """Note where the next document was made, unless the last run says so already."""
    if runs:
        first, last_file, last_line = runs[-1]
        if last_file == file and line - last_line == document - first:
            return
    runs.append([document, file, line])


class MergedProvenance:
    """Collects the origins of stretches of datasets that are written one behind the other."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._runs: list[list[int]] = []
        self._documents = 0
        self._known = True

    def add(self, known: Mapping[str, Any] | None, begin: int, end: int) -> None:
        """Append the documents begin to end of a dataset with these origins (None: it does not
        say).
        """
        if begin < end and known is None:
            self._known = False
        if begin < end and self._known and known is not None:
            runs = known["runs"]
            at = bisect_right(runs, begin, key=lambda run: run[0]) - 1
            while at < len(runs) and runs[at][0] < end:
                first, file, line = runs[at]
                skipped = max(begin - first, 0)
                number = self._files.setdefault(known["files"][file], len(self._files))
                append(
                    self._runs, self._documents + first + skipped - begin, number, line + skipped
                )
                at += 1
            self._known = len(self._runs) <= MAX_RUNS
        self._documents += end - begin

    def origins(self) -> dict[str, Any] | None:
        """Returns what the side-car of all of them says; None when a part did not say, or there are
        too many runs.
        """
        return (
            {"files": list(self._files), "runs": self._runs} if self._known and self._runs else None
        )


def merge_provenance(
    parts: Iterable[tuple[Mapping[str, Any] | None, int]],
) -> dict[str, Any] | None:
    """Returns the origins of whole datasets one behind the other, each with its number of
    documents.
    """
    out = MergedProvenance()
    for known, documents in parts:
        out.add(known, 0, documents)
    return out.origins()
