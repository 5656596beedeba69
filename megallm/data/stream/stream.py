"""The training stream: rows drawn from a mixture of sources by a plan, each token of an epoch
exactly once.

The state is counts: rows taken of each source, where each cursor stands, and the mixture's own
counts. It is all that a resumed run needs, whatever changes: the layout, the batch size, the
weights, the row length, the number of steps. Nothing before the cursors is looked at again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megallm.base.errors import DataError
from megallm.data.stream import fim
from megallm.data.stream.mixture import Mixture
from megallm.data.stream.plan import Reading, StreamPlan
from megallm.data.stream.source import Cursor, DocumentSource, PackedRow, Window

SCHEMA = 1


def holds_rearranged(state: Mapping[str, Any] | None) -> bool:
    """Returns whether going on from a state reads documents that fill-in-the-middle had rearranged
    already.
    """
    cursors = state["sources"].values() if state else ()
    return any(
        (
            cursor["row"] and Reading(*cursor["reading"]).fim_rate > 0
        )  # its window is packed once more
        or any(form in (fim.PSM, fim.SPM) for *_, form in cursor["held"])
        for cursor in cursors
    )


class Stream:
    """Draws rows; every rank draws all of them, and reads the tokens only of its own.

    sources: one for each prefix of the plan. Errors: `DataError` when `state` belongs to other
    files.
    """

    def __init__(
        self,
        plan: StreamPlan,
        sources: Mapping[str, DocumentSource],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.plan, self.sources = plan, dict(sources)
        self.places = 0  # rows x their length, taken so far
        self._mixture_state: dict[str, Any] = {}
        self._retired: dict[str, Any] = {}  # cursors of sources that this plan does not have
        self._cursors = {prefix: Cursor() for prefix in self.sources}
        self._windows: dict[str, tuple[Reading, Window]] = {}
        if state:
            self._restore(state)

    def take(self, count: int) -> list[PackedRow]:
        """Returns the next `count` rows, all by the segment that holds now."""
        segment = self.plan.at(self.places)
        mixture = Mixture.restore(segment.weights, self._mixture_state)
        rows = [self._next(mixture.draw(), segment.reading) for _ in range(count)]
        self._mixture_state = mixture.state()
        self.places += count * segment.reading.seq_len
        return rows

    def _next(self, prefix: str, reading: Reading) -> PackedRow:
        cursor, source = self._cursors[prefix], self.sources[prefix]
        window = self._window(prefix, reading)
        while cursor.row >= len(window.rows):
            cursor.position, cursor.held, cursor.epoch, cursor.row = (
                window.position,
                window.held,
                window.epoch,
                0,
            )
            window = source.open(cursor, reading)
            self._windows[prefix] = (reading, window)
        items = window.rows[cursor.row]
        cursor.row += 1
        cursor.rows += 1
        cursor.tokens += sum(item.size for item in items)
        return PackedRow(prefix, window.epoch, reading.seq_len, items)

    def _window(self, prefix: str, reading: Reading) -> Window:
        """Returns the open window of a source, packed anew when the way of reading has changed."""
        held, cursor, source = (
            self._windows.get(prefix),
            self._cursors[prefix],
            self.sources[prefix],
        )
        if held is not None and held[0] == reading:
            return held[1]
        if cursor.row and cursor.reading != reading.state():
            old = Reading(*cursor.reading)
            window = held[1] if held is not None and held[0] == old else source.open(cursor, old)
            cursor.held, cursor.position = source.hold(window, cursor.row), window.position
            cursor.epoch, cursor.row = window.epoch, 0
        cursor.reading = reading.state()
        self._windows[prefix] = (reading, source.open(cursor, reading))
        return self._windows[prefix][1]

    def state(self) -> dict[str, Any]:
        """Returns JSON from which a new stream goes on; see `Cursor`."""
        cursors = {
            prefix: {
                **vars(cursor),
                "files": self.sources[prefix].fingerprint,
                "held": [*map(list, cursor.held)],
            }
            for prefix, cursor in self._cursors.items()
        }
        return {
            "schema": SCHEMA, "seed": self.plan.seed, "split": self.plan.split, "places": self.places,
            "mixture": {key: dict(value) for key, value in self._mixture_state.items()},
            "sources": {**self._retired, **cursors},
        }  # fmt: skip

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state.get("schema") != SCHEMA:
            raise DataError(
                f"The stream's state has schema {state.get('schema')}, but this megallm reads "
                f"{SCHEMA}."
            )
        for name, now in (("seed", self.plan.seed), ("split", self.plan.split)):
            if state[name] != now:
                raise DataError(
                    f"The stream was begun with data.{name} {state[name]!r}, now it is {now!r}: "
                    "documents would be read twice or never. Restore it, or start another run."
                )
        self.places, self._mixture_state = state["places"], dict(state["mixture"])
        new = {
            prefix: source
            for prefix, source in self.sources.items()
            if prefix not in state["sources"]
        }
        moved = {source.fingerprint: prefix for prefix, source in new.items()}
        for prefix, saved in state["sources"].items():
            if prefix not in self.sources and saved["files"] in moved:
                prefix = moved.pop(saved["files"])  # the same files under another name
            if prefix not in self.sources:
                self._retired[prefix] = saved
                continue
            files = self.sources[prefix].fingerprint
            if saved["files"] != files:
                raise DataError(
                    f"{prefix} has changed since this run read it (it was {saved['files']}, now it "
                    f"is {files}): which documents were read is no longer known. Put the old files "
                    "back, add the new text as another source, or start another run."
                )
            self._cursors[prefix] = Cursor(
                **{key: value for key, value in saved.items() if key != "files"}
            )
