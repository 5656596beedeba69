"""Training on from folders with experts, by real commands: the same first losses at any layout, and back again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.convert.hf_config import agree, read_config
from megallm.convert.tokenizer_files import write_byte_tokenizer
from megallm.convert.weights import HfReader
from megallm.models.config import ModelConfig
from tests.convert.test_convert_moe_layouts import CASES, with_further_tokens
from tests.convert.tiny import make
from tests.system.commands import losses_of, make_corpus, megallm, write_config

LAYOUTS = {"one": [], "many": ["layout.pp=2", "layout.tp=2", "layout.ep=2"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus of bytes, and a folder of a random DeepSeek with a module of further tokens."""
    folder = tmp_path_factory.mktemp("experts")
    prefix = make_corpus(folder)
    wanted = dataclasses.replace(CASES["deepseek_v3"], arguments=CASES["deepseek_v3"].arguments | {"vocab_size": 257})
    write_byte_tokenizer(with_further_tokens(make(folder / "hf", wanted)))
    write_config(folder / "train.yaml", prefix, optim={"lr": 0.001})
    text = (folder / "train.yaml").read_text()
    section = text[text.index("model:") : text.index("optim:")]
    (folder / "train.yaml").write_text(text.replace(section, 'model: {"hf": "hf"}\n'))
    return folder


def train(place: Path, run: str, *words: str) -> list[tuple[int, float]]:
    done = megallm("pretrain", "train.yaml", f"run.dir={run}", "train.stop_at=3", *words, cwd=place)
    assert done.code == 0, done.err
    assert "starting from the weights of hf" in done.out
    return losses_of(place / run)


def test_training_goes_on_from_a_deepseek_at_any_layout(place):
    losses = {name: train(place, name, *words) for name, words in LAYOUTS.items()}
    for (step, one), (_, other) in zip(losses["one"], losses["many"], strict=True):
        assert other == pytest.approx(one, rel=2e-5), step
    report = [json.loads(line) for line in (place / "one/metrics.jsonl").read_text().splitlines()]
    assert any("mtp" in key for row in report for key in row), "the loss of further tokens is reported"
    done = megallm("convert", "--to", "hf", "--input", "many", "--output", "back", "--verify", cwd=place)
    assert done.code == 0, done.err
    assert json.loads(done.out)["max_rel_error"] <= 1e-5
    with HfReader(place / "back") as reader:
        assert reader.model.mtp.depth == 1 and not reader.notes
        bias = torch.empty(4)
        reader.read_into("mtp.0.block.moe.router.bias", (0,), bias)
        with HfReader(place / "hf") as before:
            old = torch.empty(4)
            before.read_into("mtp.0.block.moe.router.bias", (0,), old)
    moved = (bias - old).abs()
    assert moved.max() <= 3 * 0.001 * 1.01 and moved.max() > 0, "three steps of the bias, each of bias_rate"


def test_further_tokens_may_be_left_aside(place):
    found = read_config(place / "hf").model
    wanted = agree(ModelConfig(hf="hf", mtp={"depth": 0}), found, "c")
    assert found.mtp.depth == 1 and wanted.mtp.depth == 0
    with HfReader(place / "hf", wanted) as reader:
        assert not any(name.startswith("mtp.") for name in reader.names())
        assert "left aside" in " ".join(reader.notes)
    with pytest.raises(UsageError, match="model.mtp.depth is 2"):
        agree(ModelConfig(hf="hf", mtp={"depth": 2}), found, "c")


def test_a_head_of_classes_leaves_further_tokens_aside(place):
    found = read_config(place / "hf").model
    wanted = agree(ModelConfig(hf="hf", head="classification", num_labels=3), found, "c")
    with HfReader(place / "hf", wanted) as reader:
        assert "embedding.weight" in reader.names() and not any(
            name.startswith(("mtp.", "head.")) for name in reader.names()
        )


def test_a_folder_without_them_trains_without_them(tmp_path):
    folder = make(tmp_path / "hf", CASES["deepseek_v3"])
    assert json.loads((folder / "config.json").read_text()).get("num_nextn_predict_layers") != 0
    assert read_config(folder).model.mtp.depth == 0
