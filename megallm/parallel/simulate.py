"""Run a pipeline plan on paper: times, idle shares, live activations, deadlocks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.base.errors import InternalError
from megallm.parallel.schedule import BACKWARD, FORWARD, WEIGHT, Action, Placement, Plan


@dataclass(frozen=True)
class Cost:
    """Time of one action; `message` is what a hand-over to another rank adds. A whole backward
    costs B + W.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    message: float = 0.0

    def of(self, action: Action, split: bool) -> float:
        """Returns the time of an action, in a plan that splits backward passes or not."""
        if action.op == FORWARD:
            return self.forward
        if action.op == WEIGHT:
            return self.weight
        return self.backward if split else self.backward + self.weight


@dataclass(frozen=True)
class TimedAction:
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank does when. Live activations are counted in (microbatch, stage) pairs."""

    ranks: list[list[TimedAction]]
    peak_live: list[int]
    makespan: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "makespan", max(slot.end for slots in self.ranks for slot in slots)
        )

    @property
    def work(self) -> float:
        """The longest busy time of a rank: the ideal makespan."""
        return max(sum(slot.end - slot.start for slot in slots) for slots in self.ranks)

    @property
    def bubble_fraction(self) -> float:
        """Time beyond the ideal, over the ideal: (p - 1) / m for 1F1B."""
        return (self.makespan - self.work) / self.work

    @property
    def idle_fraction(self) -> float:
        """Mean share of the makespan in which a rank waits."""
        busy = sum(slot.end - slot.start for slots in self.ranks for slot in slots)
        return 1.0 - busy / (self.makespan * len(self.ranks))


class Deadlock(InternalError):
    """No rank can go on; the message lists the action that each rank waits to run, and for what."""


def simulate(plans: list[Plan], placement: Placement, cost: Cost | None = None) -> Timeline:
    """Simulate the plans of all ranks; raises Deadlock when they block one another."""
    cost = cost or Cost()
    split = [any(action.op == WEIGHT for action in plan) for plan in plans]
    ended: dict[Action, float] = {}
    slots: list[list[TimedAction]] = [[] for _ in plans]
    clocks, places = [0.0] * len(plans), [0] * len(plans)
    progress = True
    while progress:
        progress = False
        for rank, plan in enumerate(plans):
            while places[rank] < len(plan):
                action = plan[places[rank]]
                before = _needs(action, placement)
                if any(need not in ended for need in before):
                    break
                ready = [
                    ended[n] + (cost.message if placement.rank_of(n.stage) != rank else 0.0)
                    for n in before
                ]
                start = max([clocks[rank], *ready])
                clocks[rank] = ended[action] = start + cost.of(action, split[rank])
                slots[rank].append(TimedAction(action, start, clocks[rank]))
                places[rank] += 1
                progress = True
    _check_finished(plans, places, ended, placement)
    return Timeline(slots, [peak_live(plan) for plan in plans])


def _needs(action: Action, placement: Placement) -> list[Action]:
    """The actions whose results an action reads."""
    op, micro, stage = action.op, action.micro, action.stage
    if op == FORWARD:
        return [Action(FORWARD, micro, stage - 1)] if stage > 0 else []
    if op == WEIGHT:
        return [Action(BACKWARD, micro, stage)]
    own = [Action(FORWARD, micro, stage)]
    last = stage == placement.num_stages - 1
    return own if last else [*own, Action(BACKWARD, micro, stage + 1)]


def _check_finished(
    plans: list[Plan], places: list[int], ended: dict[Action, float], placement: Placement
) -> None:
    waiting = []
    for rank, (plan, place) in enumerate(zip(plans, places, strict=True)):
        if place < len(plan):
            missing = [str(need) for need in _needs(plan[place], placement) if need not in ended]
            waiting.append(f"rank {rank} waits to run {plan[place]} for {' and '.join(missing)}")
    if waiting:
        raise Deadlock(f"The schedule deadlocks: {'; '.join(waiting)}.")


def peak_live(plan: Plan) -> int:
    """Returns the largest number of (micro, stage) pairs between their forward and the action that
    lets go of their activations.

    Nothing is kept for a backward pass that the plan does not have.
    """
    if all(action.op == FORWARD for action in plan):
        return 0
    last = WEIGHT if any(action.op == WEIGHT for action in plan) else BACKWARD
    live = peak = 0
    for action in plan:
        live += (action.op == FORWARD) - (action.op == last)
        peak = max(peak, live)
    return peak
