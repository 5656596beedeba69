"""Pipeline schedules as data: the list of actions of each rank. Pure.

A generator returns what one rank does, in order; `parallel.pipeline` walks the list, and anything that
wants to time, draw or check a schedule reads the same list.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True, order=True)
class Action:
    """`op` on microbatch `micro` at the global pipeline stage `stage`."""

    op: str
    micro: int
    stage: int

    def __str__(self) -> str:
        return f"{self.op}{self.micro}@{self.stage}"


Plan = list[Action]


def one_f_one_b(rank: int, pp: int, micros: int) -> Plan:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): at most `pp - rank` microbatches are live on a rank."""
    warmup = min(pp - rank - 1, micros)
    plan = [Action(FORWARD, micro, rank) for micro in range(warmup)]
    for micro in range(micros - warmup):
        plan += [Action(FORWARD, warmup + micro, rank), Action(BACKWARD, micro, rank)]
    return plan + [Action(BACKWARD, micro, rank) for micro in range(micros - warmup, micros)]


def forward_only(rank: int, pp: int, micros: int) -> Plan:
    """Every microbatch forward once: evaluation and log-probabilities."""
    return [Action(FORWARD, micro, rank) for micro in range(micros)]


SCHEDULES = {"1f1b": one_f_one_b}
