"""Where the time of a run went: a ledger that sums to the time from its first to its last sign of
life.

Times come from events.jsonl and from `perf/unix_time` of the rows, the clock of the host that wrote
them; a clock that was set back makes a part zero, never negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megallm.run.console import MetricRow

TRAINING, DATA, SAVING, AGAIN, DOWN, OTHER = (
    "training",
    "waiting for data",
    "saving checkpoints",
    "steps that were lost and done again",
    "not running",
    "start, evaluation and other",
)
PARTS = (TRAINING, DATA, SAVING, AGAIN, DOWN, OTHER)
_STARTS = ("started", "resumed")


@dataclass(frozen=True)
class Attempt:
    """One process of the run, from its start to its last sign of life (seconds since 1970)."""

    began: float
    ended: float
    first_step: int
    last_step: int
    lost_steps: int  # of the attempt before, which this one does again
    lost_seconds: float


def attempts(events: Sequence[MetricRow], rows: Sequence[MetricRow]) -> list[Attempt]:
    """Returns the attempts of a run in their order, from the events and rows of its folder."""
    starts = [event for event in events if event["event"] in _STARTS]
    found: list[Attempt] = []
    for number, start in enumerate(starts):
        begin, step = float(start["time"]), int(start.get("step") or 0)
        end = float(starts[number + 1]["time"]) if number + 1 < len(starts) else float("inf")
        last_step = int(starts[number + 1].get("step") or 0) if number + 1 < len(starts) else 2**62
        ours = [row for row in rows if step < row["step"] <= last_step]
        signs = [float(event["time"]) for event in events if begin <= event["time"] < end]
        signs += [float(row["perf/unix_time"]) for row in ours if row.get("perf/unix_time")]
        if number + 1 < len(starts):
            signs.append(float(starts[number + 1].get("lost_until") or begin))
        ended = min(max([begin, *signs]), end)
        lost = _lost(start, rows, step)
        reached = ours[-1]["step"] if ours else step
        found.append(Attempt(begin, ended, step, reached, int(start.get("lost_steps") or 0), lost))
    return found


def _lost(start: MetricRow, rows: Sequence[MetricRow], step: int) -> float:
    """Seconds between the step that a start goes on from and the last one before it."""
    until = start.get("lost_until")
    at = next((row.get("perf/unix_time") for row in rows if row["step"] == step), None)
    return max(0.0, float(until) - float(at)) if until and at else 0.0


@dataclass(frozen=True)
class Goodput:
    """Seconds by part; they sum to `wall`."""

    seconds: dict[str, float]
    wall: float

    @property
    def fraction(self) -> float:
        """Share of the time in which steps were trained that count."""
        return self.seconds[TRAINING] / self.wall if self.wall else 0.0


def goodput(events: Sequence[MetricRow], rows: Sequence[MetricRow]) -> Goodput:
    """Returns the ledger of a run; all zero for one that never started."""
    tried = attempts(events, rows)
    wall = tried[-1].ended - tried[0].began if tried else 0.0
    waited = sum(float(row.get("perf/data_wait_seconds") or 0.0) for row in rows)
    spent = sum(float(row.get("perf/step_seconds") or 0.0) for row in rows)
    stalls = sum(float(e.get("ckpt/stall_seconds") or 0.0) for e in events if e["event"] == "saved")
    wanted = {
        TRAINING: max(0.0, spent - waited),
        DATA: waited,
        SAVING: stalls,
        AGAIN: sum(attempt.lost_seconds for attempt in tried),
        DOWN: sum(max(0.0, after.began - before.ended) for before, after in pairwise(tried)),
    }
    seconds, left = {}, max(0.0, wall)
    for part, value in wanted.items():
        seconds[part] = min(value, left)
        left -= seconds[part]
    return Goodput(seconds | {OTHER: left}, max(0.0, wall))
