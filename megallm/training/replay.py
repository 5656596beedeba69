"""Answers of earlier steps that are kept to be trained again, a part of the state of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megallm.base.rng import key_of, permutation
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.training.responses import Response

PREFIX = "optim.rollout."  # of its tensors in a checkpoint
NOT_COUNTED = -1
_LISTS = {"prompt": torch.int64, "tokens": torch.int64, "log_probs": torch.float64,
          "advantages": torch.float64, "mask": torch.int64, "versions": torch.int64}  # fmt: skip
_NUMBERS = {"id": torch.int64, "group": torch.int64, "step": torch.int64,
            "version": torch.int64, "drawn": torch.int64}  # fmt: skip
_REASONS = ("", "length", "end", "stop", "interrupted", "turns", "error")


class ReplayBuffer:
    """The groups of the last `staleness` steps."""

    def __init__(self, staleness: int, seed: int) -> None:
        self.staleness, self.seed = staleness, seed
        self.answers: list[Response] = []

    def take(self, step: int, groups: int) -> list[Response]:
        """Returns whole groups that were drawn in the last `staleness` steps before `step`, chosen
        by the seed; fewer while there are fewer.
        """
        known = [one for one in self.answers if step - one.step <= self.staleness]
        names = sorted({one.group for one in known})
        order = permutation(key_of(self.seed, "replay", step), len(names))
        chosen = {names[i] for i in order[:groups]}
        return [one for one in known if one.group in chosen]

    def add(self, step: int, answers: Sequence[Response]) -> None:
        """Keep the answers of a step that was trained, and forget what is too old for the next."""
        if self.staleness:
            kept = [one for one in self.answers if step + 1 - one.step <= self.staleness]
            self.answers = [*kept, *answers]

    def state(self) -> Iterator[Part]:
        """Yields the buffer as arrays: the numbers of each answer, and its lists one after another;
        on one rank only.
        """
        if not self.answers:
            return
        for name, dtype in _NUMBERS.items():
            numbers = [vars(one)[name] for one in self.answers]
            yield _part(name, [NOT_COUNTED if one is None else one for one in numbers], dtype)
        yield _part("reason", [_REASONS.index(one.reason) for one in self.answers], torch.int64)
        for name, dtype in _LISTS.items():
            yield _part(name, [x for one in self.answers for x in vars(one)[name]], dtype)
        sizes = [len(vars(one)[name]) for name in _LISTS for one in self.answers]
        yield _part("sizes", sizes, torch.int64)

    def load(self, reader: CheckpointReader) -> None:
        """Read what `state` has written; nothing where nothing was."""
        if f"{PREFIX}id" not in reader.names():
            return
        values = {name: reader.read(PREFIX + name).tolist() for name in (*_NUMBERS, "reason")}
        count = len(values["id"])
        ends = np.array(reader.read(f"{PREFIX}sizes").tolist()).reshape(len(_LISTS), count)
        for name, sizes in zip(_LISTS, ends, strict=True):
            flat, at = reader.read(PREFIX + name).tolist(), np.cumsum([0, *sizes])
            values[name] = [flat[a:b] for a, b in zip(at, at[1:], strict=False)]
        values["mask"] = [list(map(bool, mask)) for mask in values["mask"]]
        values["drawn"] = [None if n == NOT_COUNTED else n for n in values["drawn"]]
        values["reason"] = [_REASONS[number] for number in values["reason"]]
        self.answers = [
            Response(**{name: values[name][i] for name in values}) for i in range(count)
        ]


def _part(name: str, values: Sequence[float], dtype: torch.dtype) -> Part:
    tensor = torch.tensor(values, dtype=dtype)
    return Part(PREFIX + name, (len(values),), (0,), tensor)
