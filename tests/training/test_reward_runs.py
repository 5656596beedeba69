"""Reward models: every layout scores alike, transformers does too, and bad files are refused by their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megallm.base.errors import DataError, UsageError
from megallm.convert import convert
from megallm.convert.convert import ConvertRequest
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training.scoring import ScoreRequest, run
from tests.data.chat_cases import make_tokenizer
from tests.ranks import run_ranks
from tests.training.preference_cases import (
    MODEL,
    metrics,
    pairs,
    train,
    weights,
    write_rows,
    write_start,
)

SHAPE = {"vocab_size": 420}
CHAT = (
    "{% for m in messages %}{{ m.role[:1] ~ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained reward model whose tokenizer pads with its end of text, as many do."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("reward")
    start = write_start(folder / "start", replace(MODEL, **SHAPE))
    words = make_tokenizer(folder / "words", CHAT)
    source = write_rows(folder / "pairs.jsonl", pairs())
    values = {"data.tokenizer": words, "data.strings": "messages", "data.seq_len": 48}
    held_out = {"data.valid_sources": {source: None}, "eval.batches": 3}
    return folder, train("reward", folder / "run", start, source, **values, **held_out), start, source


def scores(model: Path, source: str, output: Path) -> list[dict]:
    run(ScoreRequest(str(model), source, str(output), strings="messages", batch=5), Mesh.single())
    return [json.loads(line) for line in output.read_text().splitlines()]


def on_ranks(model: str, source: str, output: str, layout: Layout) -> None:
    run(ScoreRequest(model, source, output, strings="messages", batch=2), Mesh.start(layout))


def test_metrics_under_their_names(place):
    _, model, _, _ = place
    last = metrics(model)[-1]
    of_scores = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    assert {f"train/{name}" for name in of_scores} <= last.keys() and "negated_min_reward" not in str(last)
    assert last["train/min_reward"] < last["train/mean_reward"] < last["train/max_reward"]
    assert 0 <= last["val/accuracy"] <= 1 and last["val/loss"] > 0


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(dp=2)], ids=str)
def test_every_layout_writes_the_same_rows_in_their_order(place, layout):
    folder, model, _, source = place
    output = folder / f"{layout}.jsonl"
    run_ranks(layout.world, on_ranks, str(model), source, str(output), layout)
    ours = [json.loads(line) for line in output.read_text().splitlines()]
    for mine, theirs, row in zip(ours, scores(model, source, folder / "one.jsonl"), pairs(), strict=True):
        assert mine == row | {"rewards": pytest.approx(theirs["rewards"], rel=1e-9)}
    assert len({score for row in ours for score in row["rewards"]}) > 20


def test_transformers_scores_the_exported_folder_alike(place):
    """Several texts at once, padded on either side by the folder's own tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, model, _, source = place
    hf = folder / "hf"
    done = convert.run(ConvertRequest("hf", str(model), str(hf), "fp32", verify=True))
    assert done["max_rel_error"] <= 1e-5
    judge, words = AutoModelForSequenceClassification.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    assert judge.score.weight.shape == (1, 16) and words.eos_token == "<|endoftext|>" != words.pad_token
    assert judge.config.pad_token_id == words.pad_token_id
    texts = [f"u{row['prompt']}<|endoftext|>a{row['chosen']}<|endoftext|>" for row in pairs()]
    wanted = [row["rewards"][0] for row in scores(model, source, folder / "wanted.jsonl")]
    for side in ("left", "right"):
        batch = words(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            found = judge(**batch).logits[:, 0]
        assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    again = scores(hf, source, folder / "again.jsonl")
    assert [row["rewards"][0] for row in again] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_all_ranked_answers_of_a_prompt(place):
    folder, _, start, _ = place
    rows = [
        {"prompt": f"{i}=", "completions": [f"{i}!", "?", f"{i + 1}"], "scores": [1.0, 0.2 * i, 0.5]} for i in range(5)
    ]
    source = write_rows(folder / "several.jsonl", rows)
    values = {"data.tokenizer": str(folder / "words"), "data.seq_len": 48, "reward.ranked": True}
    values |= {"train.global_batch": 2, "train.micro_batch": 1}
    padded = metrics(train("reward", folder / "ranked", start, source, **values))
    assert 0 < padded[0]["train/accuracy"] <= 3 and padded[0]["train/loss"] == pytest.approx(0.7, abs=0.4)
    bare = write_rows(folder / "bare.jsonl", [{k: v for k, v in row.items() if k != "scores"} for row in rows])
    assert [len(row["rewards"]) for row in scores(folder / "ranked", bare, folder / "best.jsonl")] == [3] * 5


def test_adapters_leave_the_base_and_train_the_head(place):
    folder, _, start, source = place
    values = {"data.tokenizer": str(folder / "words"), "data.strings": "messages", "data.seq_len": 48}
    run_folder = train("reward", folder / "lora", start, source, **values, **{"peft.method": "lora", "peft.dim": 2})
    kept = weights(run_folder, 3)
    assert "head.weight" in kept and "embedding.weight" not in kept and any(".adapter." in name for name in kept)
    last = scores(run_folder, source, folder / "lora.jsonl")
    assert min(min(row["rewards"]) for row in last) <= metrics(run_folder)[-1]["train/min_reward"] + 1e-9


def test_a_model_without_a_score_and_bad_rows_are_refused(place):
    folder, model, start, _ = place
    good = {"prompt": "a", "completion": "b"}
    bad = write_rows(folder / "bad.jsonl", [good, {"prompt": "a", "completion": " "}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: completion is empty"):
        scores(model, bad, folder / "never.jsonl")
    long = write_rows(folder / "long.jsonl", [good, good | {"completion": "x " * 600}])
    with pytest.raises(DataError, match=r"long\.jsonl:2: the row has \d+ tokens, more than"):
        scores(model, long, folder / "never.jsonl")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the row has a prompt and no answer"):
        scores(model, prompts, folder / "never.jsonl")
    with pytest.raises(UsageError, match="has the head lm, which gives no score; `megallm reward` trains one"):
        scores(Path(start), bad, folder / "never.jsonl")
    assert not (folder / "never.jsonl").exists()
