"""What a step of reinforcement learning reports, under TRL's names and those of every run.
No torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from megallm.base.heartbeat import HEARTBEAT
from megallm.losses.advantage import Floats

Figures = dict[str, float | None]


class Phases:
    """Seconds of the parts of a step; `enter` is told when one begins."""

    def __init__(self, enter: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.enter = enter

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to that of the phase."""
        self.enter(name)
        HEARTBEAT.enter(name)
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def metrics(self) -> Figures:
        """Returns `perf/NAME_seconds` of each."""
        return {f"perf/{name}_seconds": value for name, value in self.seconds.items()}


def known_rewards(values: Floats) -> Floats:
    """Returns those that are not NaN."""
    return values[~np.isnan(values)]


def mean(values: Floats) -> float | None:
    """Returns the mean of what is known, None of nothing."""
    left = known_rewards(np.asarray(values, np.float64))
    return float(left.mean()) if left.size else None


def spread(values: Floats) -> float:
    """Returns the unbiased deviation of what is known, 0 of fewer than two."""
    left = known_rewards(values)
    return float(left.std(ddof=1)) if left.size > 1 else 0.0


def reward_metrics(
    names: Sequence[str], table: Floats, totals: Floats, groups: Sequence[int]
) -> Figures:
    """Returns the figures of the rewards `[n, k]` of k functions, and of the whole rewards `[n]`;
    deviations are means over groups, as in TRL.
    """
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    deviations = np.array([spread(totals[members]) for members in rows.values()])
    whole = mean(totals)
    figures: Figures = {
        "reward": whole,
        "rl/reward_mean": whole,
        "reward_std": mean(deviations),
        "frac_reward_zero_std": mean(deviations == 0),
    }
    for name, column in zip(names, table.T, strict=True):
        figures[f"rewards/{name}/mean"] = mean(column)
        figures[f"rewards/{name}/std"] = spread(column)
    return figures


def length_metrics(lengths: Sequence[int], truncated: Sequence[bool]) -> Figures:
    """Returns the figures of the answers' lengths in tokens."""
    size, cut = np.array(lengths, np.float64), np.array(truncated, bool)
    whole = size[~cut]
    return {
        "completions/mean_length": mean(size),
        "completions/min_length": float(size.min()),
        "completions/max_length": float(size.max()),
        "completions/clipped_ratio": mean(cut),
        "completions/mean_terminated_length": mean(whole),
        "rl/response_tokens": mean(size),
    }


def update_metrics(updates: Sequence[Mapping[str, float]]) -> Figures:
    """Returns the means over the updates of a step of what their losses report, with the effective
    sample size as a share.
    """
    figures: Figures = {}
    for name in updates[0]:
        figures[name] = math.fsum(each[name] for each in updates) / len(updates)
    squares = [each["ratio/mean_square"] for each in updates]
    shares = [
        each["ratio/mean"] ** 2 / square
        for each, square in zip(updates, squares, strict=True)
        if square > 0
    ]
    figures["rl/ess_fraction"] = math.fsum(shares) / len(shares) if shares else None
    figures["rl/entropy"] = figures.get("entropy")
    if "kl" in figures:
        figures["rl/kl"] = figures["kl"]
    clipped = figures.get("clip_ratio/region_mean", figures.get("cispo_clip_ratio"))
    if clipped is not None:
        figures["rl/clip_fraction"] = clipped
    return figures


def differences(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Figures:
    """Returns how far the trainer's and the sampler's log-probs of the same tokens lie apart, in
    nats, under TRL's names.
    """
    flat = np.abs(np.concatenate([np.subtract(a, b) for a, b in pairs]))
    return {
        "sampling/sampling_logp_difference/mean": mean(flat),
        "sampling/sampling_logp_difference/max": float(flat.max()),
    }


class Compared(Protocol):
    """The sampler's and the trainer's log-probs of the tokens of an answer, and their ages in
    updates (`training.responses.LogProbPair`).
    """

    every: tuple[Sequence[float], Sequence[float]]
    ages: Sequence[int]


def importance_metrics(pairs: Sequence[Compared]) -> Figures:
    """Returns how far the policy has left the weights that drew the tokens: their ratios under
    TRL's names, the share of the tokens that are worth as samples, and their age in updates.
    """
    sampler = np.concatenate([pair.every[0] for pair in pairs])
    trainer = np.concatenate([pair.every[1] for pair in pairs])
    ages = np.concatenate([pair.ages for pair in pairs])
    ratio = np.exp(np.clip(trainer - sampler, -20, 20))
    return {
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/min": float(ratio.min()),
        "sampling/importance_sampling_ratio/max": float(ratio.max()),
        "rl/behaviour_ess_fraction": float(ratio.mean() ** 2 / np.square(ratio).mean()),
        "rl/stale_fraction": mean(ages > 0),
        "rl/age_mean": mean(ages),
        "rl/age_max": float(ages.max()),
    }
