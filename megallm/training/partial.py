"""Rollouts over several steps: a step trains the first groups that are whole, and answers that are
still growing go on in the next one, with other weights (Kimi k1.5, arXiv 2501.12599).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence

import torch

from megallm.base.stopping import StepAbandoned
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.data.chat.rows import PromptRow
from megallm.training.replies import Episode
from megallm.training.rl_config import PartialConfig
from megallm.training.rl_metrics import Phases
from megallm.training.rollout import Experience, Rollouts

NAME = "optim.rollout.open"  # of the answers in a checkpoint, as UTF-8 of JSON: numbers are exact


class PartialRollouts:
    """Answers that no step has trained yet, a part of the state of a run: those of two draws of
    prompts at most.

    All growing answers get `config.tokens` at a time, until there are the groups of a step, and
    those that began `config.staleness` steps ago are among them.
    """

    def __init__(self, rollouts: Rollouts, config: PartialConfig) -> None:
        self.rollouts, self.config = rollouts, config
        self.open: list[Episode] = []

    def draw(
        self,
        step: int,
        groups: int,
        fresh: Callable[[], tuple[int, Sequence[PromptRow]]],
        phases: Phases,
    ) -> Experience:
        """Returns the scored answers of `groups` groups, the oldest that are whole; `fresh` gives
        the rows of a further draw, and the id of its first answer. Collective over the world.
        StepAbandoned leaves the open answers as they were.
        """
        before = copy.deepcopy(self.open)
        try:
            return self._draw(step, groups, fresh, phases)
        except StepAbandoned:
            self.open = before
            raise

    def _draw(
        self,
        step: int,
        groups: int,
        fresh: Callable[[], tuple[int, Sequence[PromptRow]]],
        phases: Phases,
    ) -> Experience:
        size = self.rollouts.config.group
        with phases("rollout"):
            while len(self.open) < 2 * groups * size:
                first, rows = fresh()
                self.open += self.rollouts.runner.open(rows, first, size, step, "train")
            while not self._enough(step, groups):
                growing = [one for one in self.open if not one.reason]
                self.rollouts.grow(growing, self.config.tokens)
        whole = self._whole()[: groups]
        chosen = [one for one in self.open if one.group in whole]
        self.open = [one for one in self.open if one.group not in whole]
        rows = [PromptRow([], one.row) for one in chosen[::size]]
        with phases("reward"):
            return self.rollouts.scored(step, chosen, rows, size)

    def _whole(self) -> list[int]:
        """Groups whose answers have all ended, those of the earliest step first."""
        growing = {one.group for one in self.open if not one.reason}
        found = {(one.step, one.group) for one in self.open if one.group not in growing}
        return [group for _, group in sorted(found)]

    def _enough(self, step: int, groups: int) -> bool:
        due = {one.group for one in self.open if step - one.step >= self.config.staleness}
        whole = self._whole()
        return len(whole) >= groups and due <= {*whole}

    def state(self) -> Iterator[Part]:
        """Yields the answers as bytes; on one rank only."""
        if self.open:
            text = json.dumps([vars(one) for one in self.open]).encode()
            tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            yield Part(NAME, (len(text),), (0,), tensor)

    def load(self, reader: CheckpointReader) -> None:
        """Read what `state` has written; nothing where nothing was."""
        if NAME in reader.names():
            text = bytes(reader.read(NAME).numpy())
            self.open = [Episode(**each) for each in json.loads(text)]
