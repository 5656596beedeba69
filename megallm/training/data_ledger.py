"""Batches that a run leaves out, RUN/data_ledger.json: what made it go back, and what every later
start passes over, so that it reads what the run would have read.

Batches are numbered as the data has them, from 1; a run that leaves none out trains batch n in step
n. The file belongs to the run folder, not to a checkpoint: it holds for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import CheckpointError, DataError
from megallm.base.files import atomic_write_json
from megallm.data.batches import Arrays, BatchReader
from megallm.engine.engine import Mesh
from megallm.run.runfolder import RunFolder


@dataclass
class DataLedger:
    """`rollbacks` are {step, to, reason, batches: [first, last]} in the order of time."""

    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(folder: RunFolder) -> DataLedger:
        """Returns what the file says; empty without one. Errors: CheckpointError."""
        try:
            text = folder.data_ledger.read_text(encoding="utf-8")
        except FileNotFoundError:
            return DataLedger()
        try:
            found = DataLedger(**json.loads(text))
            found.number(1)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder.data_ledger} cannot be read ({error}): it says which batches this run "
                "leaves out. Restore it, or remove it to leave none out."
            ) from error
        return found

    def write(self, folder: RunFolder) -> None:
        """Write the file. Errors: CannotWrite."""
        atomic_write_json(folder.data_ledger, vars(self))

    def number(self, step: int) -> int:
        """Returns the number of the batch that a step trains."""
        number, passed = step, 0  # passed: the last batch known to be left out
        for first, last in sorted(entry["batches"] for entry in self.rollbacks):
            first = max(first, passed + 1)
            if number >= first:
                number += max(0, last - first + 1)
            passed = max(passed, last)
        return number

    def add(self, step: int, to: int, reason: str, further: int) -> dict[str, Any]:
        """Add the batches of the steps after `to` up to `step`, and `further` ones, to
        the entry."""
        batches = [self.number(to) + 1, self.number(step) + further]
        entry = {"step": step, "to": to, "reason": reason, "batches": batches}
        self.rollbacks.append(entry)
        return entry


def ledger_of_data(folder: RunFolder, mesh: Mesh) -> DataLedger:
    """Returns what rank 0 reads; collective over the world. Errors: CheckpointError on rank 0."""
    found = vars(DataLedger.read(folder)) if mesh.rank == 0 else None
    return DataLedger(**mesh.broadcast_json(found))


class SkippingReader:
    """Reads like `reader`, without the batches that the ledger leaves out."""

    KEPT = 16  # steps whose rows and state are remembered: more than are read ahead

    def __init__(self, reader: BatchReader, ledger: DataLedger, first_step: int) -> None:
        self.reader, self.number = reader, ledger.number
        self._last = ledger.number(first_step - 1)  # batch that was read or passed over
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._states: dict[int, dict[str, Any]] = {}

    def batches(self, step: int) -> list[Arrays]:
        """Returns this rank's microbatches of a step; see `BatchReader`."""
        number = self.number(step)
        try:
            for left_out in range(self._last + 1, number):
                self.reader.consumed(left_out)
            made = self.reader.batches(number)
        except IndexError as error:  # the samples of an order that was made for so many
            raise DataError(
                f"{error} Batches were left out (data_ledger.json), so step {step} needs batch "
                f"{number}. End the run before (train.stop_at), or plan a new one with more: "
                "data.samples."
            ) from error
        self._last = number
        rows: list[Mapping[str, Any]] = self.reader.consumed(number)
        self._rows[step] = [{**row, "step": step, "batch": number} for row in rows]
        self._states[step] = self.reader.state_after(number)
        for kept in (self._rows, self._states):
            kept.pop(step - self.KEPT, None)
        return made

    def consumed(self, step: int) -> list[dict[str, Any]]:
        """Returns this rank's rows of one of the last steps, with the number of their batch."""
        return self._rows[step]

    def state_after(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint of one of the last steps keeps."""
        return self._states[step]
