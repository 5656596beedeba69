"""Answers together with prompts that they are no answers to, for KTO's reference point. Pure.

The prompt of a row goes with the answer of the next row of its file whose prompt is another one: it
is decided by the file alone, so the pairs of a row are the same in every epoch, at every batch size
and on every layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from megallm.base.errors import DataError
from megallm.data.chat.cache import Tokenised
from megallm.data.chat.reader import ChatReader, LaidOut, lay_answer
from megallm.data.chat.rows import LabelledRow, SftRow
from megallm.data.objective import Arrays
from megallm.data.stream.source import PackedRow

PREFIX = "mismatched."  # of the arrays of a batch that hold such pairs


def partners(source: Tokenised, name: str) -> np.ndarray:
    """Returns for each row of a file the number of the next one with another prompt, from the
    beginning again after the last; int64 `[N]`. Errors: DataError where all prompts are the same.
    """
    rows = (source.row(number).prompt for number in range(len(source)))
    prompts = [xxhash.xxh3_64_intdigest(prompt.tobytes()) for prompt in rows]
    count, found = len(prompts), np.zeros(len(prompts), np.int64)
    other = next((i for i in range(count) if prompts[i] != prompts[-1]), None)
    if other is None:
        raise DataError(
            f"{name}: all {count} rows have the same prompt, so that no answer can be put to "
            "another one, which KTO's reference point needs: add rows with other prompts, or set "
            "kto.loss=apo_zero_unpaired."
        )
    for number in reversed(range(count)):
        following = (number + 1) % count
        if number < count - 1 and prompts[number] == prompts[following]:
            found[number] = found[following]
        else:
            found[number] = following if number < count - 1 else other
    return found


class MismatchedReader(ChatReader):
    """Batches of single answers, and beside each microbatch one of the same prompts with other
    answers, under names that begin with `PREFIX`.
    """

    _partners: dict[str, np.ndarray] | None = None

    def batches(self, step: int) -> list[Arrays]:
        """Returns this rank's microbatches of a step."""
        return [
            own | {f"{PREFIX}{name}": array for name, array in others.items()}
            for own, others in zip(super().batches(step), self._others(step), strict=True)
        ]

    def _others(self, step: int) -> list[Arrays]:
        rows, size = self._take(step), self.share.micro_batch
        micros = [[rows[i] for i in micro] for micro in self.share.micros()]
        if self.prepared.config.packing:  # as long as the longest microbatch of all ranks
            whole = [rows[i : i + size] for i in range(0, len(rows), size)]
            length = self._rounded(max(sum(self._lengths(micro)) for micro in whole))
            return [self._packed(self._pairs(micro), length) for micro in micros]
        length = self._rounded(max(self._lengths(rows), default=1))
        return [self._padded(self._pairs(micro), len(micro), length) for micro in micros]

    def _numbers(self, row: PackedRow) -> list[tuple[int, int]]:
        """(row of the prompt, row of the answer) of a row's items that count."""
        if self._partners is None:
            self._partners = {
                name: partners(source.tokenised, name)
                for name, source in self.stream.sources.items()
            }
        found = self._partners[row.prefix]
        return [
            (item.document, int(found[item.document])) for item in row.items if self._counts(row)
        ]

    def _lengths(self, rows: Sequence[PackedRow]) -> list[int]:
        lengths = []
        for row in rows:
            source = self.stream.sources[row.prefix]
            prompts, sizes = source.tokenised.table["prompt"], source.data.lengths
            for asked, answered in self._numbers(row):
                length = int(prompts[asked]) + int(sizes[answered]) - int(prompts[answered])
                lengths.append(min(length, self.prepared.config.seq_len))
        return lengths

    def _pairs(self, rows: Sequence[PackedRow]) -> list[LaidOut]:
        made = []
        for row in rows:
            source = self.stream.sources[row.prefix]
            for asked, answered in self._numbers(row):
                one, other = source.tokenised.row(asked), source.tokenised.row(answered)
                mixed = mismatch(one, other, self.prepared.config.seq_len)
                made.append(lay_answer(mixed, source.sample(asked)))
        return made


def mismatch(asked: LabelledRow, answered: LabelledRow, most: int) -> LabelledRow:
    """Returns the prompt of one row with the answer of another, at most `most` tokens."""
    size, other = len(asked.prompt), answered.sequence
    ids = np.concatenate([asked.prompt, other.ids[len(answered.prompt) :]])[:most]
    trained = np.concatenate([np.zeros(size, bool), other.trained[len(answered.prompt) :]])[:most]
    return LabelledRow(SftRow(ids, trained), asked.label, asked.prompt)
