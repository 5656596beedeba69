"""From rows to the arrays of a batch, and the two readers of a training run: our stream, and
Megatron's order. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from megallm.data.megatron.sampler import rows_after
from megallm.data.megatron.samples import SampleDataset
from megallm.data.objective import Arrays, TokenMasker
from megallm.data.stream.source import DocumentSource, PackedRow
from megallm.data.stream.stream import Stream

_AHEAD = 16  # steps whose state is kept


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch one data-parallel rank reads, in microbatches: a contiguous
    block of them.
    """

    global_batch: int
    micro_batch: int
    dp_size: int = 1
    dp_rank: int = 0

    def micros(self, consumed: int = 0) -> list[list[int]]:
        """Returns row numbers [microbatches][micro_batch] after `consumed` rows."""
        return rows_after(consumed, self.global_batch, self.micro_batch, self.dp_size, self.dp_rank)


class BatchReader(Protocol):
    """What a run reads, step by step in order; steps count from 1."""

    def batches(self, step: int) -> list[Arrays]:
        """Returns this rank's microbatches of a step: {"tokens", "labels", "positions": int64 [B,
        T], "mask": bool [B, T]}, for packed documents "cu_seqlens" int32 [n + 1] with B = 1, and
        for masked diffusion "weight" float32 [B, T].
        """
        ...

    def consumed(self, step: int) -> list[dict[str, Any]]:
        """Returns this rank's rows of a step: {step, micro, row, source, epoch, spans}; micro and
        row count over all ranks.
        """
        ...

    def state_after(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint of this step keeps."""
        ...


def fill_row(
    row: PackedRow, source: DocumentSource
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Returns (tokens, labels int64 [T], mask bool [T], ends of the documents in it) of one row.

    A label is the next token of the same document, also where that stands in another row. The last
    token of a document and the padding have none: 0, masked.
    """
    tokens, labels = np.zeros((2, row.seq_len), np.int64)
    mask = np.zeros(row.seq_len, bool)
    at, ends = 0, [0]
    for item in row.items:
        ids, following = source.read(item, row.epoch)
        end = at + len(ids)
        tokens[at:end] = ids
        labels[at : end - 1] = ids[1:]
        mask[at : end - 1] = True
        if following is not None:
            labels[end - 1], mask[end - 1] = following, True
        at = end
        ends.append(at)
    return tokens, labels, mask, ends if at == row.seq_len else [*ends, row.seq_len]


def pack_rows(rows: Sequence[PackedRow], sources: dict[str, DocumentSource]) -> Arrays:
    """Returns a microbatch of B rows as one row of B x T tokens: documents see only themselves,
    their positions start at 0.
    """
    filled = [fill_row(row, sources[row.prefix]) for row in rows]
    tokens, labels, mask = (np.concatenate([one[i] for one in filled])[None] for i in range(3))
    return {"tokens": tokens, "labels": labels, "mask": mask} | _apart([one[3] for one in filled])


def _apart(ends: Sequence[Sequence[int]]) -> Arrays:
    """{"positions" int64 [1, B x T], "cu_seqlens" int32 [n + 1]} of rows whose documents have these
    ends, 0 to T.
    """
    joined = np.unique(np.concatenate([np.array(one) + i * one[-1] for i, one in enumerate(ends)]))
    positions = np.arange(joined[-1]) - np.repeat(joined[:-1], np.diff(joined))
    return {"positions": positions[None], "cu_seqlens": joined.astype(np.int32)}


def unpacked_rows(rows: Sequence[PackedRow], sources: dict[str, DocumentSource]) -> Arrays:
    """Returns a microbatch without document masks: each row is one text, the next token is the
    label wherever a row has one.
    """
    filled = [fill_row(row, sources[row.prefix]) for row in rows]
    tokens, labels, mask = (np.stack([one[i] for one in filled]) for i in range(3))
    for row, (number, one) in zip(rows, enumerate(filled), strict=True):
        used = sum(item.size for item in row.items)
        labels[number, : used - 1], mask[number, : used - 1] = one[0][1:used], True
    return {
        "tokens": tokens, "labels": labels, "mask": mask,
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
    }  # fmt: skip


def mask_rows(
    rows: Sequence[PackedRow], sources: dict[str, DocumentSource], masker: TokenMasker, apart: bool
) -> Arrays:
    """Returns a microbatch of B rows as one packed row of B x T tokens; `apart`: documents of a row
    do not see each other.

    Arrays [1, B x T] as in `pack_rows`; positions start at 0 with each document, or else with each
    row.
    """
    filled = [_fill_masked(row, sources[row.prefix], masker) for row in rows]
    arrays = {name: np.concatenate([one[name] for one, _ in filled])[None] for name in filled[0][0]}
    kept = [ends if apart else [0, ends[-1]] for _, ends in filled]
    return arrays | _apart([[*ends, row.seq_len] for ends, row in zip(kept, rows, strict=True)])


def _fill_masked(
    row: PackedRow, source: DocumentSource, masker: TokenMasker
) -> tuple[Arrays, list[int]]:
    """Returns the arrays [T] of a row, zero in the padding, and the ends of its documents."""
    made, ends = [], [0]
    for item in row.items:
        ids, _ = source.read(item, row.epoch)
        made.append(masker(ids, source.fingerprint, item.document, item.begin, row.epoch))
        ends.append(ends[-1] + len(ids))
    room = row.seq_len - ends[-1]
    return {
        name: np.pad(np.concatenate([one[name] for one in made]), (0, room)) for name in made[0]
    }, ends


class StreamReader:
    """Our order. `document_masks`: documents of a row do not see each other (`pack_rows`, else
    `unpacked_rows`).

    With `masker` the model sees both sides of each token and predicts those that were masked, not
    the next ones.
    """

    def __init__(
        self,
        stream: Stream,
        share: Share,
        first_step: int,
        document_masks: bool = True,
        masker: TokenMasker | None = None,
    ) -> None:
        self.stream, self.share, self.next_step = stream, share, first_step
        self._arrange = pack_rows if document_masks else unpacked_rows
        if masker is not None:
            self._arrange = partial(mask_rows, masker=masker, apart=document_masks)
        self._states: dict[int, dict[str, Any]] = {first_step - 1: stream.state()}
        self._rows: dict[int, list[PackedRow]] = {}

    def batches(self, step: int) -> list[Arrays]:
        rows = self._take(step)
        return [
            self._arrange([rows[i] for i in micro], self.stream.sources)
            for micro in self.share.micros()
        ]

    def consumed(self, step: int) -> list[dict[str, Any]]:
        rows = self._take(step)
        return [
            {"step": step, "micro": number // self.share.micro_batch, "row": number, "source": rows[number].prefix,
             "epoch": rows[number].epoch, "spans": rows[number].spans, **_forms(rows[number])}
            for micro in self.share.micros() for number in micro
        ]  # fmt: skip

    def state_after(self, step: int) -> dict[str, Any]:
        return self._states[step]

    def _take(self, step: int) -> list[PackedRow]:
        """All rows of a step; the one after the last, or one of the last few again."""
        if step not in self._rows:
            if step != self.next_step:
                raise ValueError(
                    f"The stream stands before step {self.next_step}; step {step} cannot be read "
                    "now."
                )
            self._rows[step] = self.stream.take(self.share.global_batch)
            self._states[step] = self.stream.state()
            self.next_step += 1
            for kept in (self._rows, self._states):
                kept.pop(step - _AHEAD, None)
        return self._rows[step]


def _forms(row: PackedRow) -> dict[str, list[str]]:
    """Returns the forms of the items, when any is not as it stands in the file."""
    forms = [item.form for item in row.items]
    return {"forms": forms} if set(forms) != {"plain"} else {}


class MegatronReader:
    """Megatron-LM's order: samples by number, nothing to keep but the steps made. `masker` as in
    `StreamReader`.
    """

    def __init__(
        self, samples: SampleDataset, share: Share, masker: TokenMasker | None = None
    ) -> None:
        self.samples, self.share, self.masker = samples, share, masker

    def batches(self, step: int) -> list[Arrays]:
        if self.masker is not None:
            micros = self._micros(step)
            return [
                mask_samples([self.samples.sample(i) for i in micro], micro, self.masker)
                for micro in micros
            ]
        return [stack([self.samples.sample(i) for i in micro]) for micro in self._micros(step)]

    def consumed(self, step: int) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "micro": row // self.share.micro_batch,
                "row": row,
                **self.samples.where(first + row),
            }
            for first, row in self._numbered(step)
        ]

    def state_after(self, step: int) -> dict[str, Any]:
        return {}

    def _micros(self, step: int) -> list[list[int]]:
        return self.share.micros((step - 1) * self.share.global_batch)

    def _numbered(self, step: int) -> Iterator[tuple[int, int]]:
        """(first sample of the step, row in it)."""
        first = (step - 1) * self.share.global_batch
        return ((first, number - first) for micro in self._micros(step) for number in micro)


def stack(samples: Sequence[np.ndarray]) -> Arrays:
    """Stacks B samples of T + 1 tokens: each token's label is the next, all of them count."""
    both = np.stack(samples)
    rows, length = both.shape[0], both.shape[1] - 1
    return {
        "tokens": both[:, :-1].copy(), "labels": both[:, 1:].copy(),
        "positions": np.broadcast_to(np.arange(length), (rows, length)).copy(), "mask": np.ones((rows, length), bool),
    }  # fmt: skip


def mask_samples(
    samples: Sequence[np.ndarray], numbers: Sequence[int], masker: TokenMasker
) -> Arrays:
    """Returns the same [B, T] without their last token; a sample is one text, named by its
    number.
    """
    made = [
        masker(sample[:-1].astype(np.int64), number)
        for sample, number in zip(samples, numbers, strict=True)
    ]
    arrays = {name: np.stack([one[name] for one in made]) for name in made[0]}
    return arrays | {"positions": np.tile(np.arange(arrays["tokens"].shape[1]), (len(samples), 1))}
