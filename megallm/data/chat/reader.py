"""Order and batches of conversations: the training stream (`data.stream`) over tokenised sources,
and its rows as arrays. Pure.

Rows are drawn exactly once an epoch, in an order that the seed and the ledger decide. A row of the
stream is one example (padded) or several that do not see each other (packed); a pair is one
example, so its two sequences always lie in the same microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megallm.base.errors import UsageError
from megallm.data.batches import Share, StreamReader
from megallm.data.chat.cache import Tokenised
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import RowKind
from megallm.data.chat.prepare import Prepared, prepare, silent
from megallm.data.chat.rows import LabelledRow, PreferenceRow, PromptRow, RankedRow, SftRow
from megallm.data.chat.rows import Row as Example
from megallm.data.objective import Arrays
from megallm.data.stream.plan import BEST_FIT, SINGLE, Reading, StreamPlan, StreamSegment
from megallm.data.stream.source import DocumentSource, PackedRow
from megallm.data.stream.stream import Stream

NOBODY = -1  # the sample of padding


class ChatSource(DocumentSource):
    """A tokenised file as a source of the stream; its files are told apart by what decided its
    rows.
    """

    def __init__(self, name: str, tokenised: Tokenised, plan: StreamPlan) -> None:
        super().__init__(tokenised.prefix, plan)
        self.prefix, self.tokenised, self.fingerprint = name, tokenised, tokenised.key
        self._first_sample = first_sample(tokenised)

    def sample(self, document: int) -> int:
        """Returns the id of a row: the same whatever the sources' order, the epoch and the file's
        name.
        """
        return self._first_sample + document


def first_sample(tokenised: Tokenised) -> int:
    """Returns the id of a file's first row; those of the others follow it."""
    return xxhash.xxh32_intdigest(tokenised.key.encode()) << 31


@dataclass(frozen=True)
class LaidOut:
    """A sequence of an example as it lies in a batch: labels int64 [n], mask bool [n], and what
    goes with it: a number, or further numbers [n].
    """

    ids: np.ndarray
    sample: int
    labels: np.ndarray
    mask: np.ndarray
    more: dict[str, Any]
    epoch: int = 0


def _sequence(row: SftRow, sample: int, **more: Any) -> LaidOut:
    """The next token is the label, where it is trained."""
    labels, mask = np.zeros(len(row.ids), np.int64), np.zeros(len(row.ids), bool)
    labels[:-1], mask[:-1] = row.ids[1:], row.trained[1:]
    return LaidOut(row.ids, sample, labels, mask, more)


def _scored(row: SftRow, sample: int, label: int = 0, **more: Any) -> LaidOut:
    """A head reads the last token."""
    labels, mask = np.zeros(len(row.ids), np.int64), np.zeros(len(row.ids), bool)
    labels[-1], mask[-1] = label, True
    return LaidOut(row.ids, sample, labels, mask, more)


def _sft(row: SftRow, sample: int) -> list[LaidOut]:
    return [_sequence(row, sample)]


def _pair(row: PreferenceRow, sample: int, lay: Callable[..., LaidOut]) -> list[LaidOut]:
    size = len(row.prompt)
    return [
        lay(row.chosen, sample, prompt_tokens=size, margin=row.margin),
        lay(row.rejected, sample, prompt_tokens=size, margin=0.0),
    ]


def _ranked(row: RankedRow, sample: int) -> list[LaidOut]:
    return [
        _scored(one, sample, prompt_tokens=len(row.prompt), prompt=sample, rank=rank)
        for one, rank in zip(row.sequences, row.ranks, strict=True)
    ]


def lay_answer(row: LabelledRow, sample: int) -> LaidOut:
    """Returns a single answer, good or bad, as it lies in a batch."""
    more = {"prompt_tokens": len(row.prompt), "desirable": row.label > 0}
    return _sequence(row.sequence, sample, **more)


def _scored_answer(row: LabelledRow, sample: int) -> list[LaidOut]:
    return [_sequence(row.sequence, sample, prompt_tokens=len(row.prompt), reward=row.label)]


def _prompt(row: PromptRow, sample: int) -> list[LaidOut]:
    return [_sequence(SftRow(row.ids, np.zeros(len(row.ids), bool)), sample)]


def _value(row: LabelledRow, sample: int) -> list[LaidOut]:
    targets = np.zeros(len(row.sequence.ids), np.float32)
    targets[-1:] = row.label
    return [_scored(row.sequence, sample, targets=targets)]


_LAY: dict[str, Callable[[Any, int], list[LaidOut]]] = {
    "sft": _sft,
    "preference": lambda row, sample: _pair(row, sample, _sequence),
    "reward": lambda row, sample: _pair(row, sample, _scored),
    "ranked": _ranked,
    "unpaired": lambda row, sample: [lay_answer(row, sample)],
    "scored": _scored_answer,
    "prompts": _prompt,
    "classification": lambda row, sample: [_scored(row.sequence, sample, int(row.label))],
    "regression": _value,
}
_SHARED = ("prompt_tokens", np.dtype(np.int64), 0)
_PER_SEQUENCE: dict[str, tuple[tuple[str, np.dtype, int], ...]] = {
    "preference": (_SHARED, ("margin", np.dtype(np.float32), 0)),
    "reward": (_SHARED, ("margin", np.dtype(np.float32), 0)),
    "ranked": (_SHARED, ("prompt", np.dtype(np.int64), NOBODY), ("rank", np.dtype(np.int64), 0)),
    "unpaired": (_SHARED, ("desirable", np.dtype(bool), 0)),
    "scored": (_SHARED, ("reward", np.dtype(np.float64), 0)),
}  # name, dtype, and what padding has


class ChatReader(StreamReader):
    """Batches of one data rank; see `data.batches.Reader`, whose methods it has.

    Beside tokens, labels, positions and mask a microbatch has one value for each sequence [S]:
    `samples` int64, the id of its row, -1 for padding, `epochs` int64, how often that row was read
    before, and `lengths` int64, its tokens; for answers to prompts `prompt_tokens`
    int64; `margin` float32 of pairs where any has one, the rejected one's 0; `desirable` bool
    of unpaired rows; `reward` float64 of scored ones; `prompt` and `rank` int64 of ranked answers;
    and for regression `targets` float32 [B, T]. The mask is True where a token is predicted, or at
    the last of a sequence that a head reads. The sequences of pairs alternate: chosen, rejected,
    chosen, ...

    padded: [B, T], T the longest sequence of the global batch, rounded up to `multiple`; B is the
    microbatch times the (most) sequences of a row. packed: B = 1 with `cu_seqlens`, S sequences
    and, where there is room left, one of padding at the end.
    """

    def __init__(
        self, prepared: Prepared, stream: Stream, share: Share, first_step: int, multiple: int
    ) -> None:
        super().__init__(stream, share, first_step)
        self.prepared, self.multiple, self.epochs = prepared, multiple, None
        self._per_row = prepared.per_row
        longest = packed_row_length(prepared)
        if prepared.config.packing and longest % multiple:
            raise UsageError(
                f"data.seq_len {prepared.config.seq_len} makes packed rows of {longest} tokens, "
                f"which must be a multiple of {multiple} (2 x cp x tp); nearest: "
                f"{-(-longest // multiple) * multiple // self._per_row}."
            )

    def batches(self, step: int) -> list[Arrays]:
        """Returns this rank's microbatches of a step."""
        rows = self._take(step)
        micros = [[rows[i] for i in micro] for micro in self.share.micros()]
        if self.prepared.config.packing:
            return [
                self._packed(self._sequences(micro), sum(row.seq_len for row in micro))
                for micro in micros
            ]
        longest = max((self._longest(row) for row in rows if self._counts(row)), default=1)
        length = self._rounded(longest)
        return [
            self._padded(self._sequences(micro), len(micro) * self._per_row, length)
            for micro in micros
        ]

    def _rounded(self, length: int) -> int:
        return -(-max(length, 1) // self.multiple) * self.multiple

    def examples(self, step: int) -> list[tuple[int, Example]]:
        """Returns (sample, row) of this rank's rows of a step: prompts with their columns, for
        rollouts.
        """
        rows = self._take(step)
        return [
            one for micro in self.share.micros() for i in micro for one in self._examples(rows[i])
        ]

    def steps(self, epochs: int = 1) -> int:
        """Number of steps, from the beginning, until every source was read `epochs` times."""
        stream = Stream(self.stream.plan, self.stream.sources)
        step = 0
        left = {name for name, weight in self.stream.plan.segments[0].weights.items() if weight > 0}
        while left:  # until each is seen to begin the epoch after
            rows = stream.take(self.share.global_batch)
            left -= {row.prefix for row in rows if row.epoch >= epochs}
            step += bool(left) or any(row.epoch < epochs for row in rows)
        return step

    def _counts(self, row: PackedRow) -> bool:
        return self.epochs is None or row.epoch < self.epochs

    def _examples(self, row: PackedRow) -> list[tuple[int, Example]]:
        """Nothing of a row of an epoch that is not wanted any more."""
        source = self.stream.sources[row.prefix]
        return [
            (source.sample(item.document), source.tokenised.row(item.document))
            for item in row.items
            if self._counts(row)
        ]

    def _longest(self, row: PackedRow) -> int:
        data = self.stream.sources[row.prefix].data
        ends = [data.document_indices[item.document : item.document + 2] for item in row.items]
        return max(int(data.lengths[first:end].max()) for first, end in ends)

    def _sequences(self, rows: Sequence[PackedRow]) -> list[LaidOut]:
        lay = _LAY[self.prepared.kind]
        return [
            replace(one, epoch=row.epoch)
            for row in rows
            for sample, example in self._examples(row)
            for one in lay(example, sample)
        ]

    def _per_sequence(self, sequences: Sequence[LaidOut], padding: int) -> Arrays:
        """The arrays [S], with `padding` entries of nobody at the end."""
        nobody = (NOBODY, 0, 0)
        about = [(one.sample, one.epoch, len(one.ids)) for one in sequences] + [nobody] * padding
        samples, epochs, lengths = np.array(about, np.int64).reshape(-1, 3).T.copy()
        more = {
            name: np.array([one.more[name] for one in sequences] + [nothing] * padding, dtype)
            for name, dtype, nothing in _PER_SEQUENCE.get(self.prepared.kind, ())
            if name != "margin" or self.prepared.has_margins
        }
        return {"samples": samples, "epochs": epochs, "lengths": lengths, **more}

    def _padded(self, sequences: Sequence[LaidOut], count: int, length: int) -> Arrays:
        places = [(number, slice(0, len(one.ids))) for number, one in enumerate(sequences)]
        return {
            **self._filled(sequences, places, (count, length)),
            "positions": np.tile(np.arange(length), (count, 1)),
            **self._per_sequence(sequences, count - len(sequences)),
        }

    def _packed(self, sequences: Sequence[LaidOut], length: int) -> Arrays:
        ends = np.cumsum([0, *(len(one.ids) for one in sequences)])
        places = [(0, slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
        padding = int(ends[-1] < length)
        ends = np.append(ends, length) if padding else ends
        return {
            **self._filled(sequences, places, (1, length)),
            "positions": (np.arange(length) - np.repeat(ends[:-1], np.diff(ends)))[None],
            "cu_seqlens": ends.astype(np.int32),
            **self._per_sequence(sequences, padding),
        }

    def _filled(
        self, sequences: Sequence[LaidOut], places: Sequence[Any], shape: tuple[int, int]
    ) -> Arrays:
        """The arrays [B, T], each sequence at its place; zero in the padding."""
        made = {"tokens": np.zeros(shape, np.int64), "labels": np.zeros(shape, np.int64)}
        made["mask"] = np.zeros(shape, bool)
        if self.prepared.kind == "regression":
            made["targets"] = np.zeros(shape, np.float32)
        for one, place in zip(sequences, places, strict=True):
            made["tokens"][place], made["labels"][place] = one.ids, one.labels
            made["mask"][place] = one.mask
            if "targets" in made:
                made["targets"][place] = one.more["targets"]
        return made


def packed_row_length(prepared: Prepared) -> int:
    """Number of tokens of a packed row: there is room for every sequence of an example."""
    return prepared.config.seq_len * prepared.per_row


def reader_of(
    prepared: Prepared,
    share: Share,
    first_step: int = 1,
    state: Mapping[str, Any] | None = None,
    multiple: int = 1,
    epochs: int | None = None,
    made: type[ChatReader] = ChatReader,
) -> ChatReader:
    """Returns the reader of prepared sources that goes on from `state` (None: from the beginning),
    `made` as one that reads something beside them.

    multiple: of the length T of every microbatch, 2 x cp x tp. epochs: rows of later ones are read
    as padding, so that held-out rows count once. Errors: DataError when the state is of other rows.
    """
    config = prepared.config
    if config.seed is None:
        raise UsageError("data.seed is not given; it is the run's where nothing else is said.")
    packing = BEST_FIT if config.packing else SINGLE
    reading = Reading(packed_row_length(prepared), packing, config.window)
    plan = StreamPlan((StreamSegment(0, dict(prepared.weights), reading),), config.seed)
    sources = {name: ChatSource(name, one, plan) for name, one in prepared.sources.items()}
    reader = made(prepared, Stream(plan, sources, state), share, first_step, multiple)
    reader.epochs = epochs
    return reader


def open_chat_reader(
    data: ChatDataConfig,
    kind: RowKind,
    share: Share,
    cache: Path,
    first_step: int = 1,
    state: Mapping[str, Any] | None = None,
    multiple: int = 1,
) -> ChatReader:
    """Opens the reader, `prepare` and `reader_of` together, for the training sources."""
    return reader_of(prepare(data, kind, cache, note=silent), share, first_step, state, multiple)
