"""Any piece of a keyed stream equals the same piece of the whole, bit for bit."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base import rng

KEY = rng.key_of(7, "layers.0.attention.q.weight")
WHOLE = rng.normal_values(KEY, 0, 40_000)


def test_keys_depend_on_seed_names_order_and_type():
    keys = [
        rng.key_of(1, "a", "b"), rng.key_of(1, "ab"), rng.key_of(1, "b", "a"), rng.key_of(2, "a", "b"),
        rng.key_of(1, "a", 1), rng.key_of(1, "a", "1"), rng.key_of(1), rng.key_of(1, ""),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**128 for key in keys)


def test_streams_are_pinned():
    """These numbers are the initial weights of every model: they may never change."""
    key = rng.key_of(1234, "pinned")
    assert key == PINNED_KEY
    assert rng.bits(key, 5, 2).tolist() == PINNED_BITS
    assert [x.hex() for x in rng.normal_values(key, 5, 2)] == PINNED_NORMAL


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 39_000), st.integers(0, 1000))
def test_sub_range_equals_range_of_whole_draw(begin, count):
    count = min(count, WHOLE.size - begin)
    assert rng.normal_values(KEY, begin, count).tobytes() == WHOLE[begin : begin + count].tobytes()


@pytest.mark.parametrize("count", range(1, 18))
def test_short_lengths_have_no_tail_of_their_own(count):
    for begin in range(4000, 4013):
        assert rng.normal_values(KEY, begin, count).tobytes() == WHOLE[begin : begin + count].tobytes()
        assert rng.uniform(KEY, begin, count).tobytes() == rng.uniform(KEY, 0, 5000)[begin : begin + count].tobytes()


def test_neighbouring_range_differs():
    assert rng.normal_values(KEY, 1, 100).tobytes() != WHOLE[:100].tobytes()
    assert rng.normal_values(rng.key_of(8, "layers.0.attention.q.weight"), 0, 100).tobytes() != WHOLE[:100].tobytes()


def test_far_ranges_work():
    whole = rng.normal_values(KEY, 2**62, 100)
    assert rng.normal_values(KEY, 2**62 + 37, 11).tobytes() == whole[37:48].tobytes()


@st.composite
def boxes(draw):
    full = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    offset = [draw(st.integers(0, f - 1)) for f in full]
    shape = [draw(st.integers(0, f - o)) for f, o in zip(full, offset, strict=True)]
    return full, offset, shape


@settings(max_examples=200, deadline=None)
@given(boxes())
def test_box_equals_box_of_whole_tensor(box):
    full, offset, shape = box
    whole = WHOLE[: int(np.prod(full))].reshape(full)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    got = rng.normal_box(KEY, full, offset, shape)
    assert got.shape == tuple(shape) and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("full, offset, shape", [
    ((3, 70_000), (1, 1000), (2, 60_000)),  # long runs
    ((300, 3000), (10, 2990), (280, 10)),  # short runs, gaps longer than worth drawing
    ((3000, 100), (3, 40), (2900, 33)),  # short runs, gaps drawn through, many slabs
    ((200_000,), (66_001,), (70_001,)),
])  # fmt: skip
def test_large_boxes(full, offset, shape):
    whole = rng.normal_values(KEY, 0, int(np.prod(full))).reshape(full)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    assert rng.normal_box(KEY, full, offset, shape).tobytes() == expected.tobytes()


def test_box_outside_is_refused():
    with pytest.raises(ValueError, match="not inside"):
        rng.normal_box(KEY, (4, 4), (2, 0), (3, 4))


def test_inverse_matches_reference_everywhere():
    reference = NormalDist()
    p = np.concatenate([np.exp(np.linspace(-36, np.log(0.5), 400)), 1 - np.exp(np.linspace(-30, -1, 200))])
    expected = np.array([reference.inv_cdf(x) for x in p])
    np.testing.assert_allclose(rng._inverse_normal(p), expected, rtol=4e-15, atol=1e-16)
    assert rng._inverse_normal(np.array([0.5]))[0] == 0.0


def test_moments_and_bounds():
    x = rng.normal_values(KEY, 0, 1_000_000)
    assert abs(x.mean()) < 4e-3 and abs(x.std() - 1) < 3e-3
    assert abs((x**3).mean()) < 0.012 and abs((x**4).mean() - 3) < 0.03
    lowest = rng._to_uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert lowest[0] > 0 and lowest[1] < 1


def test_permutation_is_one_and_depends_on_the_key():
    a, b = rng.permutation(KEY, 1000), rng.permutation(KEY + 1, 1000)
    assert sorted(a.tolist()) == list(range(1000)) and a.tolist() != b.tolist()
    assert rng.permutation(KEY, 1000).tolist() == a.tolist()
    assert rng.permutation(KEY, 0).tolist() == []


def test_speed_of_contiguous_runs():
    """10M normals a second where numpy's own generator makes 25M: at most five times its CPU time, on any machine."""
    ours = min(_timed(lambda: rng.normal_values(KEY, 3, 1_000_000)) for _ in range(5))
    theirs = np.random.Generator(np.random.Philox(1))
    assert ours < 5 * min(_timed(lambda: theirs.standard_normal(1_000_000)) for _ in range(5))


def _timed(fn):
    begin = time.process_time()
    fn()
    return time.process_time() - begin


PINNED_KEY = 46356841003528867668331047777975212962
PINNED_BITS = [218606884761825797, 10718551258145209296]
PINNED_NORMAL = ["-0x1.218717e222373p+1", "0x1.a3002a70e5f3ap-3"]


@pytest.mark.parametrize("shape", [(3, 5), (2, 20000)])
def test_a_box_of_uniform_numbers_is_a_piece_of_the_stream(shape):
    full = (shape[0] + 3, shape[1] + 2)
    whole = rng.uniform(KEY, 0, full[0] * full[1]).reshape(full)
    got = rng.uniform_box(KEY, full, (1, 2), shape)
    assert got.tobytes() == whole[1 : 1 + shape[0], 2 : 2 + shape[1]].copy().tobytes()
