"""Order and batches of conversations: the training stream (`data.stream`) over tokenised sources,
and its rows as arrays. Pure.

Rows are drawn exactly once an epoch, in an order that the seed and the ledger decide. A row of the
stream is one example (padded) or several that do not see each other (packed); a pair is one
example, so its two sequences always lie in the same microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megallm.base.errors import UsageError
from megallm.data.batches import Share, StreamReader
from megallm.data.chat.cache import Tokenised
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import PAIRED, Kind
from megallm.data.chat.prepare import Prepared, prepare, quiet
from megallm.data.chat.rows import LabelledRow, PreferenceRow, PromptRow, SftRow
from megallm.data.chat.rows import Row as Example
from megallm.data.objective import Arrays
from megallm.data.stream.plan import BEST_FIT, SINGLE, Plan, Reading, Segment
from megallm.data.stream.source import Row, Source
from megallm.data.stream.stream import Stream

NOBODY = -1  # the sample of padding


class ChatSource(Source):
    """A tokenised file as a source of the stream; its files are told apart by what decided its
    rows.
    """

    def __init__(self, name: str, tokenised: Tokenised, plan: Plan) -> None:
        super().__init__(tokenised.prefix, plan)
        self.prefix, self.tokenised, self.fingerprint = name, tokenised, tokenised.key
        self._first_sample = xxhash.xxh32_intdigest(tokenised.key.encode()) << 31

    def sample(self, document: int) -> int:
        """The id of a row: the same whatever the sources' order, the epoch and the file's name."""
        return self._first_sample + document


class _Sequence:
    """A sequence of an example as it lies in a batch: where its loss counts and what goes with
    it.
    """

    def __init__(
        self, row: SftRow, sample: int, labels: np.ndarray, mask: np.ndarray, more: dict[str, Any]
    ) -> None:
        self.ids, self.sample, self.labels, self.mask, self.more = (
            row.ids,
            sample,
            labels,
            mask,
            more,
        )


def _sequence(row: SftRow, sample: int, **more: Any) -> _Sequence:
    """The next token is the label, where it is trained."""
    labels, mask = np.zeros(len(row.ids), np.int64), np.zeros(len(row.ids), bool)
    labels[:-1], mask[:-1] = row.ids[1:], row.trained[1:]
    return _Sequence(row, sample, labels, mask, more)


def _scored(row: SftRow, sample: int, label: int = 0, **more: Any) -> _Sequence:
    """A head reads the last token."""
    labels, mask = np.zeros(len(row.ids), np.int64), np.zeros(len(row.ids), bool)
    labels[-1], mask[-1] = label, True
    return _Sequence(row, sample, labels, mask, more)


def _sft(row: SftRow, sample: int) -> list[_Sequence]:
    return [_sequence(row, sample)]


def _pair(row: PreferenceRow, sample: int, lay: Callable[..., _Sequence]) -> list[_Sequence]:
    more = {"prompt_tokens": len(row.prompt), "margin": row.margin, "weight": row.weight}
    return [lay(one, sample, **more) for one in (row.chosen, row.rejected)]


def _unpaired(row: LabelledRow, sample: int) -> list[_Sequence]:
    return [_sequence(row.sequence, sample, prompt_tokens=len(row.prompt), label=row.label > 0)]


def _prompt(row: PromptRow, sample: int) -> list[_Sequence]:
    return [_sequence(SftRow(row.ids, np.zeros(len(row.ids), bool)), sample)]


_LAY: dict[str, Callable[[Any, int], list[_Sequence]]] = {
    "sft": _sft,
    "preference": lambda row, sample: _pair(row, sample, _sequence),
    "reward": lambda row, sample: _pair(row, sample, _scored),
    "unpaired": _unpaired,
    "prompts": _prompt,
    "classification": lambda row, sample: [_scored(row.sequence, sample, int(row.label))],
    "regression": lambda row, sample: [_scored(row.sequence, sample, target=row.label)],
}
_MORE: dict[str, dict[str, np.ndarray]] = {
    name: {key: np.array(value) for key, value in fields.items()}
    for name, fields in {
        "sft": {},
        "prompts": {},
        "classification": {},
        "regression": {"target": np.float32(0)},
        "unpaired": {"prompt_tokens": np.int64(0), "label": np.bool_(False)},
        "preference": {
            "prompt_tokens": np.int64(0),
            "margin": np.float32(0),
            "weight": np.float32(0),
        },
    }.items()
}  # fmt: skip - what a sequence has beside its tokens, and what padding has there
_MORE["reward"] = _MORE["preference"]


class ChatReader(StreamReader):
    """Batches of one data rank; see `data.batches.Reader`, whose methods it has.

    Beside tokens, labels, positions and mask a microbatch has one value for each sequence [S]:
    `samples` int64, the id of its row, -1 for padding; for pairs (sequences chosen, rejected,
    chosen, ...) and unpaired rows `prompt_tokens` int64; `margin` and `weight` float32 of pairs,
    `label` bool of unpaired rows, `target` float32 for regression.

    padded: [B, T], T the longest sequence of the global batch, rounded up to `multiple`; B is the
    microbatch, for pairs twice as many. packed: B = 1 with `cu_seqlens`, S sequences of which the
    last is padding where there is some (of pairs the last two, so that they still alternate).
    """

    def __init__(
        self, prepared: Prepared, stream: Stream, share: Share, first_step: int, multiple: int
    ) -> None:
        super().__init__(stream, share, first_step)
        self.prepared, self.multiple, self.epochs = prepared, multiple, None
        self._per_row = 2 if prepared.kind in PAIRED else 1
        longest = row_length(prepared.config, prepared.kind)
        if prepared.config.packing and longest % multiple:
            raise UsageError(
                f"data.seq_len {prepared.config.seq_len} makes packed rows of {longest} tokens, "
                f"which must be a multiple of {multiple} (2 x cp x tp); nearest: "
                f"{-(-longest // multiple) * multiple // self._per_row}."
            )

    def batches(self, step: int) -> list[Arrays]:
        """This rank's microbatches of a step."""
        rows = self._take(step)
        micros = [[rows[i] for i in micro] for micro in self.share.micros()]
        if self.prepared.config.packing:
            return [self._packed(micro) for micro in micros]
        longest = max((self._longest(row) for row in rows if self._counts(row)), default=1)
        length = -(-longest // self.multiple) * self.multiple
        return [self._padded(micro, length) for micro in micros]

    def examples(self, step: int) -> list[tuple[int, Example]]:
        """(sample, row) of this rank's rows of a step: prompts with their columns, for rollouts."""
        rows = self._take(step)
        return [
            one for micro in self.share.micros() for i in micro for one in self._examples(rows[i])
        ]

    def steps(self, epochs: int = 1) -> int:
        """Steps, from the beginning, until every source was read `epochs` times."""
        stream = Stream(self.stream.plan, self.stream.sources)
        step = 0
        left = {name for name, weight in self.stream.plan.segments[0].weights.items() if weight > 0}
        while left:  # until each is seen to begin the epoch after
            rows = stream.take(self.share.global_batch)
            left -= {row.prefix for row in rows if row.epoch >= epochs}
            step += bool(left) or any(row.epoch < epochs for row in rows)
        return step

    def _counts(self, row: Row) -> bool:
        return self.epochs is None or row.epoch < self.epochs

    def _examples(self, row: Row) -> list[tuple[int, Example]]:
        """Nothing of a row of an epoch that is not wanted any more."""
        source = self.stream.sources[row.prefix]
        return [
            (source.sample(item.document), source.tokenised.row(item.document))
            for item in row.items if self._counts(row)
        ]  # fmt: skip

    def _longest(self, row: Row) -> int:
        data = self.stream.sources[row.prefix].data
        ends = [data.document_indices[item.document : item.document + 2] for item in row.items]
        return max(int(data.lengths[first:end].max()) for first, end in ends)

    def _sequences(self, rows: Sequence[Row]) -> list[_Sequence]:
        lay = _LAY[self.prepared.kind]
        return [
            one
            for row in rows
            for sample, example in self._examples(row)
            for one in lay(example, sample)
        ]

    def _per_sequence(self, sequences: Sequence[_Sequence], padding: int) -> Arrays:
        """The arrays [S], with `padding` entries of nobody at the end."""
        samples = [one.sample for one in sequences] + [NOBODY] * padding
        more = {
            name: np.array(
                [one.more[name] for one in sequences] + [nothing.item()] * padding, nothing.dtype
            )
            for name, nothing in _MORE[self.prepared.kind].items()
        }
        return {"samples": np.array(samples, np.int64), **more}

    def _padded(self, rows: Sequence[Row], length: int) -> Arrays:
        count = len(rows) * self._per_row
        tokens, labels = np.zeros((2, count, length), np.int64)
        mask = np.zeros((count, length), bool)
        sequences = self._sequences(rows)
        for number, one in enumerate(sequences):
            size = len(one.ids)
            tokens[number, :size], labels[number, :size], mask[number, :size] = (
                one.ids,
                one.labels,
                one.mask,
            )
        return {
            "tokens": tokens, "labels": labels, "mask": mask, "positions": np.tile(np.arange(length), (count, 1)),
            **self._per_sequence(sequences, count - len(sequences)),
        }  # fmt: skip

    def _packed(self, rows: Sequence[Row]) -> Arrays:
        length = sum(row.seq_len for row in rows)
        tokens, labels = np.zeros((2, 1, length), np.int64)
        mask = np.zeros((1, length), bool)
        sequences, ends = self._sequences(rows), [0]
        for one in sequences:
            at, end = ends[-1], ends[-1] + len(one.ids)
            tokens[0, at:end], labels[0, at:end], mask[0, at:end] = one.ids, one.labels, one.mask
            ends.append(end)
        ends = _filled(ends, length, self._per_row)
        padding = len(ends) - 1 - len(sequences)
        sizes = np.diff(ends)
        return {
            "tokens": tokens, "labels": labels, "mask": mask,
            "positions": (np.arange(length) - np.repeat(ends[:-1], sizes))[None],
            "cu_seqlens": np.array(ends, np.int32), **self._per_sequence(sequences, padding),
        }  # fmt: skip


def _filled(ends: list[int], length: int, per_row: int) -> list[int]:
    """The ends with those of the padding: one sequence, of pairs two; a single place that pairs
    leave belongs to the last sequence, which is causal and does not see it.
    """
    left = length - ends[-1]
    if not left:
        return ends
    if per_row == 1:
        return [*ends, length]
    return [*ends[:-1], length] if left == 1 else [*ends, ends[-1] + left // 2, length]


def row_length(config: ChatDataConfig, kind: Kind) -> int:
    """Tokens of a packed row: a pair has room for two sequences."""
    return config.seq_len * (2 if kind in PAIRED else 1)


def reader_of(
    prepared: Prepared,
    share: Share,
    first_step: int = 1,
    state: Mapping[str, Any] | None = None,
    multiple: int = 1,
    epochs: int | None = None,
) -> ChatReader:
    """The reader of prepared sources that goes on from `state` (None: from the beginning).

    multiple: of the length T of every microbatch, 2 x cp x tp. epochs: rows of later ones are read
    as padding, so that held-out rows count once. Errors: DataError when the state is of other rows.
    """
    config = prepared.config
    if config.seed is None:
        raise UsageError("data.seed is not given; it is the run's where nothing else is said.")
    packing = BEST_FIT if config.packing else SINGLE
    reading = Reading(row_length(config, prepared.kind), packing, config.window)
    plan = Plan((Segment(0, dict(prepared.weights), reading),), config.seed)
    sources = {name: ChatSource(name, one, plan) for name, one in prepared.sources.items()}
    reader = ChatReader(prepared, Stream(plan, sources, state), share, first_step, multiple)
    reader.epochs = epochs
    return reader


def open_chat_reader(
    data: ChatDataConfig,
    kind: Kind,
    share: Share,
    cache: Path,
    first_step: int = 1,
    state: Mapping[str, Any] | None = None,
    multiple: int = 1,
) -> ChatReader:
    """`prepare` and `reader_of` together, for the training sources."""
    return reader_of(prepare(data, kind, cache, note=quiet), share, first_step, state, multiple)
