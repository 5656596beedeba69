"""Answers of a policy, and how they lie in microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megallm.data.loader import to_tensors
from megallm.data.objective import Arrays
from megallm.engine.engine import Engine

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
    those of a critic. `demonstrated` is None of a sample; of a demonstration it says which of its
    tokens are trained. `novelty` is a part of its reward.
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
    demonstrated: list[bool] | None = None
    novelty: float = 0.0

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut at its longest length."""
        return self.reason == "length"

    @property
    def size(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.prompt) + len(self.tokens) - 1


class RowPlace(NamedTuple):
    """Where the predictions of an answer's tokens stand in a microbatch: `row`, from `begin`."""

    row: int
    begin: int


@dataclass(frozen=True)
class ResponseRows:
    """Lays answers into this data rank's microbatches, of the same shape on every rank.

    `micro_batch` answers a microbatch, the length a multiple of `multiple`; with `packing` they
    stand one after another in one row and do not see each other.
    """

    engine: Engine
    micro_batch: int
    multiple: int = 1
    packing: bool = False
    dtype: torch.dtype = torch.float32

    def batches(
        self, answers: Sequence[Response], values: Mapping[str, str] | None = None
    ) -> list[Batch]:
        """Returns this rank's microbatches: `tokens`, `labels`, `positions`, the `mask` of the
        answers' tokens, and per token, 0 beside the mask, `values`: name -> attribute of an answer.
        Without them `advantages`, `old_log_probs`, `rollout_log_probs` and, where every sample has
        them, `ref_log_probs`. Missing answers are padding. Where there are demonstrations,
        `demonstration` `[S]` says which sequences are.
        """
        micros, length = self._micros(answers)
        sampled = [answer for answer in answers if answer.demonstrated is None]
        if values is None:
            further = all(answer.reference is not None for answer in sampled)
            values = VALUES | ({"ref_log_probs": "reference"} if further else {})
        batches = [self._batch(micro, length, values) for micro in micros]
        if len(sampled) < len(answers):
            for micro, batch in zip(micros, batches, strict=True):
                batch["demonstration"] = self._demonstration(micro, batch)
        return batches

    @staticmethod
    def _demonstration(micro: Sequence[Response | None], batch: Batch) -> Tensor:
        """Bool `[S]`; padding is none."""
        shown = [one.demonstrated is not None for one in micro if one is not None]
        count = len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else len(micro)
        return torch.tensor(shown + [False] * (count - len(shown)))

    def scores(
        self, answers: Sequence[Response], score: Callable[[list[Batch]], list[Tensor]]
    ) -> list[list[float]]:
        """Returns what `score` `[B, T]` says of each token of each answer, on every rank;
        collective over the world.
        """
        micros, length = self._micros(answers)
        scored = score([self._batch(micro, length, {}) for micro in micros])
        mine, sizes = [np.zeros(0)], []
        for micro, values in zip(micros, scored, strict=True):
            rows = values.to("cpu", torch.float64).numpy()
            for answer, (row, begin) in zip(micro, self._places(micro), strict=True):
                size = 0 if answer is None else len(answer.tokens)
                mine.append(rows[row, begin : begin + size])
                sizes.append(size)
        found: list[list[float]] = []
        for values, counts in self.engine.all([[np.concatenate(mine), np.array(sizes)]]):
            flat, ends = values.tolist(), np.cumsum([0, *counts]).tolist()
            found += [flat[a:b] for a, b in pairwise(ends)]
        return found[: len(answers)]

    def pooled(self, answers: Sequence[Response]) -> np.ndarray:
        """Returns the policy's final hidden states, averaged over the tokens of each answer, `[n,
        D]`, on every rank; collective over the world.
        """
        micros, length = self._micros(answers)
        found = self.engine.pooled([self._batch(micro, length, {}) for micro in micros])
        counts = [len(micro) for micro in micros]  # a packed row may end with one of padding
        mine = [x[:n].to("cpu", torch.float64).numpy() for x, n in zip(found, counts, strict=True)]
        if self.packing:
            mine = [_at_answers(x, micro) for x, micro in zip(mine, micros, strict=True)]
        return np.concatenate(self.engine.all([np.concatenate(mine)]))[: len(answers)]

    def _micros(self, answers: Sequence[Response]) -> tuple[list[list[Response | None]], int]:
        """This rank's answers by microbatch, and the length of all ranks' rows."""
        count, ranks = self.micro_batch, self.engine.mesh.data.size
        room = -len(answers) % (count * ranks) if answers else count * ranks
        filled: list[Response | None] = [*answers, *[None] * room]
        micros = [filled[at : at + count] for at in range(0, len(filled), count)]
        sizes = [[0 if one is None else one.size for one in micro] for micro in micros]
        longest = max(sum(each) if self.packing else max(each) for each in sizes)
        longest = max(longest, 1)
        return self.engine.mine(micros), -(-longest // self.multiple) * self.multiple

    def _places(self, micro: Sequence[Response | None]) -> list[RowPlace]:
        before, made = 0, []
        for row, answer in enumerate(micro):
            first = 0 if answer is None else len(answer.prompt) - 1
            made.append(RowPlace(0, before + first) if self.packing else RowPlace(row, first))
            before += 0 if answer is None else answer.size
        return made

    def _batch(
        self, micro: Sequence[Response | None], length: int, wanted: Mapping[str, str]
    ) -> Batch:
        rows = 1 if self.packing else len(micro)
        shape = rows, length
        batch: Arrays = {name: np.zeros(shape, np.int64) for name in ("tokens", "labels")}
        batch["positions"] = np.tile(np.arange(length), (rows, 1))
        batch["mask"] = np.zeros(shape, bool)
        batch |= {name: np.zeros(shape) for name in wanted}
        ends = [0]
        for answer, (row, at) in zip(micro, self._places(micro), strict=True):
            if answer is None:
                continue
            size, count = answer.size, len(answer.tokens)
            begin = at - len(answer.prompt) + 1
            batch["tokens"][row, begin : begin + size] = [*answer.prompt, *answer.tokens[:-1]]
            batch["labels"][row, at : at + count] = answer.tokens
            batch["mask"][row, at : at + count] = answer.demonstrated or True
            for name, key in wanted.items():
                values = vars(answer)[key]
                batch[name][row, at : at + count] = values if values else 0.0
            if self.packing:
                batch["positions"][row, begin : begin + size] = np.arange(size)
                ends.append(begin + size)
        if self.packing:
            if ends[-1] < length:
                batch["positions"][0, ends[-1] :] = np.arange(length - ends[-1])
                ends.append(length)
            batch["cu_seqlens"] = np.array(ends, np.int32)
        made = to_tensors(batch)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in made.items()}


def _at_answers(x: np.ndarray, micro: Sequence[Response | None]) -> np.ndarray:
    """Rows `[S, D]` of a packed microbatch as one for each of its answers, 0 for a missing one."""
    rows = np.zeros((len(micro), x.shape[-1]))
    present = [i for i, one in enumerate(micro) if one is not None]
    rows[present] = x[: len(present)]
    return rows
