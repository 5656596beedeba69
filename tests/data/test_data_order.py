"""Sample order and blend: equal to the arrays that Megatron-LM wrote, in numpy and in C++."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallm.base.errors import DataError, UsageError
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.megatron import blend, order

BOTH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("which", order.SPLITS)
def test_golden_order(golden, golden_prefix, native, case, which):
    want = golden["gpt_cases"][case]
    size = want["sizes"][order.SPLITS.index(which)]
    data = IndexedDataset(golden_prefix)
    sequences = np.arange(*order.split_range(want["split"], which, len(data)))
    got = order.build_order(data.lengths, sequences, size, want["seq_length"], want["seed"], native)
    want = want[which]
    assert len(got) == want["n"]
    assert got.document.tolist() == want["document_index"] and got.document.dtype == np.int32
    assert got.sample.tolist() == want["sample_index"]
    assert got.shuffle.tolist() == want["shuffle_index"]
    if which == "train":
        assert (got.sample.dtype, got.shuffle.dtype) == (want["sample_dtype"], want["shuffle_dtype"])


def test_golden_order_depends_on_the_seed(golden, golden_prefix):
    data = IndexedDataset(golden_prefix)
    got = order.build_order(data.lengths, np.arange(54), None, 16, 1235)
    assert got.document.tolist() != golden["gpt_cases"][0]["train"]["document_index"]


def test_golden_exhaustive_blend(golden, native):
    want = golden["exhaustive"]
    source, sample = blend.exhaustive(want["sizes"], native)
    assert source.tolist() == want["dataset_index"] and sample.tolist() == want["dataset_sample_index"]
    assert (source.dtype, sample.dtype) == (np.int16, np.int64)


@BOTH
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), seq_len=st.integers(1, 12), seed=st.integers(0, 99),
    samples=st.one_of(st.none(), st.integers(0, 60)),
)  # fmt: skip
def test_twin_and_extension_agree_and_cover_the_stream(compiled, monkeypatch, lengths, seq_len, samples, seed):
    monkeypatch.setattr(order.extension, "_load", lambda: (compiled, "here"))
    lengths = np.array(lengths, np.int32)
    total = int(lengths.sum())
    if total == 0 or (samples is None and total <= seq_len):
        with pytest.raises(DataError, match="cannot fill one sample"):
            order.build_order(lengths, np.arange(len(lengths)), samples, seq_len, seed)
        return
    twin, fast = (order.build_order(lengths, np.arange(len(lengths)), samples, seq_len, seed, n) for n in (False, True))
    for name in ("document", "sample", "shuffle"):
        a, b = getattr(twin, name), getattr(fast, name)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert len(twin) >= (samples or 0)
    assert sorted(twin.shuffle.tolist()) == list(range(len(twin)))
    stream = [(s, i) for s in twin.document.tolist() for i in range(lengths[s])]
    for k, (j, offset) in enumerate(twin.sample.tolist()):
        if k:
            assert stream[k * seq_len] == (int(twin.document[j]), offset)


@BOTH
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=7), size=st.integers(0, 300))
def test_blends_agree_and_stay_close(compiled, monkeypatch, weights, size):
    monkeypatch.setattr(blend.extension, "_load", lambda: (compiled, "here"))
    share = blend.normalise(weights)
    twin, fast = blend.blend(share, size, False), blend.blend(share, size, True)
    assert twin[0].tobytes() == fast[0].tobytes() and twin[1].tobytes() == fast[1].tobytes()
    counts = np.bincount(twin[0], minlength=len(weights))
    assert counts.sum() == size
    assert (counts <= np.array(blend.source_sizes(share, size))).all()
    for d in range(len(weights)):
        assert twin[1][twin[0] == d].tolist() == list(range(counts[d]))


def test_extension_refuses_what_would_read_outside(compiled):
    lengths = np.array([3, 3], np.int32)
    with pytest.raises(ValueError, match="fewer tokens"):
        compiled.build_sample_index(lengths, np.array([0, 1], np.int32), 3, 3, False)
    with pytest.raises(ValueError, match="does not exist"):
        compiled.build_sample_index(lengths, np.array([0, 2], np.int32), 2, 2, False)
    with pytest.raises(ValueError, match="larger than the sum"):
        compiled.build_blending_indices(np.array([1.0]), 3, np.array([2]))


@pytest.mark.parametrize("text, ranges", [
    ("90,5,5", [(0, 54), (54, 57), (57, 60)]), ("1", [(0, 60), (60, 60), (60, 60)]),
    ("969, 30, 1", [(0, 58), (58, 60), (60, 60)]), ("0.5/0.5", [(0, 30), (30, 60), (60, 60)]),
])  # fmt: skip
def test_split(text, ranges):
    assert [order.split_range(text, which, 60) for which in order.SPLITS] == ranges


@pytest.mark.parametrize("text", ["", "a,b", "1,-1", "0,0,0", "1,1,1,1", "nan,1", "inf"])
def test_bad_split(text):
    with pytest.raises(UsageError, match="data.split"):
        order.parse_split(text)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_bad_weights(weights):
    with pytest.raises(UsageError, match="weight"):
        blend.normalise(weights)


def test_wide_arrays_from_long_counts(native):
    lengths = np.array([2**31 - 1] * 3, np.int32)
    rows = order.build_sample_index(lengths, np.array([0, 1, 2], np.int32), 2**30, 5, native)
    assert rows.dtype == np.int32 and rows[5].tolist() == [2, 5 * 2**30 - 2 * (2**31 - 1)]
