"""Plans that hypothesis draws, and what has to be true of every plan; used by the tests of schedules."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from hypothesis import strategies as st

from megallm.parallel.schedule import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    WEIGHT,
    Action,
    Placement,
    Plan,
    place,
    plan_schedule,
)

Channel = tuple[int, int, str]  # source rank, destination rank, kind of message


@dataclass(frozen=True)
class Case:
    """One schedule with its sizes."""

    kind: str
    pp: int
    chunks: int
    micros: int
    group: int | None = None

    @property
    def placement(self) -> Placement:
        return place(self.kind, self.pp, self.chunks)

    @property
    def plans(self) -> list[Plan]:
        return plan_schedule(self.kind, self.placement, self.micros, self.group)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(SCHEDULES), whole_groups: bool = False) -> Case:
    """Any schedule over pp 1..8, chunks 1..4, microbatches 1..24; with `whole_groups`, pp divides the microbatches."""
    kind = draw(st.sampled_from(kinds))
    pp = draw(st.integers(1, 8))
    chunks = SCHEDULES[kind].chunks or draw(st.integers(1, 4))
    micros = pp * draw(st.integers(1, 24 // pp)) if whole_groups else draw(st.integers(1, 24))
    group = draw(st.none() | st.integers(pp, 3 * pp)) if SCHEDULES[kind].chunks is None else None
    return Case(kind, pp, chunks, micros, group)


def wrong_actions(plans: list[Plan], placement: Placement, ops: str, micros: int) -> list[str]:
    """Sentences: actions that are missing, doubled, on the wrong rank, or before what their own rank must do first."""
    stages = range(placement.num_stages)
    wanted = {Action(op, micro, stage) for op in ops for micro in range(micros) for stage in stages}
    found = Counter(action for plan in plans for action in plan)
    problems = [f"{action} is missing" for action in wanted - found.keys()]
    problems += [f"{action} is not wanted" for action in found.keys() - wanted]
    problems += [f"{action} stands {count} times" for action, count in found.items() if count > 1]
    for rank, plan in enumerate(plans):
        done: set[Action] = set()
        for action in plan:
            if placement.rank_of(action.stage) != rank:
                problems.append(f"{action} is on rank {rank}")
            before = {BACKWARD: FORWARD, WEIGHT: BACKWARD}.get(action.op)
            if before and Action(before, action.micro, action.stage) not in done:
                problems.append(f"{action} comes before its {before}")
            done.add(action)
    return problems


def traffic(plans: list[Plan], placement: Placement) -> dict[Channel, tuple[list, list]]:
    """Per channel the messages (micro, receiving stage), as its source makes them and as its destination needs them."""
    channels: dict[Channel, tuple[list, list]] = defaultdict(lambda: ([], []))
    for rank, plan in enumerate(plans):
        for action in plan:
            step = {FORWARD: 1, BACKWARD: -1, WEIGHT: 0}[action.op]
            to, source = action.stage + step, action.stage - step
            if step and 0 <= to < placement.num_stages and placement.rank_of(to) != rank:
                channels[rank, placement.rank_of(to), action.op][0].append((action.micro, to))
            if step and 0 <= source < placement.num_stages and placement.rank_of(source) != rank:
                channels[placement.rank_of(source), rank, action.op][1].append((action.micro, action.stage))
    return channels


def crossed_wires(plans: list[Plan], placement: Placement) -> list[Channel]:
    """Wires whose messages are needed in another order than they are made in."""
    return [channel for channel, (made, needed) in traffic(plans, placement).items() if made != needed]


def swapped(plans: list[Plan], rank: int, one: int, other: int) -> list[Plan]:
    """The plans with two actions of a rank exchanged."""
    plan = list(plans[rank])
    plan[one], plan[other] = plan[other], plan[one]
    return [*plans[:rank], plan, *plans[rank + 1 :]]
