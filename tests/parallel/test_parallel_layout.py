"""The rank grid and the Shard record: groups partition the world, pieces a tensor, and each element has one owner."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import UsageError
from megallm.parallel.layout import AXES, EXPERT_AXES, PURPOSES, Layout
from megallm.parallel.shard import Box, Shard, piece

sizes = st.integers(1, 4)


@st.composite
def layouts_of(draw) -> Layout:
    """Any grid, with an expert-parallel size that divides the ranks of a stage."""
    pp, dp, cp, tp = draw(sizes), draw(sizes), draw(st.integers(1, 3)), draw(sizes)
    ep = draw(st.sampled_from([n for n in range(1, dp * cp * tp + 1) if dp * cp * tp % n == 0]))
    return Layout(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)


layouts = layouts_of()


def test_the_example_of_the_architecture_page():
    layout = Layout(pp=2, dp=2, cp=1, tp=2)
    assert layout.coords(5) == {"pp": 1, "dp": 0, "cp": 0, "tp": 1, "edp": 1, "ep": 0}
    assert layout.ranks("tp", of=5) == (4, 5)
    assert layout.ranks("pp", of=5) == (1, 5) and layout.ranks("data", of=5) == (5, 7)
    assert layout.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]


@settings(deadline=None, max_examples=50)
@given(layouts)
def test_ranks_are_one_grid_with_tp_fastest(layout):
    points = product(*(range(layout.size(axis)) for axis in AXES))
    for rank, point in enumerate(points):
        coords = dict(zip(AXES, point, strict=True))
        assert coords.items() <= layout.coords(rank).items() and layout.rank(**coords) == rank
    assert layout.world == rank + 1


@settings(deadline=None, max_examples=50)
@given(layouts)
def test_experts_see_the_same_ranks_with_ep_fastest(layout):
    """ep spans tp, then cp, then dp: the coordinates are those of `arange(world).view(pp, edp, ep)`."""
    for rank, point in enumerate(product(*(range(layout.size(axis)) for axis in EXPERT_AXES))):
        assert dict(zip(EXPERT_AXES, point, strict=True)).items() <= layout.coords(rank).items()
    assert layout.world == rank + 1


def test_ep_spans_tp_then_cp_then_dp():
    layout = Layout(pp=2, dp=2, cp=2, tp=2, ep=4)
    assert layout.ranks("ep", of=9) == (8, 9, 10, 11) and layout.ranks("expert_grads", of=9) == (9, 13)
    assert layout.size("edp") == 2 and Layout(dp=2, tp=2, ep=2).ranks("ep", of=1) == Layout(dp=2, tp=2).ranks("tp", 1)


def test_an_ep_that_does_not_divide_the_ranks_of_a_stage_is_refused():
    with pytest.raises(UsageError, match="layout.ep 4 does not divide dp x cp x tp = 6"):
        Layout(pp=2, dp=3, tp=2, ep=4)


@settings(deadline=None, max_examples=50)
@given(layouts, st.sampled_from(sorted(PURPOSES)))
def test_groups_partition_the_world_and_agree_with_coordinates(layout, purpose):
    groups = layout.groups(purpose)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    free = PURPOSES[purpose]
    for group in groups:
        assert len(group) == prod(layout.size(axis) for axis in free) and list(group) == sorted(group)
        for rank in group:
            assert layout.ranks(purpose, of=rank) == group
        view = AXES if set(free) <= set(AXES) else EXPERT_AXES
        fixed = {tuple(layout.coords(rank)[axis] for axis in view if axis not in free) for rank in group}
        assert len(fixed) == 1, "only the free axes vary inside a group"


@pytest.mark.parametrize("bad", [{"tp": 0}, {"dp": -1}, {"pp": 1.5}, {"ep": "2"}])
def test_sizes_below_one_are_refused(bad):
    with pytest.raises(UsageError, match=f"layout.{next(iter(bad))} is .*; it must be an integer of at least 1"):
        Layout(**bad)


def test_a_rank_outside_is_refused():
    for rank in (-1, 4):
        with pytest.raises(UsageError, match="outside this layout of 4 ranks"):
            Layout(tp=4).coords(rank)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_pieces_are_contiguous_even_and_longer_first(total, size):
    spans = [piece(total, size, rank) for rank in range(size)]
    assert spans[0][0] == 0 and spans[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))
    lengths = [end - begin for begin, end in spans]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1


shards = st.integers(1, 3).flatmap(
    lambda dims: st.builds(
        Shard,
        full=st.tuples(*[st.integers(4, 9)] * dims),
        split=st.dictionaries(st.integers(0, dims - 1), st.sampled_from(("tp", "dp", "cp")), max_size=2).filter(
            lambda split: len(set(split.values())) == len(split)
        )
        | st.just({0: "ep"}),
    )
)


@settings(deadline=None, max_examples=50)
@given(layouts, shards)
def test_owned_boxes_cover_every_logical_element_once(layout, shard):
    """Over the ranks of one pipeline stage; so saving writes, and the clip norm counts, each element once."""
    seen: Counter = Counter()
    for rank in range(layout.world):
        coords = layout.coords(rank)
        if coords["pp"] == 0 and shard.owned(coords):
            box = shard.box(layout, coords)
            seen.update(product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))
    assert set(seen) == set(product(*map(range, shard.full))) and set(seen.values()) == {1}


@settings(deadline=None, max_examples=50)
@given(layouts, shards)
def test_later_holders_of_a_tied_parameter_own_nothing(layout, shard):
    assert not any(shard.owned(layout.coords(rank), first_stage=False) for rank in range(layout.world))


boxes = st.integers(1, 3).flatmap(
    lambda dims: st.tuples(
        *[st.builds(Box, st.tuples(*[st.integers(0, 5)] * dims), st.tuples(*[st.integers(1, 5)] * dims))] * 2
    )
)


def points(box: Box) -> set:
    return set(product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))


@settings(deadline=None, max_examples=50)
@given(boxes)
def test_intersections_are_those_of_the_sets_of_points(pair):
    first, second = pair
    common = first.intersect(second)
    assert (points(common) if common else set()) == points(first) & points(second)
    assert common == second.intersect(first)
    if common:
        inside = common.slices(first)
        assert tuple(s.stop - s.start for s in inside) == common.shape
        assert all(s.start >= 0 and s.stop <= n for s, n in zip(inside, first.shape, strict=True))
        assert common.size == len(points(common))
