"""Detection of a diverged run (NaN gradients, loss spikes), and which of its states are still
sound. No torch.

A checkpoint holds the state *after* its step, whose worth only the next step shows: its loss is
measured with that state. So what was saved last before a run diverges is already spoilt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
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
        lowest = min(self._losses, default=math.inf)
        return lowest + max(1.0, 0.5 * abs(lowest))
