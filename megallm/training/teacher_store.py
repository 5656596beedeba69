"""The teacher's top k log-probs of every row, stored by row id: a pass over the rows before the
first step, or before any run (`megallm distill --store`).

A store is a folder: `store.json` says what was stored and how; each data rank wrote a part of
`samples` int64 `[N]`, `ends` int64 `[N]` (of the row's positions, one row after the other), `ids`
int32 and `log_probs` `[M, K]` of the M positions that count, as NumPy files that are mapped, not
read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.base.files import atomic_write_text, writing
from megallm.data.chat.prepare import Prepared
from megallm.data.chat.reader import first_sample
from megallm.data.loader import Batch
from megallm.engine.distillation import teacher_top_k
from megallm.engine.engine import Engine

FORMAT = 1
META = "store.json"
ARRAYS = ("samples", "ends", "ids", "log_probs")


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds: the tokenizer by its fingerprint, and how log-probs were made."""

    tokenizer: str
    temperature: float
    top_k: int
    vocab_size: int
    teacher: str
    parts: int
    format: int = FORMAT


def sequences_of(batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (sample, flat places of the tokens that count) of each sequence of a microbatch."""
    mask = batch["mask"].numpy()
    rows, length = mask.shape
    ends = list(range(0, rows * length + 1, length))
    if "cu_seqlens" in batch:
        ends = batch["cu_seqlens"].tolist()
    flat = mask.reshape(-1)
    for sample, begin, end in zip(batch["samples"].tolist(), ends, ends[1:], strict=False):
        if sample >= 0:
            yield sample, begin + np.flatnonzero(flat[begin:end])


def write_store(
    folder: Path,
    teacher: Engine,
    steps: Iterable[Sequence[Batch]],
    meta: StoreMeta,
) -> None:
    """Write the store of all rows of `steps`, each this data rank's microbatches; collective over
    the world. It is valid once `store.json` is there.
    """
    mesh, k = teacher.mesh, min(meta.top_k, meta.vocab_size)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    total = 0
    for batches in steps:
        tops = teacher_top_k(teacher, batches, k, meta.temperature)
        for batch, top in zip(batches, tops, strict=True):
            if top is None:
                continue
            ids, values = (x.flatten(0, 1).cpu().numpy() for x in top)
            for sample, places in sequences_of(batch):
                total += len(places)
                found["samples"].append(np.array([sample]))
                found["ends"].append(np.array([total]))
                found["ids"].append(ids[places].astype(np.int32))
                found["log_probs"].append(values[places])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if found["samples"]:
            for name, pieces in found.items():
                np.save(folder / f"{name}-{mesh.data.rank:05d}.npy", np.concatenate(pieces))
    mesh.barrier()
    if mesh.rank == 0:
        atomic_write_text(folder / META, json.dumps(asdict(meta), indent=1))
    mesh.barrier()


class TeacherStore:
    """A store that is read. Errors: CheckpointError for one that cannot be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta = StoreMeta(**json.loads((folder / META).read_text(encoding="utf-8")))
            numbers = [path.name.removeprefix("samples") for path in folder.glob("samples-*.npy")]
            parts = [
                {name: np.load(folder / f"{name}{rest}", mmap_mode="r") for name in ARRAYS}
                for rest in sorted(numbers)
            ]
            if len(parts) != self.meta.parts:
                raise ValueError(f"{len(parts)} of {self.meta.parts} parts are there")
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise CheckpointError(
                f"{folder} is no store of a teacher's log-probs, or is damaged ({error}): make it "
                "with `megallm distill CONFIG --store DIR`."
            ) from error
        self.parts = parts
        sizes = [len(part["samples"]) for part in parts]
        samples = np.concatenate([part["samples"] for part in parts] or [np.zeros(0, np.int64)])
        self.samples, first = np.unique(samples, return_index=True)
        numbers = np.repeat(np.arange(len(parts)), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, np.int64)])
        self.where = np.stack([numbers, rows], 1)[first] if len(samples) else np.zeros((0, 2), int)

    def check(self, rows: Prepared, temperature: float) -> None:
        """Errors: UsageError for a store of another tokenizer or temperature, DataError `file:line`
        for a row that it lacks.
        """
        if self.meta.format != FORMAT or self.meta.tokenizer != rows.words.fingerprint:
            raise UsageError(
                f"teacher.store {self.folder} was made with another tokenizer (of "
                f"{self.meta.teacher}) than that of the rows, {rows.config.tokenizer}: a "
                "divergence compares probabilities of the same tokens. Take a teacher of the same "
                "tokenizer."
            )
        if self.meta.temperature != temperature:
            raise UsageError(
                f"teacher.store {self.folder} holds log-probs at the temperature "
                f"{self.meta.temperature:g}, and distill.temperature is {temperature:g}: those of "
                "another cannot be told from the likeliest tokens alone. Set "
                f"distill.temperature={self.meta.temperature:g}, or make the store anew."
            )
        for name, source in rows.sources.items():
            wanted = first_sample(source) + np.arange(len(source))
            lacking = np.flatnonzero(~np.isin(wanted, self.samples))
            if len(lacking):
                raise DataError(
                    f"{name}:{int(source.table['line'][lacking[0]])}: teacher.store {self.folder} "
                    f"holds nothing of this row, nor of {len(lacking) - 1} others: it was made of "
                    "other rows, or read with another template or data.seq_len. Make it with "
                    "`megallm distill CONFIG --store DIR`."
                )

    def top(self, batch: Batch, dtype: torch.dtype) -> Batch:
        """Returns `teacher_ids` int64 and `teacher_log_probs` `[B, T, K]`; where nothing counts,
        the first classes, all alike. Errors: DataError for a row that is not there.
        """
        shape, k = batch["mask"].shape, min(self.meta.top_k, self.meta.vocab_size)
        ids = np.tile(np.arange(k), (shape.numel(), 1))
        values = np.full((shape.numel(), k), -np.log(self.meta.vocab_size))
        for sample, places in sequences_of(batch):
            at = int(np.searchsorted(self.samples, sample))
            part, row = self.where[at].tolist() if at < len(self.samples) else (0, 0)
            arrays = self.parts[part]
            begin = int(arrays["ends"][row - 1]) if row else 0
            end = int(arrays["ends"][row])
            if self.samples[min(at, len(self.samples) - 1)] != sample or end - begin != len(places):
                raise DataError(f"{self.folder} lacks a row that is read now: make it anew.")
            ids[places], values[places] = arrays["ids"][begin:end], arrays["log_probs"][begin:end]
        made = torch.from_numpy(ids), torch.from_numpy(values).to(dtype)
        named = zip(("teacher_ids", "teacher_log_probs"), made, strict=True)
        return {name: x.view(*shape, k) for name, x in named}
