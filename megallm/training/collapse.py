"""Signs that a policy collapses, read from the rows of metrics.jsonl, and what to try. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

WINDOW = 5  # steps that a figure is averaged over
QUIET = 50  # steps before the same warning is given again

StepFigures = Mapping[str, float]


@dataclass(frozen=True)
class Sign:
    """A figure, when it is a bad sign given its mean over the first and the last steps, and what
    to say.
    """

    name: str
    figure: str
    bad: Callable[[float, float], bool]
    sentence: str


SIGNS = (
    Sign(
        "entropy", "entropy", lambda first, now: now < 0.1 * first,
        "the entropy of a token has fallen from {first:.3g} to {now:.3g} nats: the policy explores "
        "no more. Try a lower optim.lr, rl.entropy_coef=0.001, or a higher rl.high (0.28)",
    ),
    Sign(
        "reward", "reward", lambda first, now: now < first - 0.3 * abs(first),
        "the mean reward has fallen from {first:.3g} to {now:.3g}: updates are too large. Go back to "
        "an earlier checkpoint with a lower optim.lr, or hold the policy with rl.kl.loss=0.04",
    ),
    Sign(
        "zero_std", "frac_reward_zero_std", lambda first, now: now > 0.9,
        "{now:.0%} of the groups earn the same reward throughout and teach nothing. Try prompts of "
        "another difficulty, more answers each (sampling.group), or sampling.resample=3",
    ),
    Sign(
        "short", "completions/mean_length", lambda first, now: now < 0.3 * first,
        "answers have shrunk from {first:.4g} to {now:.4g} tokens. Look at RUN/rollouts.jsonl for "
        "what the reward prefers; rl.algorithm=dr_grpo or dapo has no bias to short answers",
    ),
    Sign(
        "truncated", "completions/clipped_ratio", lambda first, now: now > max(0.5, 1.5 * first),
        "{now:.0%} of the answers are cut at sampling.max_new_tokens. Raise it, or try "
        "rl.overlong_cache or rl.mask_truncated=true",
    ),
    Sign(
        "ess", "rl/ess_fraction", lambda first, now: now < 0.5,
        "the answers of a step are worth {now:.0%} of their number as samples of the policy that is "
        "trained. Try fewer updates a step (rl.epochs, a larger train.global_batch), a lower "
        "optim.lr, or a smaller rl.replay.staleness",
    ),
)  # fmt: skip


UNREWARDED = "unrewarded"  # the name of the warning about answers without any reward


class CollapseMonitor:
    """Sees each row once, in order, and yields warnings."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}
        self._told: dict[str, int] = {}

    def see(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields (name, sentence) for each bad sign that was not told lately. Rows without a figure
        say nothing about it, but one without any reward, which trains nothing.
        """
        yield from self._unrewarded(row)
        for sign in SIGNS:
            value = row.get(sign.figure)
            if value is None:
                continue
            first = self._first.setdefault(sign.figure, [])
            if len(first) < WINDOW:
                first.append(value)
            last = self._last.setdefault(sign.figure, deque(maxlen=WINDOW))
            last.append(value)
            told = self._told.get(sign.name, -QUIET)
            if len(last) < WINDOW or row["step"] - told < QUIET:
                continue
            before, now = fmean(first), fmean(last)
            if sign.bad(before, now):
                self._told[sign.name] = row["step"]
                yield sign.name, sign.sentence.format(first=before, now=now)

    def _unrewarded(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields a warning about a step in which every answer was left without a reward."""
        told = self._told.get(UNREWARDED, -QUIET)
        if row.get("reward", 0.0) is not None or row["step"] - told < QUIET:
            return
        self._told[UNREWARDED] = row["step"]
        yield UNREWARDED, (
            "no answer has a reward: every function returned None (or its errors became None, "
            "reward.on_error), so the step trained nothing. None leaves an answer out; return a "
            "number, and look at the column rewards of RUN/rollouts.jsonl"
        )
