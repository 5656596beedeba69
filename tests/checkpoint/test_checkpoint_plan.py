"""Geometry: flat ranges, pieces and reads cover every element exactly once."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import CheckpointError
from megallm.checkpoint.plan import boxes_of_range, cover_problem, plan_reads, split_box
from megallm.parallel.shard import Box

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    begin = draw(st.integers(0, prod(shape)))
    return shape, begin, draw(st.integers(begin, prod(shape)))


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_a_flat_range_is_few_boxes_that_hold_it_in_order(case):
    shape, begin, end = case
    numbers = np.arange(prod(shape)).reshape(shape)
    boxes = boxes_of_range(shape, begin, end)
    assert len(boxes) <= 2 * len(shape) - 1
    flat = [numbers[box.slices()].reshape(-1) for box in boxes]
    assert np.concatenate([*flat, np.empty(0, int)]).tolist() == list(range(begin, end))


def test_the_bound_on_boxes_is_reached():
    assert len(boxes_of_range((4, 4, 4), 1, 63)) == 5
    assert boxes_of_range((), 0, 1) == [Box((), ())]
    assert boxes_of_range((0, 3), 0, 0) == []


def test_a_range_outside_the_tensor_is_refused():
    with pytest.raises(ValueError, match="does not lie inside"):
        boxes_of_range((2, 3), 0, 7)


@settings(max_examples=300, deadline=None)
@given(shapes, st.integers(1, 4), st.integers(4, 200))
def test_pieces_are_small_contiguous_and_complete(shape, itemsize, max_bytes):
    numbers = np.arange(prod(shape)).reshape(shape)
    pieces = split_box(Box((0,) * len(shape), shape), itemsize, max_bytes)
    assert all(piece.size * itemsize <= max_bytes for piece in pieces)
    assert np.concatenate([numbers[p.slices()].reshape(-1) for p in pieces]).tolist() == list(range(prod(shape)))
    assert cover_problem(shape, pieces) is None


def test_a_piece_keeps_the_offset_of_its_box_and_an_empty_box_has_none():
    assert split_box(Box((3, 5), (2, 4)), 4, 16) == [Box((3, 5), (1, 4)), Box((4, 5), (1, 4))]
    assert split_box(Box((3, 0), (0, 4)), 4, 16) == []
    assert split_box(Box((), ()), 8) == [Box((), ())]
    with pytest.raises(ValueError, match="cannot hold one element"):
        split_box(Box((0,), (2,)), 8, 4)


def test_reads_fill_any_target(cuts, rng):
    for _ in range(200):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        numbers = np.arange(prod(shape)).reshape(shape)
        held = cuts.boxes(shape, rng, 6)
        assert cover_problem(shape, held) is None
        target = rng.choice(cuts.boxes(shape, rng, 4))
        result = np.full(target.shape, -1)
        for index, source, destination in plan_reads(target, held):
            assert (result[destination] == -1).all(), "an element is written twice"
            result[destination] = numbers[held[index].slices()][source]
        assert (result == numbers[target.slices()]).all()


def test_a_hole_is_an_error_for_a_read_that_needs_it():
    held = [Box((0,), (3,)), Box((5,), (3,))]
    assert len(plan_reads(Box((5,), (2,)), held)) == 1
    with pytest.raises(CheckpointError, match="hold 2 of the 4 elements"):
        plan_reads(Box((1,), (4,)), held)


def test_gaps_and_overlaps_are_found(cuts, rng):
    for _ in range(100):
        shape = (rng.randint(2, 6), rng.randint(2, 6), rng.randint(1, 3))
        boxes = cuts.boxes(shape, rng, 8)
        rng.shuffle(boxes)
        assert cover_problem(shape, boxes) is None
        assert "elements" in cover_problem(shape, boxes[1:])
        assert "overlap" in cover_problem(shape, [*boxes, boxes[rng.randrange(len(boxes))]])
        # the count alone would not see this: one box twice in place of an equal one that is missing
    assert "overlap" in cover_problem((4,), [Box((0,), (2,)), Box((0,), (2,))])
    assert "overlap" in cover_problem((), [Box((), ()), Box((), ())])
    assert "inside" in cover_problem((4,), [Box((2,), (3,))])
    assert "number of dims" in cover_problem((4,), [Box((0, 0), (4, 1))])
    assert "empty" in cover_problem((4,), [Box((0,), (0,)), Box((0,), (4,))])
    assert cover_problem((0, 3), []) is None
