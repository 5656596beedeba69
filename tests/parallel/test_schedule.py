"""Schedules: every action once and in order, messages needed in the order they are made, nothing ever stuck."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import UsageError
from megallm.parallel.schedule import SCHEDULES, Action, Placement, Plan, place, plan_schedule
from megallm.parallel.simulate import simulate
from tests.parallel.plans import Case, cases, crossed_wires, swapped, traffic, wrong_actions

OPS = {"forward": "F", "zb-h1": "FBW", "zb-v": "FBW"}


def words(plan: Plan) -> str:
    return " ".join(map(str, plan))


@settings(max_examples=250, deadline=None, database=None)
@given(cases())
def test_every_plan_is_whole_in_order_and_runs(case: Case):
    assert wrong_actions(case.plans, case.placement, OPS.get(case.kind, "FB"), case.micros) == []
    assert crossed_wires(case.plans, case.placement) == []
    simulate(case.plans, case.placement)  # raises Deadlock


def test_the_corners_of_the_grid():
    """What hypothesis may miss: one rank, one microbatch, and the largest of everything, of each kind."""
    for kind in SCHEDULES:
        for chunks in range(1, 5):
            if SCHEDULES[kind].chunks in (None, chunks):
                for pp in (1, 2, 8):
                    for micros in (1, pp, pp + 1, 24):
                        test_every_plan_is_whole_in_order_and_runs.hypothesis.inner_test(Case(kind, pp, chunks, micros))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_damaged_plan_is_noticed(kind):
    """Negative control of the checks above: an action left out, doubled, on a wrong rank, and two forwards swapped."""
    case = Case(kind, 3, SCHEDULES[kind].chunks or 2, 6)
    placement, plans, ops = case.placement, case.plans, OPS.get(kind, "FB")
    last = plans[1][-1]

    def problems(changed: Plan) -> list[str]:
        return wrong_actions([plans[0], changed, plans[2]], placement, ops, case.micros)

    assert problems(plans[1][:-1]) == [f"{last} is missing"]
    assert problems([*plans[1], last]) == [f"{last} stands 2 times"]
    assert f"{plans[0][0]} is on rank 1" in problems([plans[0][0], *plans[1]])
    if ops != "F":
        assert any("comes before its" in problem for problem in problems(plans[1][::-1]))
    assert crossed_wires(swapped(plans, 0, 0, 1), placement) == [(0, 1, "F")]


def test_two_ranks_are_next_and_previous_to_each_other():
    """pp = 2 with chunks: one peer is both neighbours, and only the kind and the order tell its messages apart."""
    case = Case("interleaved", 2, 3, 4)
    channels = traffic(case.plans, case.placement)
    assert set(channels) == {(0, 1, "F"), (1, 0, "F"), (0, 1, "B"), (1, 0, "B")}
    made, needed = channels[0, 1, "F"]
    assert made == needed == [(micro, stage) for group in ((0, 1), (2, 3)) for stage in (1, 3, 5) for micro in group]


def test_plans_written_out():
    assert words(plan_schedule("gpipe", place("gpipe", 2), 2)[0]) == "F0@0 F1@0 B0@0 B1@0"
    one_f_one_b = plan_schedule("1f1b", place("1f1b", 2), 3)
    assert [words(plan) for plan in one_f_one_b] == [
        "F0@0 F1@0 B0@0 F2@0 B1@0 B2@0",
        "F0@1 B0@1 F1@1 B1@1 F2@1 B2@1",
    ]
    chunked = plan_schedule("interleaved", place("interleaved", 2, 2), 2)
    assert [words(plan) for plan in chunked] == [
        "F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0",
        "F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1",
    ]
    zero = plan_schedule("zb-h1", place("zb-h1", 2), 3)
    assert [words(plan) for plan in zero] == [
        "F0@0 F1@0 B0@0 W0@0 F2@0 B1@0 W1@0 B2@0 W2@0",
        "F0@1 B0@1 F1@1 B1@1 W0@1 F2@1 B2@1 W1@1 W2@1",
    ]
    assert words(plan_schedule("zb-v", place("zb-v", 1, 2), 1)[0]) == "F0@0 F0@1 B0@1 W0@1 B0@0 W0@0"
    assert words(plan_schedule("forward", place("forward", 2, 2), 2)[1]) == "F0@1 F1@1 F0@3 F1@3"


@given(st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_every_stage_has_one_place(pp, chunks, vee):
    placement = Placement(pp, chunks, vee)
    held = [placement.stages_of(rank) for rank in range(pp)]
    assert sorted(stage for stages in held for stage in stages) == list(range(placement.num_stages))
    for rank, stages in enumerate(held):
        assert list(stages) == sorted(stages) and len(stages) == chunks
        assert all(placement.rank_of(stage) == rank for stage in stages)
        assert all(placement.stage_of(rank, chunk) == stage for chunk, stage in enumerate(stages))


def test_a_v_turns_round_on_the_last_rank():
    assert [Placement(3, 2, vee=True).rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [Placement(3, 2).rank_of(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: place("2f2b", 2), "no schedule '2f2b'; known are gpipe, 1f1b"),
        (lambda: place("1f1b", 2, 2), "1 chunk"),
        (lambda: place("zb-v", 2, 1), "2 chunk"),
        (lambda: plan_schedule("1f1b", place("1f1b", 2), 0), "at least 1 microbatch"),
    ],
)
def test_what_is_not_defined_is_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_an_action_reads_well():
    assert str(Action("W", 12, 3)) == "W12@3"
