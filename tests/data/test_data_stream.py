"""The stream: exactly once whatever changes, resumed from counts, documents never mixed up."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import DataError, UsageError
from megallm.data.batches import Share, StreamReader, fill_row, pack_rows, unpacked_rows
from megallm.data.stream.mixture import Mixture
from megallm.data.stream.permute import Permutation
from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment, stream_segments
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.stream import Stream
from tests.data.stream_cases import changing_plan, check_exactly_once, corpora, sources_of, through_json, write

# The keyed permutation.


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_every_item_comes_once(n):
    whole = Permutation(7, n).at(0, n)
    assert sorted(whole.tolist()) == list(range(n))
    pieces = [Permutation(7, n).at(i, min(97, n - i)) for i in range(0, n, 97)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    if n > 10:
        assert whole.tolist() != Permutation(8, n).at(0, n).tolist() and whole.tolist() != list(range(n))


def test_a_huge_permutation_costs_nothing():
    n = 3 * 10**12
    some = Permutation(1, n).at(n - 1000, 1000)
    assert len(set(some.tolist())) == 1000 and some.min() >= 0 and some.max() < n
    assert abs(some.mean() / n - 0.5) < 0.06  # 6 standard deviations of the mean of 1000 uniform numbers


@pytest.mark.parametrize("n", [2, 3, 6])
def test_every_item_is_equally_often_at_every_place(n):
    keys = 800
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(key, n).at(0, n)] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_consecutive_places_are_not_related():
    at = Permutation(3, 10**6).at(0, 20000).astype(float)
    assert abs(np.corrcoef(at[:-1], at[1:])[0, 1]) < 0.03
    histogram, _ = np.histogram(at, 100, (0, 10**6))
    assert ((histogram - 200) ** 2 / 200).sum() < 99 + 5 * (2 * 99) ** 0.5


# The blend.


def worst_error(weights: list[float], draws: int, rule=None) -> float:
    mixture = Mixture({str(i): weight for i, weight in enumerate(weights)})
    shares = np.array(list(mixture.weights.values())) / mixture.total
    taken, worst = np.zeros(len(weights)), 0.0
    for n in range(1, draws + 1):
        taken[int(mixture.draw()) if rule is None else rule(shares, n, taken)] += 1
        worst = max(worst, float(np.abs(shares * n - taken).max()))
    return worst


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64])
def test_the_blend_keeps_its_bound(count):
    bound = 1 - 1 / (2 * count - 2)
    generator = np.random.RandomState(count)
    for weights in (
        [1.0] * count, generator.dirichlet(np.ones(count)).tolist(), generator.dirichlet(np.full(count, 0.1)).tolist(),
        [2.0**-i for i in range(count)],
    ):  # fmt: skip
        weights = [max(weight, 1e-12) for weight in weights]
        assert worst_error(weights, 1500 if count < 20 else 500) <= bound + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=10))
def test_the_blend_keeps_its_bound_for_any_weights(weights):
    assert worst_error(weights, 300) <= 1 - 1 / (2 * len(weights) - 2) + 1e-9


def test_the_greedy_rule_breaks_the_bound():
    """Megatron's rule is not within it: the check above can fail."""

    def greedy(shares, n, taken):
        return int(np.argmax(shares * max(n - 1, 1) - taken))

    assert worst_error([2.0**-i for i in range(8)], 1500, greedy) > 1 - 1 / 14


def test_a_source_of_weight_zero_rests_and_bad_weights_are_refused():
    mixture = Mixture({"a": 1.0, "b": 0.0})
    assert {mixture.draw() for _ in range(5)} == {"a"}
    with pytest.raises(UsageError, match="at least one of them > 0"):
        Mixture({"a": 0.0})


# Exactly once.


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_exactly_once_across_changes_and_fifty_kills(tmp_path, packing):
    """A run killed at 50 random steps, each time resumed from an older checkpoint on another number of ranks."""
    plan = changing_plan(corpora(tmp_path), packing)
    sources = sources_of(plan)
    batch, last = 8, 60
    quiet = Stream(plan, sources)
    wanted = [quiet.take(batch) for _ in range(last)]
    checkpoints, log = {0: None}, {}
    chance = random.Random(5)
    for _ in range(50):
        step = chance.choice(sorted(checkpoints)[-2:])  # the newest may be damaged
        checkpoints = {at: state for at, state in checkpoints.items() if at <= step}
        log = {key: row for key, row in log.items() if key[0] <= step}
        until = min(last, step + chance.randint(1, 12))
        dp = chance.choice([1, 2, 4])
        readers = [
            StreamReader(Stream(plan, sources, checkpoints[step]), Share(batch, 2, dp, rank), step + 1)
            for rank in range(dp)
        ]
        for now in range(step + 1, until + 1):
            for reader in readers:
                for row in reader.consumed(now):
                    assert (now, row["row"]) not in log
                    log[now, row["row"]] = row
            states = [json.dumps(reader.state_after(now)) for reader in readers]
            assert len(set(states)) == 1
            if now % 3 == 0:
                checkpoints[now] = json.loads(states[0])
    step = max(checkpoints)
    log = {key: row for key, row in log.items() if key[0] <= step}
    final = StreamReader(Stream(plan, sources, checkpoints[step]), Share(batch, 4), step + 1)
    for now in range(step + 1, last + 1):
        log |= {(now, row["row"]): row for row in final.consumed(now)}
    got = [[log[now, i]["spans"] for i in range(batch)] for now in range(1, last + 1)]
    assert got == [[row.spans for row in rows] for rows in wanted]
    newest = check_exactly_once(sources, [row for rows in wanted for row in rows])
    assert max(newest.values()) >= 2, "the check needs finished epochs"


def test_a_row_read_twice_is_noticed(tmp_path):
    plan = changing_plan(corpora(tmp_path), "best_fit")
    sources = sources_of(plan)
    rows = [row for _ in range(40) for row in Stream(plan, sources).take(8)]  # begins anew each time
    with pytest.raises(AssertionError, match="read twice"):
        check_exactly_once(sources, rows)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_plans_may_change_at_any_resume(tmp_path_factory, data):
    """Whatever the next plan is, what was read is not read again in the same epoch."""
    folder = tmp_path_factory.mktemp("plans")
    names = list(corpora(folder, data.draw(st.integers(0, 3))).values())
    state, rows = None, []
    for _ in range(data.draw(st.integers(2, 6))):
        weights = data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.01))
        reading = Reading(
            data.draw(st.sampled_from([8, 24, 32, 100])), data.draw(st.sampled_from(["best_fit", "concat"])),
            data.draw(st.sampled_from([1, 4, 16])),
        )  # fmt: skip
        plan = StreamPlan((StreamSegment(0, dict(zip(names, weights, strict=True)), reading),), seed=1)
        sources = sources_of(plan)
        stream = Stream(plan, sources, state)
        rows += stream.take(data.draw(st.integers(1, 60)))
        state = through_json(stream)
    check_exactly_once(sources, rows)


def test_what_is_held_over_is_small_and_only_after_a_change(tmp_path):
    plan = changing_plan(corpora(tmp_path), "best_fit")
    stream = Stream(plan, sources_of(plan))
    for _ in range(11):
        stream.take(8)
    assert all(not cursor["held"] for cursor in stream.state()["sources"].values())
    size = []
    for _ in range(40):
        stream.take(8)
        size.append(len(json.dumps(stream.state())))
    assert max(size) < 6000


def test_resume_looks_at_nothing_before_the_cursor(tmp_path, monkeypatch):
    prefix = write(tmp_path / "many", [np.arange(1, 20)] * 3000)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(64, "best_fit", 32)),), seed=1)
    stream = Stream(plan, {prefix: DocumentSource(prefix, plan)})
    for _ in range(60):
        stream.take(8)
    state = through_json(stream)
    source, drawn = DocumentSource(prefix, plan), []
    original = Permutation.at
    monkeypatch.setattr(Permutation, "at", lambda self, b, n: drawn.append(b) or original(self, b, n))
    assert Stream(plan, {prefix: source}, state).take(8) == stream.take(8)
    assert len(drawn) <= 4 and min(drawn) >= state["sources"][prefix]["position"]


def test_other_files_another_seed_or_split_are_refused(tmp_path):
    prefix = write(tmp_path / "a", [np.arange(1, 20)] * 50)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(16)),), seed=1)
    stream = Stream(plan, sources_of(plan))
    stream.take(3)
    state = through_json(stream)
    for changed, word in (({"seed": 2}, "data.seed 1, now it is 2"), ({"split": "90,10"}, "data.split")):
        other = dataclasses.replace(plan, **changed)
        with pytest.raises(DataError, match=word):
            Stream(other, sources_of(other), state)
    moved = write(tmp_path / "moved", [np.arange(1, 20)] * 50)
    there = StreamPlan((StreamSegment(0, {moved: 1.0}, Reading(16)),), seed=1)
    assert [r.spans for r in Stream(there, sources_of(there), state).take(3)] == [r.spans for r in stream.take(3)]
    write(tmp_path / "a", [np.arange(1, 20)] * 51)  # a document more: FAULTS row 69
    with pytest.raises(DataError, match="a has changed since this run read it"):
        Stream(plan, sources_of(plan), state)


def test_a_changed_token_changes_the_fingerprint(tmp_path):
    prefix = write(tmp_path / "a", [np.arange(1, 20)] * 50)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(16)),), seed=1)
    before = DocumentSource(prefix, plan).fingerprint
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    assert DocumentSource(prefix, plan).fingerprint != before


def test_a_source_without_a_document_is_refused(tmp_path):
    empty = np.zeros(0)
    for documents, split in (([empty, empty], "100"), ([np.arange(1, 9)], "0,100")):
        prefix = write(tmp_path / "e", documents)
        plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(16)),), seed=1, split=split)
        with pytest.raises(DataError, match="holds no whole document"):
            DocumentSource(prefix, plan)


def test_segments_begin_between_steps():
    plan = StreamPlan(stream_segments({"a": 1.0}, Reading(16), [(100, {}), (None, {"seq_len": 32})]), seed=1)
    assert [plan.at(tokens).reading.seq_len for tokens in (0, 96, 100, 128)] == [16, 16, 32, 32]
    assert [plan.tokens_after(steps, 2) for steps in (0, 3, 4, 5)] == [0, 96, 128, 192]


# Batches.


def test_masks_and_labels_stay_inside_documents(tmp_path):
    """Tokens name their document, so a label of another one would be seen."""
    documents = [np.full(n, number + 1) for number, n in enumerate([5, 40, 3, 17, 1, 64, 9, 2] * 8)]
    prefix = write(tmp_path / "a", documents)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(32, "best_fit", 8)),), seed=1)
    reader = StreamReader(Stream(plan, sources_of(plan)), Share(6, 3), 1)
    predicted = 0
    for step in range(1, 12):
        for batch in reader.batches(step):
            tokens, labels, mask = (batch[name][0] for name in ("tokens", "labels", "mask"))
            ends = batch["cu_seqlens"]
            assert ends.dtype == np.int32 and ends[0] == 0 and ends[-1] == 96 and (np.diff(ends) > 0).all()
            for begin, end in zip(ends[:-1], ends[1:], strict=True):
                assert len(set(tokens[begin:end].tolist())) == 1
                assert batch["positions"][0, begin:end].tolist() == list(range(end - begin))
            assert (labels[mask] == tokens[mask]).all() and (tokens[mask] > 0).all()
            predicted += int(mask.sum())
            unmasked = unpacked_rows(reader._rows[step][:3], reader.stream.sources)
            assert unmasked["tokens"].shape == (3, 32)
    assert predicted > 500


def test_every_token_but_the_first_is_predicted_once(tmp_path):
    documents = [np.arange(n) + 1000 * i + 1 for i, n in enumerate([5, 100, 3, 70, 1, 33, 2])]
    prefix = write(tmp_path / "a", documents)
    for packing in ("best_fit", "concat"):
        plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(32, packing, 4)),), seed=1)
        sources = sources_of(plan)
        stream, labels = Stream(plan, sources), []
        while (row := stream.take(1)[0]).epoch == 0:
            _, label, mask, _ = fill_row(row, sources[prefix])
            labels += label[mask].tolist()
        assert sorted(labels) == sorted(token for document in documents for token in document[1:].tolist())


def test_without_masks_the_next_token_is_always_the_label(tmp_path):
    prefix = write(tmp_path / "a", [np.arange(n) + 100 * i + 1 for i, n in enumerate([5, 9, 3, 20, 11])])
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(16, "concat", 2)),), seed=1)
    sources = sources_of(plan)
    batch = unpacked_rows(Stream(plan, sources).take(2), sources)
    assert "cu_seqlens" not in batch and batch["positions"].tolist() == [list(range(16))] * 2
    both = batch["mask"][:, :-1]
    assert (batch["labels"][:, :-1][both] == batch["tokens"][:, 1:][both]).all() and both.all()


def test_an_id_outside_the_vocabulary_names_its_document(tmp_path):
    prefix = write(tmp_path / "a", [[1, 2, 3], [4, 5, 99, 6]])
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(8)),), seed=1)
    source = DocumentSource(prefix, plan, vocab_size=50)
    with pytest.raises(DataError, match=r"a\.bin: document 1, position 2: token id 99 is outside the vocabulary of 50"):
        pack_rows(Stream(plan, {prefix: source}).take(1), {prefix: source})


def test_only_the_next_step_can_be_read(tmp_path):
    prefix = write(tmp_path / "a", [np.arange(1, 20)] * 50)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(16)),), seed=1)
    reader = StreamReader(Stream(plan, sources_of(plan)), Share(2, 1), 1)
    reader.batches(1)
    with pytest.raises(ValueError, match="stands before step 2; step 5"):
        reader.batches(5)
