"""The reference of preference training: what its log-probabilities come from.

All kinds give the same numbers while the reference stays what training began with; they differ in
memory and time. Every one computes before the step and hands its numbers over as data of the batch.

| kind | memory | time a step |
|---|---|---|
| `Stored` | none | none: one pass over the rows before the first step, kept by row id |
| `AdapterOff` | none | a forward pass |
| `Frozen` | weights in the model's dtype, divided by ZeRO | a forward pass |
| `Synced` | a copy of the master weights, divided by ZeRO | a forward pass, and two exchanges |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, DataError
from megallm.base.files import atomic_path
from megallm.data.loader import Batch
from megallm.engine.engine import Engine, Part
from megallm.engine.weights_copy import WeightsCopy
from megallm.losses.reduce import per_sequence
from megallm.peft.reference import off

SLOTS = 2  # numbers of a row: of a pair chosen and rejected; of a single answer its own, mismatched


class Reference(Protocol):
    """Gives log-probabilities of a model that is not trained; calls are collective over the
    world.
    """

    def log_probs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns one tensor a microbatch, `[B, T]` or `[S]` sums over the counted tokens, without
        gradient. The batches name `samples` and `slots` int64 `[S]`.
        """
        ...

    def after(self, step: int) -> None:
        """Take note that a step has been done."""
        ...

    def parts(self) -> Iterator[Part]:
        """Yields what of the reference a checkpoint has to remember."""
        ...


class Frozen:
    """A model of its own on the same mesh (`engine`), whose parameters are all frozen."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def log_probs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns `[B, T]` of each microbatch."""
        return self.engine.log_probs(batches)

    def after(self, step: int) -> None:
        """Keep the reference as it is."""

    def parts(self) -> Iterator[Part]:
        """Yields nothing: the weights can be read where they came from."""
        yield from ()


class AdapterOff(Frozen):
    """The policy itself without its adapters."""

    def log_probs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns `[B, T]` of each microbatch."""
        with off(self.engine):
            return self.engine.log_probs(batches)


class Synced(Frozen):
    """The policy of some time ago (TR-DPO, arXiv 2404.09656): every `every` steps the reference
    moves by the share `alpha` towards the policy; 1 is the hard update.
    """

    def __init__(self, engine: Engine, copy: WeightsCopy, alpha: float, every: int) -> None:
        super().__init__(engine)
        self.copy, self.alpha, self.every = copy, alpha, every

    def log_probs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns `[B, T]` of each microbatch."""
        with self.copy.in_use():
            return self.engine.log_probs(batches)

    def after(self, step: int) -> None:
        """Move the reference when it is time."""
        if step % self.every == 0:
            self.copy.mix(self.alpha)

    def parts(self) -> Iterator[Part]:
        """Yields the reference's weights."""
        for held in self.copy.state():
            if held.owned:
                yield Part(held.name, held.shard.full, held.box.offset, held.tensor)


class ReferenceTable:
    """Sums of log-probabilities by row id: samples int64 `[N]`, ascending, values `[N, SLOTS]`."""

    def __init__(self, samples: np.ndarray, values: np.ndarray) -> None:
        self.samples, self.values = samples, values

    @staticmethod
    def of(rows: Iterable[tuple[int, int, float]]) -> ReferenceTable:
        """Returns the table of (sample, slot, value)."""
        found: dict[int, list[float]] = {}
        for sample, slot, value in rows:
            found.setdefault(sample, [0.0] * SLOTS)[slot] = value
        samples = np.array(sorted(found), np.int64)
        values = np.array([found[sample] for sample in samples.tolist()], np.float64)
        return ReferenceTable(samples, values.reshape(len(samples), SLOTS))

    @staticmethod
    def joined(tables: Sequence[ReferenceTable]) -> ReferenceTable:
        """Returns one table of all rows."""
        samples, places = np.unique(
            np.concatenate([one.samples for one in tables]), return_index=True
        )
        return ReferenceTable(samples, np.concatenate([one.values for one in tables])[places])

    def look_up(self, samples: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Returns float64 `[S]`, 0 for padding. Errors: DataError for a row that is not there."""
        places = np.searchsorted(self.samples, samples).clip(max=len(self.samples) - 1)
        known = self.samples[places] == samples
        if (~known & (samples >= 0)).any():
            raise DataError(
                "The stored log-probabilities of the reference lack a row that is read now: remove "
                "the folder cache/reference of the run folder, and they are computed again."
            )
        return np.where(known, self.values[places, slots], 0.0)

    def save(self, path: Path) -> None:
        """Write the table; it appears when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, samples=self.samples, values=self.values)

    @staticmethod
    def load(path: Path) -> ReferenceTable:
        """Returns the table of a file. Errors: CheckpointError."""
        try:
            with np.load(path) as file:
                return ReferenceTable(file["samples"], file["values"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): remove it, and it is computed again."
            ) from error


class Stored:
    """Numbers that were computed once, before the first step; given out as `dtype`."""

    def __init__(self, table: ReferenceTable, dtype: torch.dtype) -> None:
        self.table, self.dtype = table, dtype

    def log_probs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Returns `[S]` of each microbatch."""
        return [
            torch.from_numpy(
                self.table.look_up(batch["samples"].numpy(), batch["slots"].numpy())
            ).to(self.dtype)
            for batch in batches
        ]

    def after(self, step: int) -> None:
        """Keep the reference as it is."""

    def parts(self) -> Iterator[Part]:
        """Yields nothing: the table is a file of the run folder."""
        yield from ()


def table_path(cache: Path, *decides: Any) -> Path:
    """Returns where a table lies in the folder `cache`; JSON values decide its name."""
    text = json.dumps(decides, sort_keys=True).encode()
    return cache / "reference" / f"{hashlib.blake2b(text, digest_size=16).hexdigest()}.npz"


def compute_table(
    engine: Engine,
    steps: Iterable[Sequence[Batch]],
    log_probs: Callable[[Sequence[Batch]], list[Tensor]],
) -> ReferenceTable:
    """Returns the table of all rows of `steps`, each this data rank's microbatches, the same on
    every rank; collective over the world.
    """
    rows: list[tuple[int, int, float]] = []
    for batches in steps:
        mine = []
        for batch, found in zip(batches, log_probs(batches), strict=True):
            mask = batch["mask"].to(found.device)
            sums = per_sequence(found.masked_fill(~mask, 0).to(torch.float64), batch)
            names = batch["samples"].tolist(), batch["slots"].tolist(), sums.tolist()
            mine += [list(row) for row in zip(*names, strict=True) if row[0] >= 0]
        rows += [tuple(row) for row in engine.all(mine)]
    return ReferenceTable.of(rows)
