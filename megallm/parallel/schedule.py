"""Pipeline schedules as data: for each rank the list of its actions, in order. Pure.

A generator is a page: it says what one rank does. `parallel.pipeline` walks the lists,
`parallel.simulate` times them, finds deadlocks and counts live activations, and `parallel.picture`
draws them; none of the three knows a schedule by name.

A plan either has whole backward passes (`B` alone) or splits each into `B`, the gradient of the
input, and `W`, the gradient of the weights, which nobody waits for (zero bubble, arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megallm.base.errors import UsageError

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"


@dataclass(frozen=True, order=True)
class Action:
    """`op` on microbatch `micro` at the global pipeline stage `stage`."""

    op: str
    micro: int
    stage: int

    def __str__(self) -> str:
        return f"{self.op}{self.micro}@{self.stage}"


Plan = list[Action]


@dataclass(frozen=True)
class Placement:
    """Which rank holds which of the `pp * chunks` stages: in a loop, or (two chunks) down and up
    again in a V.
    """

    pp: int
    chunks: int = 1
    vee: bool = False

    @property
    def num_stages(self) -> int:
        return self.pp * self.chunks

    def rank_of(self, stage: int) -> int:
        """Returns the pipeline rank that holds a stage."""
        chunk, place = divmod(stage, self.pp)
        return self.pp - 1 - place if self.vee and chunk % 2 else place

    def stage_of(self, rank: int, chunk: int) -> int:
        """Returns the stage that is chunk number `chunk` of a rank."""
        place = self.pp - 1 - rank if self.vee and chunk % 2 else rank
        return chunk * self.pp + place

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, earliest first."""
        return tuple(self.stage_of(rank, chunk) for chunk in range(self.chunks))


Edge = tuple[int, int, str]  # source and destination, as pipeline ranks, and the kind of message


def pipeline_edges(placement: Placement) -> list[Edge]:
    """Returns who sends what to whom in any plan, in the order in which channels are opened: pairs
    that share no rank stand together, so a line of any length takes a few rounds.
    """
    holders = [placement.rank_of(stage) for stage in range(placement.num_stages)]
    edges = [edge for a, b in pairwise(holders) for edge in ((a, b, FORWARD), (b, a, BACKWARD))]

    def turn(edge: Edge) -> tuple:
        low, high = sorted(edge[:2])
        return (low % 2 if high - low == 1 else 2, edge[2], edge[0] < edge[1], low)

    return sorted({edge for edge in edges if edge[0] != edge[1]}, key=turn)


@dataclass(frozen=True)
class Shape:
    """What a generator needs: the placement, the number of microbatches, and how many of them a
    rank takes through one chunk before it turns to the next (`group`, for interleaved
    schedules)."""

    placement: Placement
    micros: int
    group: int


def gpipe(rank: int, shape: Shape) -> Plan:
    """Plans all forwards, then all backwards (arXiv 1811.06965); every microbatch is live at once.
    """
    stages = shape.placement.stages_of(rank)
    forward = [Action(FORWARD, micro, stage) for stage in stages for micro in range(shape.micros)]
    return forward + [
        Action(BACKWARD, micro, stage)
        for stage in reversed(stages)
        for micro in range(shape.micros)
    ]


def one_f_one_b(rank: int, shape: Shape) -> Plan:
    """Plans 1F1B (PipeDream-Flush, arXiv 2006.09503): at most `pp - rank` microbatches are live."""
    forward = [Action(FORWARD, micro, rank) for micro in range(shape.micros)]
    backward = [Action(BACKWARD, micro, rank) for micro in range(shape.micros)]
    return _one_forward_one_backward(forward, backward, warmup=shape.placement.pp - 1 - rank)


def interleaved(rank: int, shape: Shape) -> Plan:
    """Plans interleaved 1F1B (arXiv 2104.04473): chunks take turns, a group of microbatches each.

    With one chunk it is `one_f_one_b`.
    """
    pp, chunks = shape.placement.pp, shape.placement.chunks
    if chunks == 1:
        return one_f_one_b(rank, shape)
    warmup = 2 * (pp - 1 - rank) + (chunks - 1) * len(_groups(shape)[0])
    forward, backward = (_turns(rank, shape, op) for op in (FORWARD, BACKWARD))
    return _one_forward_one_backward(forward, backward, warmup)


def _one_forward_one_backward(forward: Plan, backward: Plan, warmup: int) -> Plan:
    """Returns the actions in the three phases of 1F1B; each pass is given in its own order."""
    warmup = min(warmup, len(forward))
    steady = len(forward) - warmup
    plan = forward[:warmup]  # warm-up: fill the stages below before the first gradient comes
    for ahead, behind in zip(forward[warmup:], backward[:steady], strict=True):
        plan += [ahead, behind]  # steady state: one forward, one backward
    return plan + backward[steady:]  # cool-down: gradients of what is still live


def zb_h1(rank: int, shape: Shape) -> Plan:
    """Plans ZB-H1 (arXiv 2401.10241): 1F1B whose weight gradients fill the bubble, with 1F1B's peak
    memory.

    Rank r runs r microbatches behind with `W`: it keeps as many activations as rank 0 of 1F1B,
    `pp`.
    """
    pp, micros = shape.placement.pp, shape.micros
    warmup = min(pp - 1 - rank, micros)
    plan = [Action(FORWARD, micro, rank) for micro in range(warmup)]
    weights = 0
    for micro in range(micros):
        if warmup + micro < micros:
            plan.append(Action(FORWARD, warmup + micro, rank))
        plan.append(Action(BACKWARD, micro, rank))
        if micro >= rank:
            plan.append(Action(WEIGHT, weights, rank))
            weights += 1
    return plan + [Action(WEIGHT, micro, rank) for micro in range(weights, micros)]


def zb_v(rank: int, shape: Shape) -> Plan:
    """Plans ZB-V (arXiv 2401.10241, section 6): two chunks placed in a V, no bubble when F = B = W,
    1F1B's peak memory.

    Three warm-up phases fill the V, a steady phase alternates the two chunks, and the weight
    gradients that the last phase put off end the step. Written for at least 2 pp - 1 microbatches;
    with fewer, the actions of the missing ones fall out.
    """
    pp, down, up = shape.placement.pp, *shape.placement.stages_of(rank)
    counted = max(shape.micros, 2 * pp - 1)
    done: dict[tuple[str, int], int] = {(op, stage): 0 for op in "FBW" for stage in (down, up)}
    plan: Plan = []

    def do(op: str, stage: int) -> None:
        micro = done[op, stage]
        done[op, stage] += 1
        if micro < shape.micros:
            plan.append(Action(op, micro, stage))

    def backward(stage: int) -> None:
        do(BACKWARD, stage)
        do(WEIGHT, stage)

    for _ in range(2 * (pp - rank) - 1):
        do(FORWARD, down)
    for _ in range(rank):
        do(FORWARD, up)
        do(FORWARD, down)
    for _ in range(pp - rank):
        do(FORWARD, up)
        backward(up)
    while done[FORWARD, up] < counted:
        if done[FORWARD, down] < counted:
            do(FORWARD, down)
        backward(down)
        do(FORWARD, up)
        backward(up)
    for _ in range(rank):
        do(BACKWARD, down)
        do(BACKWARD, up)
    while done[BACKWARD, down] < counted:
        backward(down)
    for stage in (up, down):
        while done[WEIGHT, stage] < counted:
            do(WEIGHT, stage)
    return plan


def forward_only(rank: int, shape: Shape) -> Plan:
    """Plans one forward pass of every microbatch once through every chunk: evaluation and
    log-probabilities.
    """
    return _turns(rank, shape, FORWARD)


def _groups(shape: Shape) -> list[range]:
    """The microbatches in groups of `group`; what is left over joins the first one.

    A group of its own, smaller than pp, would deadlock an interleaved schedule, and so would a
    larger group behind the first, whose size sets the length of the warm-up.
    """
    first = shape.micros % shape.group + shape.group
    bounds = [0, *range(first, shape.micros, shape.group), shape.micros]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _turns(rank: int, shape: Shape, op: str) -> Plan:
    """One pass over all (micro, stage) of a rank: group after group, within a group chunk after
    chunk.
    """
    stages = shape.placement.stages_of(rank)
    return [
        Action(op, micro, stage)
        for group in _groups(shape)
        for stage in (stages if op == FORWARD else reversed(stages))
        for micro in group
    ]


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule's generator, and the numbers of chunks that it is defined for (None: any)."""

    generate: Callable[[int, Shape], Plan]
    chunks: int | None = 1
    vee: bool = False


SCHEDULES = {
    "gpipe": ScheduleKind(gpipe),
    "1f1b": ScheduleKind(one_f_one_b),
    "interleaved": ScheduleKind(interleaved, None),
    "zb-h1": ScheduleKind(zb_h1),
    "zb-v": ScheduleKind(zb_v, 2, vee=True),
    "forward": ScheduleKind(forward_only, None),
}


def place(kind: str, pp: int, chunks: int = 1) -> Placement:
    """Returns the placement of a schedule; UsageError when it is not defined for that number of
    chunks.
    """
    if kind not in SCHEDULES:
        raise UsageError(f"There is no schedule '{kind}'; known are {', '.join(SCHEDULES)}.")
    wanted = SCHEDULES[kind].chunks
    if wanted is not None and chunks != wanted:
        raise UsageError(
            f"Schedule {kind} has {wanted} chunk(s) a rank, not {chunks}: set "
            f"layout.chunks={wanted}."
        )
    return Placement(pp, chunks, SCHEDULES[kind].vee)


def plan_schedule(
    kind: str, placement: Placement, micros: int, group: int | None = None
) -> list[Plan]:
    """Returns the plan of every pipeline rank. `group` (default pp) is the microbatch group of
    interleaved schedules.
    """
    if micros < 1:
        raise UsageError(f"A step needs at least 1 microbatch, not {micros}.")
    shape = Shape(placement, micros, group or placement.pp)
    return [SCHEDULES[kind].generate(rank, shape) for rank in range(placement.pp)]
