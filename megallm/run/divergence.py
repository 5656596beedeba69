"""Detection of a diverged run (NaN gradients, loss spikes), and which of its states are still
sound. No torch.

A checkpoint holds the state *after* its step, whose worth only the next step shows: its loss is
measured with that state. So what was saved last before a run diverges is already spoilt.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

MAX_SKIPPED = 10  # updates in a row without a finite gradient: the run has diverged
WINDOW = 100  # steps that a loss is compared with: a change of data is forgotten after as many


class DivergenceDetector:
    """Follows the losses of a run: `bad_since` is the first of the latest steps that were all
    unsound, None if none.
    """

    def __init__(self) -> None:
        self.bad_since: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def see(self, row: Mapping[str, Any]) -> None:
        """Take the metrics of one step; what was not finite is None."""
        loss, norm = row.get("train/loss"), row.get("train/grad_norm")
        known = loss is not None
        if known and norm is not None and loss <= self.limit:
            self.bad_since = None
        elif self.bad_since is None:
            self.bad_since = row["step"]
        if known:
            self._losses.append(loss)

    @property
    def limit(self) -> float:
        """Returns the largest loss that is no sign of divergence: half above the lowest of the
        window, and at least 1.
        """
        return largest_sound(self._losses)


def largest_sound(losses: Iterable[float]) -> float:
    """Returns the largest loss that is no sign of divergence after `losses`."""
    lowest = min(losses, default=math.inf)
    return lowest + max(1.0, 0.5 * abs(lowest))


class SpikeDetector:
    """Says from which loss, and from which gradient norm on a step is a spike.

    That is `sigma` standard deviations above the mean of the last `window` steps, once there are
    half as many (the rule of OLMo 2, arXiv 2501.00656, with 6 and 128), and for losses at any time
    `largest_sound`. What was a spike itself counts with its limit, so that one of them does not
    hide the next, and a level that stays becomes the usual one. A standard deviation is taken as at
    least LEAST_LOSS, or a share LEAST_NORM of the mean norm: quiet runs have small ones.
    """

    LEAST_LOSS, LEAST_NORM = 0.05, 0.5

    def __init__(self, window: int, sigma: float) -> None:
        self.window, self.sigma = window, sigma
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)

    def see(self, loss: float | None, norm: float | None) -> None:
        """Take the numbers of one step; what is not finite, or None, is passed over, and so is a
        step in which nothing was trained.
        """
        if norm == 0:
            return
        limits = self.loss_limit(), self.norm_limit()
        for kept, value, limit in zip((self.losses, self.norms), (loss, norm), limits, strict=True):
            if value is not None and math.isfinite(value):
                kept.append(min(value, limit))

    def loss_limit(self, least: int | None = None) -> float:
        """Returns the largest loss that is no spike; `least` is the number of steps before the rule
        of `sigma` holds (None: half the window).
        """
        sound = largest_sound(self.losses)
        if len(self.losses) < (self.window // 2 if least is None else least):
            return sound
        mean = statistics.fmean(self.losses)
        spread = max(statistics.pstdev(self.losses, mean), self.LEAST_LOSS)
        return min(sound, mean + self.sigma * spread)

    def norm_limit(self) -> float:
        """Returns the largest gradient norm that is no spike."""
        if len(self.norms) < self.window // 2:
            return math.inf
        mean = statistics.fmean(self.norms)
        spread = max(statistics.pstdev(self.norms, mean), self.LEAST_NORM * mean)
        return mean + self.sigma * spread
