"""Blends and samples of Megatron-LM's own dataset classes, from its flags (issue R, items 5 and 25).

`tests/golden/blends.json` was written by them at commit d98e8a64dd: which source each item of a blend takes, and for
whole command lines the first token of every training and validation sample.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from megallm.base.config import load, loads, replace
from megallm.base.errors import DataError, UsageError
from megallm.convert.megatron.translate import translate, translation_yaml
from megallm.data.batches import Share
from megallm.data.megatron import blend
from megallm.data.megatron.samples import SampleOptions, build_samples
from megallm.training import reading
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.data.megatron_cases import build_split

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/blends.json").read_text())
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
REST = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 "
REST += "--seq-length 8 --vocab-size 9000 --micro-batch-size 1 --seed 1234 "


def drawn(source_of: np.ndarray) -> str:
    return "".join(DIGITS[number] for number in source_of)


@pytest.mark.parametrize("case", GOLDEN["blends"], ids=lambda case: case["weights"])
def test_round_number_blends_and_those_of_22_sources(case, native):
    """Item 5: 16 of 60 round-number blends and 34 of 60 of 22 sources took another item, the first at item 19."""
    given = [float(word) for word in case["weights"].split()]
    once = blend.normalise(given)
    assert blend.source_sizes(once, case["samples"]) == case["built"]
    total = sum(blend.source_sizes(once, case["samples"], 0.0))
    assert drawn(blend.blend(blend.normalise(once), total, native)[0]) == case["sources"]
    assert (
        drawn(blend.blend(np.array(given) / sum(given), total)[0]) != case["sources"]
    )  # the case tells them apart


@pytest.mark.parametrize("case", GOLDEN["by_size"], ids=lambda case: str(case["samples"]))
def test_blends_by_size(case):
    assert (
        drawn(blend.blend(blend.normalise(case["lengths"]), case["samples"])[0]) == case["sources"]
    )


@pytest.fixture
def corpus(make_dataset, tmp_path, monkeypatch):
    """Three datasets whose tokens all differ, and the files that the flags name."""
    for number, name in enumerate("ABC"):
        at, documents = 2000 * number, []
        for i in range(60 + 20 * number):
            length = (7 * i + 5 * number) % 37 + 1
            documents.append([list(range(at, at + length))])
            at += length
        make_dataset(name, documents)
    (tmp_path / "list.txt").write_text("30 A\n20 B\n50 C\n")
    (tmp_path / "split.json").write_text(
        json.dumps({"train": "0.25 A 0.75 B", "valid": ["C"], "test": None})
    )
    monkeypatch.chdir(tmp_path)


def config_of(flags: str) -> PretrainConfig:
    found = translate(REST + flags, "flags")
    assert found.problems == []
    return check(loads(PretrainConfig, translation_yaml(found, "flags")))


def first_tokens(reader, steps: range) -> np.ndarray:
    return np.concatenate(
        [batch["tokens"][:, 0] for step in steps for batch in reader.batches(step)]
    )


@pytest.mark.parametrize("row", GOLDEN["runs"], ids=lambda row: row["flags"].split(" --eval-i")[0])
def test_command_lines_read_what_they_read_there(row, corpus):
    """Items 5 and 25: weights, none, a weight for one source, data of each split, files, epochs near their ends.

    Validation is (iterations // interval + 1) x batches long, and each evaluation reads the next ones.
    """
    config = config_of(row["flags"])
    share, want = Share(config.train.global_batch, 1), row["train"]
    if "--train-samples" not in row["flags"]:
        assert (
            reading.planned_samples(config)
            == want["samples"]
            == config.train.steps * config.train.global_batch
        )
    found = first_tokens(reading.open_reader(config, share, 1), range(1, config.train.steps + 1))
    full = len(found) == want["samples"]
    assert found[:16].tolist() == want["first"] and (
        not full or zlib.crc32(found.tobytes()) == want["crc"]
    )
    assert (
        full or want["samples"] - len(found) < config.train.global_batch
    )  # the rest of --train-samples
    readers = reading.held_out_readers(config, share)
    if "valid" not in row:
        assert readers is None
        return
    want, every, batches = row["valid"], config.eval.every, config.eval.batches
    assert reading.planned_held_out(config) == want["samples"]
    at = [*range(every, config.train.steps, every), config.train.steps]  # where the loop evaluates
    steps = [
        first + i
        for first in (reading.first_held_out(config, step) for step in at)
        for i in range(batches)
    ]
    found = first_tokens(readers(), steps)
    assert found[:16].tolist() == want["first"][: len(found)]
    if len(found) == want["samples"]:
        assert zlib.crc32(found.tobytes()) == want["crc"]


def test_a_weight_for_one_source_is_not_none(corpus):
    """Item 25: where the samples just fill whole epochs, a surplus of 0.005 begins another: 0 of 112 were equal."""
    for samples in (140, 281):
        none, alone, weighted = (
            build_samples({"A": weight}, "1", "train", samples, SampleOptions(8, 1234, surplus))
            for weight, surplus in ((None, 0.005), (1.0, None), (1.0, 0.005))
        )
        first = [[int(one.sample(i)[0]) for i in range(samples)] for one in (alone, none, weighted)]
        assert first[0] == first[1]
        assert sum(a == b for a, b in zip(first[0], first[2], strict=True)) < 0.1 * samples


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("0.3 A 0.7 A", "A is given twice"),
        ("A A", "A is given twice"),
        ("0.5 A 0.25 B 0.25 A", "A is given twice"),
        ("0.3 A B", "Megatron-LM takes 0.3 for the prefix"),
        ("A 0.5 B", "Megatron-LM takes 0.5 for the prefix"),
        ("0.3 0.7 A B", "A stands where a weight is wanted"),
        ("0 A 1 B", "the weight of A is 0"),
        ("-1 A 1 B", "the weight of A is -1"),
        ("nan A 1 B", "the weight of A is nan"),
        ("inf A 1 B", "the weight of A is inf"),
        ("1 MOCK 1 B", "MOCK is a placeholder"),
        ("1 A 1 $3", "the script computes $3"),
        ("1 A 1 /path/to/data", "/path/to/data is a placeholder"),
    ],
)
@pytest.mark.parametrize("flag", ["--data-path", "--train-data-path"])
def test_what_cannot_be_exact_is_refused_once(flag, words, why):
    found = translate(
        REST + f"--train-iters 5 --global-batch-size 1 --eval-iters 0 {flag} {words}", "flags"
    )
    assert "data.sources" not in found.config
    assert len(found.problems) == 1 and why in found.problems[0], found.problems
    with pytest.raises(UsageError, match="data.sources is empty"):
        check(loads(PretrainConfig, translation_yaml(found, "flags")))


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        ("1e-1 A 9E-1 B", {"A": 0.1, "B": 0.9}),
        ("30 A 70 B", {"A": 30.0, "B": 70.0}),
        (".5 A 5. B +1 C", {"A": 0.5, "B": 5.0, "C": 1.0}),
        ("1_0 A 1 B", {"A": 10.0, "B": 1.0}),
        ("A B", {"A": None, "B": None}),
        ("A B C", {"A": None, "B": None, "C": None}),
        ("./A A", {"./A": None, "A": None}),
    ],
)
def test_weights_are_what_python_reads(words, sources):
    found = translate(REST + f"--train-iters 5 --global-batch-size 1 --data-path {words}", "flags")
    assert found.problems == [] and found.config["data.sources"] == sources
    assert loads(PretrainConfig, translation_yaml(found, "flags")).data.sources == sources


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--data-args-path gone.txt", "--data-args-path gone.txt: there is no such file here"),
        ("--data-args-path .", "--data-args-path .: there is no such file here"),
        ("--data-path A --data-args-path list.txt", "--data-args-path: --data-path is given too"),
        ("--data-path A --valid-data-path B", "--valid-data-path: --data-path is given too"),
        ("--train-data-path A --split 90,10", "--split 90,10: each split has data of its own"),
        ("--valid-data-path A", "--train-data-path is absent"),
        (
            "--train-data-path A --test-data-path B",
            "--test-data-path: a run ends without a loss on test data",
        ),
        (
            "--per-split-data-args-path list.txt",
            "--per-split-data-args-path list.txt: the file is not JSON",
        ),
        ("--per-split-data-args-path wrong.json", "train is no list of words"),
        ("--data-path", "--data-path: no words follow it"),
        (
            "--eval-iters 5 --data-path A --full-validation",
            "--full-validation: eval.batches batches",
        ),
    ],
)
def test_other_ways_to_say_it_are_named(flags, why, corpus, tmp_path):
    (tmp_path / "wrong.json").write_text('{"train": {"A": 1}}')
    problems = translate(REST + f"--train-iters 5 --global-batch-size 1 {flags}", "flags").problems
    assert len(problems) == 1 and why in problems[0], problems


def test_a_blend_by_size_is_one_epoch(corpus):
    """Megatron-LM's data runs out in the middle of the run; here it is said before the first step."""
    sources = {"A": None, "B": None}
    whole = build_split(sources, "1", "train", None, 8, 1)
    assert len(whole) == 140 + 188 == len(build_split(sources, "1", "train", 328, 8, 1))
    with pytest.raises(DataError, match="holds 328 samples, and 329 are wanted"):
        build_split(sources, "1", "train", 329, 8, 1)
    with pytest.raises(UsageError, match="a weight for A, but none for others"):
        build_split({"A": 1.0, "B": None}, "1", "train", 9, 8, 1)


def test_a_blend_that_takes_more_than_was_built_is_refused(make_dataset):
    """Megatron-LM raises IndexError; before, the run ended with exit 70 at the sample that is not there."""
    sources = dict(
        zip((make_dataset(f"s{i}", [[[i] * 41]]) for i in range(5)), [1, 1, 1, 50, 1], strict=True)
    )
    with pytest.raises(
        DataError,
        match="s3: the blend takes 57 samples of it, but 55 were built: raise data.surplus",
    ):
        build_split(sources, "1", "train", 58, 40, 1)
    enough = build_samples(sources, "1", "train", 58, SampleOptions(40, 1, surplus=0.05))
    assert [int(enough.sample(i)[0]) for i in range(58)].count(3) > 50


STREAM = """
model: {family: llama, num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_heads: 1, vocab_size: 9000}
data: {sources: {A: 1}, valid_sources: {C: 1}, split: "100", seq_len: 8, window: 4}
train: {steps: 4, global_batch: 4, micro_batch: 2}
eval: {every: 2, batches: 2}
"""


def test_validation_data_of_its_own_in_the_stream_order(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text(STREAM)
    config = check(load(PretrainConfig, tmp_path / "c.yaml"))
    reader = reading.held_out_readers(config, Share(4, 2))()
    assert {row["source"] for step in (1, 2) for row in reader.consumed(step)} == {"C"}
    assert {reading.first_held_out(config, step) for step in (2, 4)} == {1}
    assert config.data.prefixes == ["A", "C"]
    with pytest.raises(
        UsageError, match="data.valid_sources is validation data of its own, but data.split '90,10'"
    ):
        check(replace(config, {"data.split": "90,10"}))
