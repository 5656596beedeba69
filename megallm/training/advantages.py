"""How the rewards of a step become advantages of its tokens: a table of estimators. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megallm.losses.advantage import (
    Floats,
    combine_rewards,
    decoupled_advantages,
    group_advantages,
    leave_one_out,
    reinforce_plus_plus,
)


@dataclass(frozen=True)
class Credit:
    """What advantages are made of, of all answers of a step over all data ranks.

    `table` `[n, k]` holds the reward of each function, NaN where there is none, `weights` `[k]`
    their weights, `extra` `[n]` what is added to their sum, `groups` `[n]` the prompt of an answer,
    `tokens` `[n]` its length, `penalties` what each of its tokens costs (None: nothing), `sampled`
    which of them the policy has drawn (None: all).
    """

    table: Floats
    weights: Floats
    extra: Floats
    groups: Sequence[int]
    tokens: Sequence[int]
    penalties: Sequence[Floats] | None = None
    sampled: Sequence[Sequence[bool]] | None = None

    @property
    def mask(self) -> np.ndarray:
        """Which tokens `[n, longest]` are steps of the policy: neither padding nor of a tool."""
        longest = max(self.tokens, default=0)
        mask = np.arange(longest) < np.array(self.tokens)[:, None]
        for row, kept in zip(mask, self.sampled or (), strict=False):
            row[: len(kept)] = kept
        return mask

    @property
    def rewards(self) -> Floats:
        """The whole reward `[n]` without penalties of tokens; NaN for an answer without any."""
        return combine_rewards(self.table, self.weights) + self.extra

    @property
    def totals(self) -> Floats:
        """The whole reward `[n]` with them."""
        if self.penalties is None:
            return self.rewards
        return self.rewards - np.array([each.sum() for each in self.penalties])


def _plus_plus(credit: Credit, baseline: bool) -> Floats:
    """REINFORCE++ on rows `[n, longest]`."""
    mask, longest = credit.mask, max(credit.tokens, default=0)
    penalties = None
    if credit.penalties is not None:
        penalties = np.stack([np.pad(x, (0, longest - len(x))) for x in credit.penalties])
    groups = credit.groups if baseline else None
    return reinforce_plus_plus(credit.rewards, mask, penalties, groups)


def _decoupled(credit: Credit) -> Floats:
    return decoupled_advantages(credit.table, credit.weights, credit.groups)


def _scaled(credit: Credit, scale: str) -> Floats:
    return group_advantages(credit.totals, credit.groups, scale)


# Each gives one number an answer `[n]`, or one a token `[n, longest]`.
ESTIMATORS: Mapping[str, Callable[[Credit], Floats]] = {
    "group": partial(_scaled, scale="group"),
    "batch": partial(_scaled, scale="batch"),
    "none": partial(_scaled, scale="none"),
    "leave_one_out": lambda credit: leave_one_out(credit.totals, credit.groups),
    "decoupled": _decoupled,
    "reinforce_plus_plus": partial(_plus_plus, baseline=False),
    "reinforce_plus_plus_baseline": partial(_plus_plus, baseline=True),
}
OF_ALGORITHM = {  # where it is not "group"
    "dr_grpo": "none",
    "rloo": "leave_one_out",
    "reinforce": "leave_one_out",
    "reinforce_plus_plus": "reinforce_plus_plus",
}


def advantages_of(credit: Credit, name: str) -> list[list[float]]:
    """Returns the advantage of each token of each answer."""
    made = ESTIMATORS[name](credit)
    rows = zip(made, credit.tokens, strict=True)
    if made.ndim == 1:
        return [[float(each)] * size for each, size in rows]
    return [each[:size].tolist() for each, size in rows]
