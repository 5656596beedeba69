"""How often to save when the run is to find out: the interval of Young and Daly.

With a stall of D seconds for each save and a failure every M seconds, the time that is lost is
least when a state is saved every sqrt(2 D M) seconds (Young, Commun. ACM 17(9), 1974; Daly, Future
Gener. Comput. Syst. 22, 2006). D is measured at each save, M is taken from the run's own events.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# A rank fails about once in so many hours: Llama 3's 16,384 GPUs had a failure every 3.09 hours
# (arXiv 2407.21783, section 3.3.4). It counts until the run has failures of its own.
DEFAULT_RANK_HOURS = 16_384 * 3.09
PROBE_STEPS = 5  # the first save, which measures the stall
MAX_SECONDS = 3600.0
MAX_COST = 0.05  # of the time: an interval is at least stall / MAX_COST
_STARTS = ("started", "resumed")
_ORDERLY = ("preempted", "interrupted")


@dataclass(frozen=True)
class FailureRate:
    """Seconds that a run has lived and the failures it met meanwhile."""

    seconds: float
    failures: int

    def mtbf(self, world: int) -> float:
        """Number of seconds between failures: the run's own, else of `world` ranks by default."""
        if self.failures:
            return self.seconds / self.failures
        return max(self.seconds, DEFAULT_RANK_HOURS * 3600 / world)


def failure_rate(events: Iterable[Mapping[str, Any]], now: float) -> FailureRate:
    """Returns what events.jsonl tells up to `now` (seconds since 1970).

    A start that lost steps, or that follows an error, was preceded by a failure; a run that was
    stopped in an orderly way, or went on from its end, was not.
    """
    lived, failures = 0.0, 0
    began: float | None = None
    last, ended = 0.0, ""
    for event in events:
        kind, time = event.get("event"), float(event.get("time", 0.0))
        if kind in _STARTS:
            if began is not None:
                lived += max(0.0, max(last, float(event.get("lost_until") or 0.0)) - began)
                lost = int(event.get("lost_steps") or 0) > 0
                failures += (lost or ended == "stopped") and ended not in _ORDERLY
            began, ended = time, ""
        elif kind == "stopped" or kind in _ORDERLY:
            ended = ended or str(kind)  # an orderly end is also told as the error that ends it
        last = time
    return FailureRate(lived + max(0.0, now - began if began is not None else 0.0), failures)


@dataclass(frozen=True)
class Interval:
    """When to save next, and why."""

    steps: int
    seconds: float
    stall_seconds: float
    mtbf_seconds: float
    failures: int

    def __str__(self) -> str:
        rate = f"{self.failures} seen" if self.failures else "none seen, a default"
        return (
            f"saving every {self.steps} steps ({self.seconds:.1f} s): a save stalls for "
            f"{self.stall_seconds:.3f} s, a failure comes every {self.mtbf_seconds / 3600:.2g} h "
            f"({rate})"
        )


def plan_interval(
    stall_seconds: float, step_seconds: float, rate: FailureRate, world: int
) -> Interval:
    """Returns sqrt(2 x stall x MTBF) in whole steps, at least one, within `MAX_COST` and
    `MAX_SECONDS`.
    """
    mtbf = rate.mtbf(world)
    wanted = math.sqrt(2 * stall_seconds * mtbf)
    wanted = max(stall_seconds / MAX_COST, min(MAX_SECONDS, wanted))
    steps = max(1, round(wanted / max(step_seconds, 1e-6)))
    return Interval(steps, steps * step_seconds, stall_seconds, mtbf, rate.failures)
