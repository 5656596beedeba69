"""Where each group of sequences is, tick by tick, when pipeline ranks decode. Pure.

A tick is one pass of one group through one pipeline stage. There are as many groups as pipeline
ranks, and they follow one another at a distance at which no rank is ever asked for two of them, so
in the steady state every rank is busy in every tick, wherever the placement puts the stages.

The operations of a tick have one order for the whole replica, and a rank does its part of them in
that order. Hence nothing can deadlock, not even where a send waits for its receive: of all
operations that are not done, the first one has every participant ready.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megallm.parallel.schedule import Placement

BEGIN, RUN, SEND, TELL = "begin", "run", "send", "tell"


class Operation(NamedTuple):
    """What happens to a group: `begin` a step (which sequences, which blocks: plain data, on all
    ranks), `run` a stage, `send` the result from one rank to another, `tell` all ranks the tokens.
    """

    kind: str
    group: int
    stage: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Rotation:
    """Groups of sequences that go round the stages of a placement."""

    placement: Placement

    @property
    def num_groups(self) -> int:
        return self.placement.pp

    @property
    def distance(self) -> int:
        """Ticks by which a group follows the one before.

        In a loop neighbours are one stage apart. In a V a rank is met on the way down and on the
        way up, after an odd number of ticks: an even distance keeps the two apart.
        """
        return 2 if self.placement.vee else 1

    def stage(self, group: int, tick: int) -> int | None:
        """Returns the stage that a group passes in a tick; None before it has started."""
        passed = tick - group * self.distance
        return passed % self.placement.num_stages if passed >= 0 else None

    def operations(self, tick: int) -> Iterator[Operation]:
        """Yields the operations of a tick in their order."""
        rank_of, last = self.placement.rank_of, self.placement.num_stages - 1
        everyone = tuple(range(self.placement.pp))
        at = [(group, self.stage(group, tick)) for group in range(self.num_groups)]
        met = [(group, stage) for group, stage in at if stage is not None]
        for group, stage in met:
            if stage == 0:
                yield Operation(BEGIN, group, 0, everyone)
        for group, stage in met:
            yield Operation(RUN, group, stage, (rank_of(stage),))
        # From the last stage backwards: a rank sends before it receives, but for one of a ring.
        for group, stage in sorted(met, key=lambda pair: -pair[1]):
            if stage < last and rank_of(stage) != rank_of(stage + 1):
                yield Operation(SEND, group, stage, (rank_of(stage), rank_of(stage + 1)))
        for group, stage in met:
            if stage == last:
                yield Operation(TELL, group, stage, everyone)
