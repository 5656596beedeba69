"""Answers of a policy, and how they lie in microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megallm.base.errors import InternalError
from megallm.data.loader import to_tensors
from megallm.data.objective import Arrays
from megallm.data.shared_prefix import PrefixSharing, RowCost, SharedRow, Sized, causal, shared_row
from megallm.engine.engine import Engine
from megallm.losses.reduce import num_sequences

Batch = dict[str, Tensor]
# Tensors [B, T] of a batch, and the values of an answer that they hold.
VALUES = {"advantages": "advantages", "old_log_probs": "old", "rollout_log_probs": "log_probs"}


@dataclass
class Response:
    """One answer to a prompt, and what becomes known of it.

    `id` is that of its request and `group` that of its prompt, `step` the one that it was drawn in;
    `log_probs` are the sampling policy's at the sampling temperature, whose weights have seen
    `version` updates. `old` are the log-probs that a ratio is formed with,
    `reference` those of the reference model, None where there is none; `values` and `returns` are
    those of a critic.

    Of several turns `tokens` holds also what tools and environments said between them: `mask` is
    False there (empty: the policy has sampled all), and numbers of tokens are 0. `versions` are
    those of each token where weights have changed within the answer (empty: `version` throughout);
    `drawn` counts what the generator gave, from which no mask may differ. `demonstrated` is None of
    a sample; of a demonstration it says which of its tokens are trained. `novelty` is a part of
    its reward.
    """

    id: int
    group: int
    step: int
    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    reason: str
    version: int
    advantages: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)
    reference: list[float] | None = None
    values: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    drawn: int | None = None
    demonstrated: list[bool] | None = None
    novelty: float = 0.0

    @property
    def sampled(self) -> list[bool]:
        """Which tokens are trained: those that the policy has sampled, or that are demonstrated."""
        if self.demonstrated is not None:
            return self.demonstrated
        return self.mask or [True] * len(self.tokens)

    @property
    def count(self) -> int:
        """Number of tokens that were sampled, or are demonstrated."""
        if self.demonstrated is not None:
            return sum(self.demonstrated)
        return len(self.tokens) if self.drawn is None else self.drawn

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut at its longest length."""
        return self.reason == "length"

    @property
    def size(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.prompt) + len(self.tokens) - 1

    def compared(self, now: Sequence[float], version: int) -> LogProbPair:
        """Returns the sampler's log-probs beside the trainer's `now`, whose weights are those of
        `version`.
        """
        versions = self.versions or [self.version] * len(self.tokens)
        every = zip(self.log_probs, now, versions, self.sampled, strict=True)
        kept = [(a, b, version - each) for a, b, each, mine in every if mine]
        same = [(a, b) for a, b, age in kept if not age]
        return LogProbPair(
            ([a for a, _, _ in kept], [b for _, b, _ in kept]),
            ([a for a, _ in same], [b for _, b in same]),
            [age for _, _, age in kept],
        )


class LogProbPair(NamedTuple):
    """The sampler's and the trainer's log-probs of tokens that were sampled: of all, and of those
    that the trainer's weights have drawn; `ages` counts the updates between both.
    """

    every: tuple[list[float], list[float]]
    same: tuple[list[float], list[float]]
    ages: list[int]


class RowPlace(NamedTuple):
    """Where an answer stands in a microbatch: in `row`, from `begin` on, without the first
    `skipped` tokens of its prompt, which it shares; `at` is where the predictions of its tokens
    begin.
    """

    row: int
    begin: int
    skipped: int
    at: int


class RowShape(NamedTuple):
    """The `length` of every rank's rows, whether answers share their prompts in them, and the share
    of the tokens that this saves.
    """

    length: int
    shared: bool = False
    saved: float = 0.0


@dataclass(frozen=True)
class ResponseRows:
    """Lays answers into this data rank's microbatches, of the same shape on every rank.

    `micro_batch` answers a microbatch, the length a multiple of `multiple`; with `packing` they
    stand one after another in one row and do not see each other. With `sharing` neighbours with the
    same prompt share it where that pays (`data.shared_prefix`): one row a microbatch, whatever
    `packing` is. What lies in a microbatch, and so every loss, is the same either way.
    """

    engine: Engine
    micro_batch: int
    multiple: int = 1
    packing: bool = False
    dtype: torch.dtype = torch.float32
    sharing: PrefixSharing | None = None

    def batches(
        self, answers: Sequence[Response], values: Mapping[str, str] | None = None
    ) -> list[Batch]:
        """Returns this rank's microbatches: `tokens`, `labels`, `positions`, the `mask` of the
        answers' tokens, and per token, 0 beside the mask, `values`: name -> attribute of an answer.
        Without them `advantages`, `old_log_probs`, `rollout_log_probs` and, where every sample has
        them, `ref_log_probs`. Missing answers are padding. Where there are demonstrations,
        `demonstration` `[S]` says which sequences are.
        """
        micros, shape = self._micros(answers)
        sampled = [answer for answer in answers if answer.demonstrated is None]
        if values is None:
            further = all(answer.reference is not None for answer in sampled)
            values = VALUES | ({"ref_log_probs": "reference"} if further else {})
        made = [self._batch(micro, shape, values) for micro in micros]
        self._check_mask(made, micros)
        if len(sampled) < len(answers):
            for micro, batch in zip(micros, made, strict=True):
                shown = [one.demonstrated is not None for one in micro if one is not None]
                padding = [False] * (num_sequences(batch) - len(shown))
                batch["demonstration"] = torch.tensor(shown + padding)
        return made

    def _check_mask(
        self, batches: Sequence[Batch], micros: Sequence[Sequence[Response | None]]
    ) -> None:
        """Raises InternalError unless exactly the tokens that were sampled are trained."""
        trained = sum(int(batch["mask"].sum()) for batch in batches)
        drawn = sum(one.count for micro in micros for one in micro if one is not None)
        if trained != drawn:
            raise InternalError(
                f"{trained} tokens are to be trained on rank {self.engine.mesh.rank}, but the "
                f"policy has sampled {drawn}: what tools and environments say must not be trained."
            )

    def scores(
        self, answers: Sequence[Response], score: Callable[[list[Batch]], list[Tensor]]
    ) -> list[list[float]]:
        """Returns what `score` `[B, T]` says of each token of each answer, on every rank;
        collective over the world.
        """
        micros, shape = self._micros(answers)
        scored = score([self._batch(micro, shape, {}) for micro in micros])
        mine, sizes = [np.zeros(0)], []
        for micro, values in zip(micros, scored, strict=True):
            rows = values.to("cpu", torch.float64).numpy()
            for answer, place in zip(micro, self._places(micro, shape), strict=True):
                kept = [] if answer is None else answer.sampled
                found = rows[place.row, place.at : place.at + len(kept)]
                mine.append(np.where(kept, found, 0.0))
                sizes.append(len(kept))
        told: list[list[float]] = []
        for values, counts in self.engine.all([[np.concatenate(mine), np.array(sizes)]]):
            flat, ends = values.tolist(), np.cumsum([0, *counts]).tolist()
            told += [flat[a:b] for a, b in pairwise(ends)]
        return told[: len(answers)]

    def pooled(self, answers: Sequence[Response]) -> np.ndarray:
        """Returns the policy's final hidden states, averaged over the tokens of each answer, `[n,
        D]`, on every rank; collective over the world.
        """
        micros, shape = self._micros(answers)
        found = self.engine.pooled([self._batch(micro, shape, {}) for micro in micros])
        counts = [len(micro) for micro in micros]  # a packed row may end with one of padding
        mine = [x[:n].to("cpu", torch.float64).numpy() for x, n in zip(found, counts, strict=True)]
        if self.packing or shape.shared:
            mine = [_at_answers(x, micro) for x, micro in zip(mine, micros, strict=True)]
        return np.concatenate(self.engine.all([np.concatenate(mine)]))[: len(answers)]

    def shape(self, answers: Sequence[Response]) -> RowShape:
        """Returns the shape of the rows in which these answers are trained."""
        return self._shape(self._filled(answers))

    def _filled(self, answers: Sequence[Response]) -> list[list[Response | None]]:
        """All ranks' answers by microbatch, with padding at the end."""
        count, ranks = self.micro_batch, self.engine.mesh.data.size
        room = -len(answers) % (count * ranks) if answers else count * ranks
        filled: list[Response | None] = [*answers, *[None] * room]
        return [filled[at : at + count] for at in range(0, len(filled), count)]

    def _micros(
        self, answers: Sequence[Response]
    ) -> tuple[list[list[Response | None]], RowShape]:
        """This rank's answers by microbatch, and the shape of all ranks' rows."""
        micros = self._filled(answers)
        return self.engine.mine(micros), self._shape(micros)

    def _shape(self, micros: list[list[Response | None]]) -> RowShape:
        sizes = [[0 if one is None else one.size for one in micro] for micro in micros]
        length = self._rounded(sum(each) if self.packing else max(each) for each in sizes)
        if self.sharing is None:
            return RowShape(length)
        rows = [_shared(micro) for micro in micros]
        shared = self._rounded(row.ends[-1] for row in rows)
        plain, other = RowCost(), RowCost()
        for row, each in zip(rows, sizes, strict=True):
            rest = shared - row.ends[-1]
            other = other.plus(row.cost).plus(RowCost(rest, causal(rest)))
            documents = [*each, length - sum(each)] if self.packing else [length] * len(each)
            plain = plain.plus(RowCost(sum(documents), sum(map(causal, documents))))
        found = any(row.prefixes for row in rows)
        if not found or not self.sharing.pays(plain, other):
            return RowShape(length)
        return RowShape(shared, True, 1 - other.tokens / plain.tokens)

    def _rounded(self, sizes: Iterable[int]) -> int:
        return -(-max(1, *sizes) // self.multiple) * self.multiple

    def _places(self, micro: Sequence[Response | None], shape: RowShape) -> list[RowPlace]:
        before, made = 0, []
        shared = iter(_shared(micro).places if shape.shared else ())
        for row, answer in enumerate(micro):
            first = 0 if answer is None else len(answer.prompt) - 1
            if answer is not None and shape.shared:
                begin, skipped = next(shared)
                made.append(RowPlace(0, begin, skipped, begin + first - skipped))
            elif self.packing or shape.shared:
                made.append(RowPlace(0, before, 0, before + first))
            else:
                made.append(RowPlace(row, 0, 0, first))
            before += 0 if answer is None else answer.size
        return made

    def _batch(
        self, micro: Sequence[Response | None], shape: RowShape, wanted: Mapping[str, str]
    ) -> Batch:
        length, whole = shape.length, self.packing or shape.shared
        rows = 1 if whole else len(micro)
        size = rows, length
        names = ("tokens", "labels", "positions")
        batch: Arrays = {name: np.zeros(size, np.int64) for name in names}
        batch["mask"] = np.zeros(size, bool)
        batch |= {name: np.zeros(size) for name in wanted}
        ends = [0]
        for answer, (row, begin, skipped, at) in zip(
            micro, self._places(micro, shape), strict=True
        ):
            if answer is None:
                continue
            count, end = len(answer.tokens), begin + answer.size - skipped
            batch["tokens"][row, begin:end] = [*answer.prompt, *answer.tokens[:-1]][skipped:]
            batch["positions"][row, begin:end] = np.arange(skipped, answer.size)
            batch["labels"][row, at : at + count] = answer.tokens
            kept = batch["mask"][row, at : at + count] = np.array(answer.sampled)
            for name, key in wanted.items():
                values = vars(answer)[key]
                filled = values if values else 0.0  # of a demonstration there are none
                batch[name][row, at : at + count] = np.where(kept, filled, 0.0)
            ends.append(end)
        if shape.shared:
            batch |= self._share(batch["tokens"], micro)
        elif self.packing:
            batch |= SharedRow((), (), tuple(ends), (-1,) * (len(ends) - 1)).of_documents(length)
            del batch["prefix_of"]
        made = to_tensors(batch)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in made.items()}

    @staticmethod
    def _share(tokens: np.ndarray, micro: Sequence[Response | None]) -> Arrays:
        """Fill shared prompts into `tokens` `[1, T]`; returns what the row's documents are."""
        found, row = [one for one in micro if one is not None], _shared(micro)
        for begin, size, source in row.prefixes:
            tokens[0, begin : begin + size] = found[source].prompt[:size]
        return row.of_documents(tokens.shape[1])


def _shared(micro: Sequence[Response | None]) -> SharedRow:
    """The row of a microbatch's answers in which neighbours with the same prompt share it."""
    return shared_row(
        [
            Sized(one.size, len(one.prompt) - 1, tuple(one.prompt))
            for one in micro
            if one is not None
        ]
    )


def _at_answers(x: np.ndarray, micro: Sequence[Response | None]) -> np.ndarray:
    """Rows `[S, D]` of a packed microbatch as one for each of its answers, 0 for a missing one."""
    rows = np.zeros((len(micro), x.shape[-1]))
    present = [i for i, one in enumerate(micro) if one is not None]
    rows[present] = x[: len(present)]
    return rows
