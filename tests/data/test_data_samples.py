"""Samples, sampler and loader."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import DataError, UsageError
from megallm.data.batches import stack
from megallm.data.loader import Loader
from megallm.data.megatron.sampler import rows_after
from megallm.data.megatron.samples import Blend, DocumentSpan
from tests.data.megatron_cases import build_split


def micro_rows(step: int, batch: int, *rest) -> list[list[int]]:
    """The rows of a step of a run with one batch size throughout."""
    return rows_after(step * batch, batch, *rest)


@pytest.mark.parametrize("case", range(3))
def test_golden_tokens_and_labels(golden, golden_prefix, case):
    want = golden["gpt_cases"][case]
    dataset = build_split({golden_prefix: 1.0}, want["split"], "train", want["sizes"][0], 16, want["seed"], 1000)
    want = want["train"]
    for i, (tokens, labels) in enumerate(zip(want["first_tokens"], want["first_labels"], strict=True)):
        sample = dataset.sample(i)
        assert sample.dtype == np.int64
        assert sample[:-1].tolist() == tokens and sample[1:].tolist() == labels


def test_one_epoch_reads_every_token_once(make_dataset):
    documents, token = [], 0
    for n in (3, 1, 9, 4, 0, 16, 8):
        documents.append([list(range(token, token + n))])
        token += n
    dataset = build_split({make_dataset("x", documents): 1.0}, "1", "train", None, 8, 3)
    read = sorted(t for i in range(len(dataset)) for t in dataset.sample(i)[:-1].tolist())
    assert len(read) == len(set(read)) == 8 * len(dataset) == 40
    for i in range(len(dataset)):
        spans = dataset.spans(i)
        assert dataset.sample(i).tolist() == [t for s in spans for t in documents[s.document][0][s.begin : s.end]]


def test_spans_count_within_documents_of_several_sequences(make_dataset):
    prefix = make_dataset("x", [[[1, 2], [3, 4, 5]]])
    dataset = build_split({prefix: 1.0}, "1", "train", None, 4, 0)
    spans = dataset.spans(0)
    assert sum(s.end - s.begin for s in spans) == 5
    assert all(isinstance(s, DocumentSpan) and s.document == 0 and 0 <= s.begin < s.end <= 5 for s in spans)


def test_blend_draws_from_its_sources_by_weight(make_dataset):
    a = make_dataset("a", [[[1] * 40]] * 4)
    b = make_dataset("b", [[[2] * 40]] * 4)
    dataset = build_split({a: 3.0, b: 1.0}, "1", "train", 80, 4, 1)
    assert isinstance(dataset, Blend) and len(dataset) == 80
    drawn = [int(dataset.sample(i)[0]) for i in range(80)]
    assert drawn.count(1) == 60 and drawn.count(2) == 20
    assert {s.prefix for i in range(80) for s in dataset.spans(i)} == {a, b}
    everything = build_split({a: 3.0, b: 1.0}, "1", "train", None, 4, 1)
    assert len(everything) == 2 * ((160 - 1) // 4)


def test_id_outside_the_vocabulary_is_named(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]], [[4, 50], [5, 6]]])
    build_split({prefix: 1.0}, "1", "train", None, 6, 0, 51).sample(0)
    with pytest.raises(DataError, match=r"x.bin: document 1, position 1: token id 50 is outside the vocabulary of 50"):
        build_split({prefix: 1.0}, "1", "train", None, 6, 0, 50).sample(0)


def test_too_little_data_is_named(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]]])
    with pytest.raises(DataError, match="x, split 'valid' of 1: 0 sequences with 0 tokens"):
        build_split({prefix: 1.0}, "1", "valid", 5, 2, 0)
    with pytest.raises(DataError, match="cannot fill one sample of 3"):
        build_split({prefix: 1.0}, "1", "train", None, 3, 0)
    assert len(build_split({prefix: 1.0}, "1", "train", 4, 3, 0)) >= 4  # several epochs can


def test_bad_requests_are_refused(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]]])
    for sources, split, which, samples, seq_len in [
        ({}, "1", "train", 1, 1), ({prefix: 1.0}, "1", "test2", 1, 1), ({prefix: 1.0}, "x", "train", 1, 1),
        ({prefix: 1.0}, "1", "train", 1, 0), ({prefix: 0.0}, "1", "train", 1, 1), ({prefix: 1.0}, "1", "train", -1, 1),
    ]:  # fmt: skip
        with pytest.raises(UsageError):
            build_split(sources, split, which, samples, seq_len, 0)
    with pytest.raises(IndexError):
        build_split({prefix: 1.0}, "1", "train", None, 2, 0).sample(1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 50), st.booleans())
def test_ranks_divide_the_global_batch(dp, micro, micros, step, strided):
    batch = dp * micro * micros
    ranks = [micro_rows(step, batch, micro, dp, rank, strided) for rank in range(dp)]
    assert all(len(rows) == micros and all(len(row) == micro for row in rows) for rows in ranks)
    flat = [i for rows in ranks for row in rows for i in row]
    assert sorted(flat) == list(range(step * batch, (step + 1) * batch))
    if not strided:
        assert flat == sorted(flat)
    else:
        by_micro = [i for m in range(micros) for rank in range(dp) for i in ranks[rank][m]]
        assert by_micro == sorted(by_micro)


def test_sampler_resumes_from_consumed_and_refuses_uneven_batches():
    assert rows_after(24, 8, 2, 2, 1) == micro_rows(3, 8, 2, 2, 1) == [[28, 29], [30, 31]]
    assert rows_after(24, 8, 2, 2, 1, strided=True) == [[26, 27], [30, 31]]
    with pytest.raises(UsageError, match="nearest: 8, 12"):
        micro_rows(0, 10, 2, 2, 0)


class Counting:
    """Sample i is i, i + 1, ...; sample `broken` cannot be read."""

    def __init__(self, broken=None):
        self.broken, self.read = broken, []

    def __len__(self):
        return 1000

    def sample(self, i):
        if i == self.broken:
            raise DataError(f"sample {i} is broken")
        self.read.append(i)
        return np.arange(i, i + 5)

    def spans(self, i):
        return []


def reading(dataset):
    """What the loader reads: step 0 is samples 0 to 3."""

    def read(step):
        return [stack([dataset.sample(i) for i in micro]) for micro in micro_rows(step, 4, 2, 1, 0)]

    return read


def test_loader_gives_batches_in_order():
    torch = pytest.importorskip("torch")
    with Loader(reading(Counting()), 3, 6) as loader:
        got = list(loader)
    assert [step for step, _ in got] == [3, 4, 5] and all(len(batches) == 2 for _, batches in got)
    batch = got[0][1][1]
    assert batch["tokens"].tolist() == [[14, 15, 16, 17], [15, 16, 17, 18]]
    assert batch["labels"].tolist() == [[15, 16, 17, 18], [16, 17, 18, 19]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 2 and batch["positions"].is_contiguous()
    assert batch["mask"].dtype == torch.bool and bool(batch["mask"].all())
    assert {batch[name].dtype for name in ("tokens", "labels", "positions")} == {torch.int64}


def test_loader_raises_the_error_at_its_step_and_ends():
    before = threading.active_count()
    loader = Loader(reading(Counting(broken=9)), 0, 10)
    assert next(loader)[0] == 0 and next(loader)[0] == 1
    with pytest.raises(DataError, match="sample 9 is broken"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert threading.active_count() == before


def test_loader_runs_ahead_only_so_far_and_closes():
    dataset = Counting()
    loader = Loader(reading(dataset), 0, 200, prefetch=2)
    deadline = time.monotonic() + 60
    while len(dataset.read) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(dataset.read) == 8  # two steps of four samples
    next(loader)
    loader.close()
    loader.close()
    assert len(dataset.read) <= 12
    with pytest.raises(StopIteration):
        next(loader)
