"""The simulator: it reproduces every closed form exactly, respects every dependency, and explains deadlocks."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megallm.base.errors import InternalError
from megallm.parallel.schedule import Action, place, plan_schedule
from megallm.parallel.simulate import Cost, Deadlock, TimedAction, Timeline, simulate
from tests.parallel.plans import Case, cases, swapped

# Whole numbers: sums and comparisons of them are exact in floating point, so the tests below use ==.
COSTS = st.builds(Cost, *[st.integers(1, 9)] * 3)
TRIED = settings(max_examples=100, deadline=None, database=None)


def timeline_of(case: Case, cost: Cost | None = None) -> Timeline:
    return simulate(case.plans, case.placement, cost)


def bubble(case: Case, cost: Cost) -> float:
    """Time beyond the work, which is the same on every rank."""
    work = case.micros * case.chunks * (cost.forward + cost.backward + cost.weight)
    timeline = timeline_of(case, cost)
    assert timeline.work == work
    return timeline.makespan - work


@TRIED
@given(cases(kinds=("gpipe", "1f1b")), COSTS)
def test_bubble_of_gpipe_and_1f1b(case, cost):
    """(p - 1) / m of the ideal, whatever the costs."""
    whole = cost.forward + cost.backward + cost.weight
    assert bubble(case, cost) == (case.pp - 1) * whole
    assert timeline_of(case, cost).bubble_fraction == (case.pp - 1) * whole / (case.micros * whole)


@TRIED
@given(cases(kinds=("interleaved",), whole_groups=True), COSTS)
def test_bubble_of_interleaved(case, cost):
    """(p - 1) / (v m) of the ideal when pp divides the microbatches, whatever the costs and the group."""
    whole = cost.forward + cost.backward + cost.weight
    assert bubble(case, cost) == (case.pp - 1) * whole
    assert timeline_of(case, cost).bubble_fraction == (case.pp - 1) * whole / (case.chunks * case.micros * whole)


@TRIED
@given(cases(kinds=("zb-h1",)), COSTS)
def test_bubble_of_zb_h1(case, cost):
    """(p - 1)(F + B - W), exactly, as long as a W fits beside an F and a B, from p microbatches on."""
    assume(case.micros >= case.pp and cost.weight <= min(cost.forward, cost.backward))
    assert bubble(case, cost) == (case.pp - 1) * (cost.forward + cost.backward - cost.weight)


@TRIED
@given(cases(kinds=("zb-v",)))
def test_zb_v_never_waits(case):
    """F = B = W, from 2 pp - 1 microbatches on: a rank starts when the first message can reach it, and never waits."""
    timeline = timeline_of(case)
    assert timeline.makespan >= 6 * case.micros + case.pp - 1
    if case.micros >= 2 * case.pp - 1:
        assert timeline.makespan == 6 * case.micros + case.pp - 1
        for rank, slots in enumerate(timeline.ranks):
            assert slots[0].start == rank
            assert all(one.end == other.start for one, other in zip(slots, slots[1:], strict=False))


@TRIED
@given(st.integers(1, 8), st.integers(1, 24))
def test_zero_bubble_is_never_slower_nor_larger_than_1f1b(pp, micros):
    plain = timeline_of(Case("1f1b", pp, 1, micros))
    h1 = timeline_of(Case("zb-h1", pp, 1, micros))
    vee = timeline_of(Case("zb-v", pp, 2, micros), Cost(0.5, 0.5, 0.5))
    assert h1.makespan <= plain.makespan and vee.makespan <= plain.makespan
    assert max(h1.peak_live) <= max(plain.peak_live) and max(vee.peak_live) <= 2 * max(plain.peak_live)


@TRIED
@given(cases())
def test_peak_activations(case):
    pp, chunks, micros = case.pp, case.chunks, case.micros
    peak = timeline_of(case).peak_live
    if case.kind == "gpipe":
        assert peak == [micros] * pp
    elif case.kind == "1f1b" or (case.kind == "interleaved" and chunks == 1):
        assert peak == [min(pp - rank, micros) for rank in range(pp)]
    elif case.kind == "interleaved":
        group = case.group or pp
        first = micros if micros < 2 * group else group + micros % group  # what does not divide joins the first group
        ahead = [2 * (pp - 1 - rank) + (chunks - 1) * first + 1 for rank in range(pp)]
        assert peak == [min(count, chunks * micros) for count in ahead]
    elif case.kind == "zb-h1":
        assert max(peak) <= min(pp, micros)
        assert micros < pp or peak == [pp] * pp
    elif case.kind == "zb-v":
        assert max(peak) <= min(2 * pp, 2 * micros)
    else:
        assert peak == [0] * pp


@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 3))
def test_peak_of_interleaved_in_microbatches(pp, chunks, turns):
    """p (1 + (p - 1) / (p v)) microbatches of a rank's whole depth, on the first rank."""
    peak = timeline_of(Case("interleaved", pp, chunks, turns * pp)).peak_live[0]
    assert peak / chunks == pytest.approx(pp * (1 + (pp - 1) / (pp * chunks)) if chunks > 1 else pp, rel=1e-12)


@TRIED
@given(cases(), COSTS, st.integers(0, 5))
def test_nothing_starts_before_what_it_needs(case, cost, message):
    """Checked on the times alone, not with the simulator's own idea of what an action needs."""
    cost = Cost(cost.forward, cost.backward, cost.weight, message)
    timeline, placement = timeline_of(case, cost), case.placement
    slots = {slot.action: slot for row in timeline.ranks for slot in row}
    for row in timeline.ranks:
        assert all(one.end <= other.start for one, other in zip(row, row[1:], strict=False))
    for action, slot in slots.items():
        op, micro, stage = action.op, action.micro, action.stage
        neighbour = stage + {"F": -1, "B": 1, "W": 0}[op]
        if op != "W" and 0 <= neighbour < placement.num_stages:
            away = placement.rank_of(neighbour) != placement.rank_of(stage)
            assert slots[Action(op, micro, neighbour)].end + message * away <= slot.start
        if op == "B":
            assert slots[Action("F", micro, stage)].end <= slot.start
        if op == "W":
            assert slots[Action("B", micro, stage)].end <= slot.start


@TRIED
@given(cases(kinds=("gpipe",)), COSTS, st.integers(0, 5))
def test_a_message_takes_its_time(case, cost, message):
    slow = Cost(cost.forward, cost.backward, cost.weight, message)
    assert timeline_of(case, slow).makespan == timeline_of(case, cost).makespan + 2 * (case.pp - 1) * message


def test_a_worse_plan_is_slower():
    """Negative control: 1F1B without its warm-up runs, and does not meet the closed form."""
    case = Case("1f1b", 4, 1, 8)
    eager = [sorted(plan, key=lambda action: (action.micro, action.op == "B")) for plan in case.plans]
    timeline = simulate(eager, case.placement)
    assert timeline.bubble_fraction > 2 * timeline_of(case).bubble_fraction
    assert timeline.peak_live == [1] * 4


def test_a_swapped_plan_deadlocks_with_the_actions_that_wait():
    case = Case("1f1b", 3, 1, 2)
    plans = case.plans
    plans = swapped(plans, 1, plans[1].index(Action("F", 1, 1)), plans[1].index(Action("B", 0, 1)))
    simulate(plans, case.placement)  # swapping these two costs time only
    stuck = swapped(plans, 2, plans[2].index(Action("F", 0, 2)), plans[2].index(Action("B", 0, 2)))
    with pytest.raises(Deadlock) as caught:
        simulate(stuck, case.placement)
    assert str(caught.value) == (
        "The schedule deadlocks: rank 0 waits to run B0@0 for B0@1; rank 1 waits to run B0@1 for B0@2; "
        "rank 2 waits to run B0@2 for F0@2."
    )
    assert isinstance(caught.value, InternalError)


def test_groups_smaller_than_the_pipeline_deadlock():
    placement = place("interleaved", 6, 3)
    with pytest.raises(Deadlock, match="rank 0 waits to run F5@6 for F5@5; .* rank 5 waits"):
        simulate(plan_schedule("interleaved", placement, 12, group=4), placement)


def test_one_rank_only_ever_works():
    for kind, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2), ("forward", 2)):
        timeline = timeline_of(Case(kind, 1, chunks, 5))
        assert timeline.bubble_fraction == timeline.idle_fraction == 0


def test_figures_of_a_measured_timeline():
    """Slots that a clock made: rank 0 works 3 of 4 s, rank 1 works 2 of 4."""
    ranks = [
        [TimedAction(Action("F", 0, 0), 0.0, 1.0), TimedAction(Action("B", 0, 0), 2.0, 4.0)],
        [TimedAction(Action("F", 0, 1), 1.0, 1.5), TimedAction(Action("B", 0, 1), 1.5, 3.0)],
    ]
    timeline = Timeline(ranks, [1, 1])
    assert timeline.makespan == 4.0 and timeline.work == 3.0
    assert timeline.bubble_fraction == pytest.approx(1 / 3)
    assert timeline.idle_fraction == pytest.approx(3 / 8)
