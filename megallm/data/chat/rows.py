"""From examples to token ids with their trained tokens. Pure.

A text is tokenised once, as a whole, and its trained characters are looked up by the tokenizer's
offsets; nothing is encoded in parts and nothing is encoded again. A token that holds at least one
trained character is trained: at the beginning of an answer it may hold the end of the prompt too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from megallm.data.chat.formats import LABELLED, PAIRED, Example, Talk
from megallm.data.chat.messages import BadRow
from megallm.data.chat.spans import Passage, Speaker
from megallm.data.text.tokenizer import Tokenizer

TOO_LONG = ("keep_start", "keep_end", "drop", "error")


@dataclass(frozen=True)
class SftRow:
    """A sequence: ids int32 [n]; trained bool [n], True where a token is to be predicted."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class PreferenceRow:
    """A pair: whole sequences that begin with the ids `prompt`, trained in their completions."""

    prompt: np.ndarray
    chosen: SftRow
    rejected: SftRow
    margin: float = 0.0


@dataclass(frozen=True)
class RankedRow:
    """Several answers to the prompt, whole sequences with their ranks, 0 the best."""

    prompt: np.ndarray
    sequences: tuple[SftRow, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class LabelledRow:
    """A sequence with a label: good or bad (1.0 or 0.0), a reward, the number of a class, or a
    value.
    """

    sequence: SftRow
    label: float
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True)
class PromptRow:
    """A prompt and all columns of its row, for reward functions; `number` is that of the row."""

    ids: np.ndarray
    columns: Mapping[str, Any]
    number: int = -1


Row = SftRow | PreferenceRow | RankedRow | LabelledRow | PromptRow


@dataclass
class RowCounts:
    """What became of the rows of a file."""

    lines: int = 0  # rows of the file
    rows: int = 0  # rows to train on
    tokens: int = 0
    trained: int = 0  # tokens that are predicted
    bad: int = 0  # rows that cannot be used, left out
    truncated: int = 0  # too long, cut
    dropped: int = 0  # too long, left out
    untrained: int = 0  # left out: nothing of them is trained, or all that was is cut off
    divided: int = 0  # conversations of which several rows were made
    straddling: int = 0  # trained tokens that hold characters on both sides of a boundary

    def told(self) -> str:
        """Returns a clause with all that is not zero."""
        names = {
            "bad": "rows that cannot be used were left out",
            "truncated": "too long and cut", "dropped": "too long and left out",
            "untrained": "left out because nothing of them is trained",
            "divided": "conversations made several rows (the template rewrites past turns)",
            "straddling": "tokens hold both trained and other characters, and are trained",
        }  # fmt: skip
        head = f"{self.rows} rows of {self.lines}, {self.tokens} tokens, {self.trained} trained"
        return "; ".join(
            [head, *(f"{vars(self)[key]} {said}" for key, said in names.items() if vars(self)[key])]
        )

    def add(self, other: Mapping[str, int]) -> None:
        """Add counts of the same names."""
        for one in fields(self):
            setattr(self, one.name, vars(self)[one.name] + other[one.name])


@dataclass(frozen=True)
class RowRules:
    """What decides how an example becomes rows."""

    kind: str
    train_on: str = "assistant_only"
    seq_len: int = 1024
    too_long: str = "drop"


class RowMaker:
    """Makes rows of examples; `counts` says what was cut or left out."""

    def __init__(self, words: Tokenizer, speaker: Callable[[], Speaker], rules: RowRules) -> None:
        self.words, self.rules, self.counts = words, rules, RowCounts()
        self._speaker_of = speaker
        self._speaker: Speaker | None = None
        self._begin = list(words.template[0])

    @property
    def speaker(self) -> Speaker:
        """Renders conversations; made when the first one comes."""
        if self._speaker is None:
            self._speaker = self._speaker_of()
        return self._speaker

    def rows(self, example: Example) -> list[Row]:
        """Returns the rows of an example, which the policy for long ones may leave out. Errors:
        BadRow.
        """
        rules = self.rules
        if rules.kind == "prompts":
            made: list[Row] = [PromptRow(self._prompt(example), example.columns)]
        elif rules.kind in PAIRED or rules.kind == "ranked":
            made = [self._several(example)]
        elif rules.kind in LABELLED:
            talk = _joined(example.prompt, example.answers)
            (sequence,) = self._sequences("", talk, example, "all")[:1]
            made = [LabelledRow(sequence, example.label)]
        elif rules.kind in ("unpaired", "scored"):
            (sequence,) = self._completion(example, 0)
            made = [LabelledRow(sequence, example.label, sequence.ids[: _prompt_of(sequence)])]
        else:
            made = [*self._sequences(example.prompt, example.answers[0], example, rules.train_on)]
            self.counts.divided += len(made) > 1
        fitted = [one for row in made if (one := self._fitted(row)) is not None]
        for row in fitted:
            self._count(row)
        return fitted

    # Sequences

    def _sequences(
        self, prompt: Talk, answer: Talk, example: Example, train_on: str
    ) -> list[SftRow]:
        if isinstance(answer, str):
            return [self._text(prompt, answer, train_on)]
        passages = self.speaker.passages(
            (*prompt, *answer), len(prompt), train_on, example.tools, example.options
        )
        return [self.tokenised(passage) for passage in passages]

    def tokenised(self, passage: Passage) -> SftRow:
        """Returns the ids of a passage, and which of them are trained."""
        ids, offsets = self.words.encode_offsets(passage.text)
        begin, end = offsets[:, 0], offsets[:, 1]
        begin = np.where(begin == end, end - 1, begin)  # spaces that the library left out
        trained = np.zeros(len(ids), bool)
        for low, high in passage.spans:
            inside = np.maximum(begin, low) < np.minimum(end, high)
            self.counts.straddling += int(
                (inside & ((begin < low) | (end > high)) & (end - begin > 1)).sum()
            )
            trained |= inside
        return SftRow(np.array(ids, np.int32), trained)

    def _text(self, prompt: str, answer: str, train_on: str) -> SftRow:
        """A plain text: the tokenizer's own beginning, prompt and answer as they stand, and the end
        of the text, each once.
        """
        text = prompt + answer
        low = 0 if train_on == "all" or not prompt else len(prompt)
        row = self.tokenised(Passage(text, ((low, len(text)),)))
        before = self._begin if row.ids[: len(self._begin)].tolist() != self._begin else []
        after = [self.words.eod] if row.ids[-1:].tolist() != [self.words.eod] else []
        ids = np.concatenate([np.array(before, np.int32), row.ids, np.array(after, np.int32)])
        trained = np.concatenate(
            [np.zeros(len(before), bool), row.trained, np.ones(len(after), bool)]
        )
        return SftRow(ids, trained)

    def _prompt(self, example: Example) -> np.ndarray:
        if isinstance(example.prompt, str):
            ids = self.words.encode_offsets(example.prompt)[0]
            begin = self._begin if ids[: len(self._begin)] != self._begin else []
            return np.array([*begin, *ids], np.int32)
        text = self.speaker.prompt(example.prompt, example.tools, example.options)
        return np.array(self.words.encode_offsets(text)[0], np.int32)

    def _completion(self, example: Example, number: int) -> list[SftRow]:
        """An answer to a prompt, whole: all turns of the assistant in it are trained."""
        made = self._sequences(example.prompt, example.answers[number], example, "assistant_only")
        if len(made) > 1:
            raise BadRow(
                "the chat template writes the turns of this completion otherwise when others "
                "follow them, so they cannot stand in one sequence. Give completions of one turn, "
                "or another template"
            )
        return made

    def _several(self, example: Example) -> PreferenceRow | RankedRow:
        """A pair, or more answers; the prompt is what all of them begin with."""
        made = [self._completion(example, number)[0] for number in range(len(example.answers))]
        size = min(map(_prompt_of, made))
        for one in made[1:]:
            differ = np.flatnonzero(made[0].ids[:size] != one.ids[:size])
            size = int(differ[0]) if len(differ) else size
        prompt = made[0].ids[:size]
        if self.rules.kind == "ranked":
            return RankedRow(prompt, tuple(made), example.ranks)
        return PreferenceRow(prompt, *made, example.margin)

    # Length

    def _fitted(self, row: Row) -> Row | None:
        """The row within the longest length, or None when it is left out."""
        if isinstance(row, PromptRow):
            return self._cut_prompt(row)
        sequences = _sequences_of(row)
        longest, most = max(len(one.ids) for one in sequences), self.rules.seq_len
        if longest > most:
            if not self._may_cut(longest):
                return None
            ends = self.rules.too_long == "keep_end"
            begin, end = (longest - most, longest) if ends else (0, most)
            cut = [SftRow(one.ids[begin:end], one.trained[begin:end]) for one in sequences]
            row = _with(row, cut, begin)
        if self.rules.kind not in LABELLED:
            wanting = [one for one in _sequences_of(row) if not one.trained[1:].any()]
            if wanting:  # the first token of a sequence is never predicted
                self.counts.untrained += 1
                return None
        self.counts.truncated += longest > most
        return row

    def _cut_prompt(self, row: PromptRow) -> PromptRow | None:
        length, most = len(row.ids), self.rules.seq_len
        if length <= most:
            return row
        if not self._may_cut(length):
            return None
        self.counts.truncated += 1
        ids = row.ids[-most:] if self.rules.too_long == "keep_end" else row.ids[:most]
        return PromptRow(ids, row.columns)

    def _may_cut(self, length: int) -> bool:
        if self.rules.too_long == "error":
            raise BadRow(
                f"the row has {length} tokens, more than data.seq_len {self.rules.seq_len}"
            )
        self.counts.dropped += self.rules.too_long == "drop"
        return self.rules.too_long != "drop"

    def _count(self, row: Row) -> None:
        self.counts.rows += 1
        if isinstance(row, PromptRow):
            self.counts.tokens += len(row.ids)
            return
        for one in _sequences_of(row):
            self.counts.tokens += len(one.ids)
            self.counts.trained += int(one.trained[1:].sum())


def _joined(prompt: Talk, answers: tuple[Talk, ...]) -> Talk:
    """What a head classifies: all of it."""
    talks = [talk for talk in (prompt, *answers) if talk]
    if not talks:
        raise BadRow("the text is empty")
    if all(isinstance(talk, str) for talk in talks):
        return "".join(talks)
    return tuple(message for talk in talks for message in talk)


def _prompt_of(row: SftRow) -> int:
    """Tokens before the first trained one."""
    return int(row.trained.argmax())


def _sequences_of(row: SftRow | PreferenceRow | RankedRow | LabelledRow) -> list[SftRow]:
    if isinstance(row, PreferenceRow):
        return [row.chosen, row.rejected]
    if isinstance(row, RankedRow):
        return [*row.sequences]
    return [row.sequence] if isinstance(row, LabelledRow) else [row]


def _with(row: Row, sequences: list[SftRow], begin: int) -> Row:
    """The row with other sequences, of which the first `begin` tokens are gone."""
    if isinstance(row, (PreferenceRow, RankedRow)):
        size = min(len(row.prompt), begin + min(len(one.ids) for one in sequences))
        if isinstance(row, RankedRow):
            return RankedRow(row.prompt[begin:size], tuple(sequences), row.ranks)
        return PreferenceRow(row.prompt[begin:size], *sequences, row.margin)
    if isinstance(row, LabelledRow):
        return LabelledRow(
            sequences[0], row.label, row.prompt[begin : begin + len(sequences[0].ids)]
        )
    return sequences[0]
