"""From a configuration to what is read: plans, tokenizers that must agree, states of checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megallm.base.config import load, replace
from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.data.batches import MegatronReader, Share, StreamReader
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.text.preprocess import PreprocessConfig
from megallm.data.text.preprocess import run as preprocess
from megallm.training import reading
from megallm.training.config import PretrainConfig
from megallm.training.validate import check

YAML = """
model: {{family: llama, num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_heads: 4, vocab_size: 260}}
data:
  sources: {{{a}: 0.7, {b}: 0.3}}
  split: "80,20,0"
  seq_len: 32
  window: 8
  segments:
    - {{until_tokens: 500, sources: {{{a}: 1.0}}}}
    - {{until_tokens: 2000, seq_len: 64, packing: concat}}
    - {{fim_rate: 0.5}}
train: {{steps: 40, global_batch: 4, micro_batch: 2}}
eval: {{batches: 2}}
"""


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    prefixes = {}
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {i} " * (i % 9 + 1)}) for i in range(80)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        preprocess(PreprocessConfig((str(tmp_path / f"{name}.jsonl"),), str(tmp_path / name), "bytes", append_eod=True))
        prefixes[name] = str(tmp_path / f"{name}_text_document")
    path = tmp_path / "c.yaml"
    path.write_text(YAML.format(**prefixes))
    found = load(PretrainConfig, path, ["data.fim.tokens=['257','258','259']"])
    return check(found, None, 257)


def test_segments_become_a_plan(config):
    a, b = config.data.sources
    plan = reading.plan_of(config)
    assert [segment.begin_tokens for segment in plan.segments] == [0, 500, 2000]
    assert [segment.weights for segment in plan.segments] == [{a: 1.0}, {a: 0.7, b: 0.3}, {a: 0.7, b: 0.3}]
    assert [segment.reading.seq_len for segment in plan.segments] == [32, 64, 32]
    assert [segment.reading.packing for segment in plan.segments] == ["best_fit", "concat", "best_fit"]
    assert [segment.reading.fim_rate for segment in plan.segments] == [0.0, 0.0, 0.5]
    assert plan.prefixes == [a, b] and plan.seed == config.data.seed


def test_readers_of_both_orders(config):
    share = Share(4, 2)
    stream = reading.open_reader(config, share, 1)
    assert isinstance(stream, StreamReader)
    steps = [stream.consumed(step) for step in range(1, 31)]
    assert {row["source"] for row in steps[2]} == {list(config.data.sources)[0]}
    assert any("forms" in row for rows in steps[15:] for row in rows)
    jumped = reading.open_reader(config, share, 21)
    assert jumped.consumed(21) == steps[20]
    megatron = replace(config, {"data.order": "megatron", "data.segments": ()})
    assert isinstance(reading.open_reader(megatron, share, 1), MegatronReader)
    assert set(reading.open_reader(megatron, share, 1).consumed(3)[0]) == {
        "step", "micro", "row", "source", "epoch", "spans"
    }  # fmt: skip


def test_held_out_documents_are_no_training_documents(config):
    trained = {
        (row["source"], document)
        for step in range(1, 41) for row in reading.open_reader(config, Share(4, 2), step).consumed(step)
        for document, _, _ in row["spans"]
    }  # fmt: skip
    readers = reading.held_out_readers(config, Share(4, 2))
    rows, again = ([row for step in (1, 2) for row in reader.consumed(step)] for reader in (readers(), readers()))
    held = {(row["source"], document) for row in rows for document, _, _ in row["spans"]}
    assert held and not held & trained and again == rows
    assert reading.held_out_readers(replace(config, {"eval.batches": 0}), Share(4, 2)) is None
    assert reading.held_out_readers(replace(config, {"data.split": "100"}), Share(4, 2)) is None


def test_tokenizers_must_agree(config):
    """FAULTS row 68."""
    reading.check_tokenizers(config)
    side_car = Path(f"{list(config.data.sources)[1]}.meta.json")
    changed = json.loads(side_car.read_text())
    changed["tokenizer"]["fingerprint"] = "hf-other"
    side_car.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="was made with tokenizer hf-other, but .* with bytes-257"):
        reading.check_tokenizers(config)
    with pytest.raises(DataError, match="was made with tokenizer hf-other, but data.tokenizer"):
        reading.check_tokenizers(replace(config, {"data.tokenizer": "bytes"}))


def test_fim_needs_a_tokenizer_and_its_tokens(config):
    plan = reading.plan_of(config)
    with pytest.raises(UsageError, match="needs three different tokens"):
        reading.open_sources(replace(config, {"data.fim.tokens": None}), plan)
    for name in config.data.sources:
        Path(f"{name}.meta.json").unlink()
    with pytest.raises(UsageError, match="set data.tokenizer"):
        reading.open_sources(config, plan)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        reading.saved_state(tmp_path)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from megallm.cli.main import main
sys.exit(main(["data", "stream", sys.argv[1], "--steps", "0:3", "data.fim.tokens=['257','258','259']"]))
"""


def test_the_stream_is_printed_without_torch(config, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "c.yaml")], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reader = reading.open_reader(config, Share(4, 2), 1)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        row for step in (1, 2, 3) for row in reader.consumed(step)
    ]


# Fill-in-the-middle, switched off on the way.

OFF = {"data.fim.rate": 0.0, "data.segments": ()}


def fim_config(config: PretrainConfig, **values) -> PretrainConfig:
    return replace(config, {"data.segments": (), "data.fim.rate": 0.9} | values)


def tokens_read(reader, steps: range) -> dict[tuple, int]:
    """How often each (source, epoch, document) was read, counted in plain tokens without the sentinels."""
    found: dict[tuple, int] = {}
    for step in steps:
        for row in reader.consumed(step):
            forms = row.get("forms", ["plain"] * len(row["spans"]))
            for (document, begin, end), form in zip(row["spans"], forms, strict=True):
                key = (row["source"], row["epoch"], document)
                found[key] = found.get(key, 0) + end - begin - 3 * (form != "plain" and begin == 0)
    return found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"data.fim.form": "context"},
        {"data.packing": "concat"},
        {"data.seq_len": 16},
        {"data.window": 12},
    ],
)
def test_fim_switched_off_on_resume(config, values):
    """Issue R item 9: ValueError, exit 70, though docs/stream.md allows it; whatever stands open is read to its end."""
    share, on = Share(4, 2), fim_config(config, **values)
    for stop in (1, 2, 5):
        reader = reading.open_reader(on, share, 1)
        begun = tokens_read(reader, range(1, stop + 1))
        state = json.loads(json.dumps(reader.state_after(stop)))  # as a checkpoint keeps it
        off = replace(on, OFF)
        resumed = reading.open_reader(off, share, stop + 1, state)
        assert resumed.batches(stop + 1)
        rest = tokens_read(resumed, range(stop + 1, stop + 16))
        last = resumed.state_after(stop + 15)
        kept = reading.open_reader(off, share, stop + 16, last)
        assert not any("forms" in row for row in kept.consumed(stop + 16))
        sizes = {}
        for key in begun.keys() & rest.keys():
            sizes[key] = begun[key] + rest[key]
        lengths = {
            prefix: np.diff(IndexedDataset(prefix).document_starts(np.arange(81)))
            for prefix in config.data.sources
        }
        wrong = {key: size for key, size in sizes.items() if size > lengths[key[0]][key[2]]}
        assert not wrong, wrong


def test_fim_switched_off_needs_its_tokenizer_only_while_documents_are_open(config):
    share, on = Share(4, 2), fim_config(config)
    reader = reading.open_reader(on, share, 1)
    reader.consumed(1)
    state = reader.state_after(1)
    for name in config.data.sources:
        Path(f"{name}.meta.json").unlink()
    off = replace(on, OFF)
    with pytest.raises(
        UsageError, match="Going on amid rearranged documents needs the text .*data.tokenizer"
    ):
        reading.open_reader(off, share, 2, state)
    assert reading.open_reader(off, share, 1).batches(1)  # a new run has no such documents
    assert reading.open_reader(replace(off, {"data.tokenizer": "bytes"}), share, 2, state).batches(
        2
    )


def test_a_source_that_rested_comes_back_without_fim(config):
    a, b = config.data.sources
    share, on = Share(4, 2), fim_config(config)
    reader = reading.open_reader(on, share, 1)
    reader.consumed(1)
    alone = replace(on, {"data.sources": {a: 1.0}})
    reader = reading.open_reader(alone, share, 2, reader.state_after(1))
    reader.consumed(2)
    both = replace(on, OFF)
    again = reading.open_reader(both, share, 3, reader.state_after(2))
    assert {row["source"] for step in (3, 4, 5) for row in again.consumed(step)} == {a, b}
    assert again.batches(5)
