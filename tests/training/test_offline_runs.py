"""Whole runs of `megallm offline`: the same at every layout and after a stop; which rows, with which weights, are
trained."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallm.base.errors import DataError, UsageError
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.prepare import prepare
from megallm.data.chat.scored import advantages, keep_best
from megallm.engine.engine import Engine
from megallm.losses.offline import at_last
from megallm.parallel.mesh import Mesh
from megallm.training import offline
from megallm.training.offline import OfflineRun
from megallm.training.offline_config import OfflineConfig
from tests.ranks import run_ranks
from tests.training.preference_cases import (
    config_of,
    metrics,
    train,
    weights,
    worst,
    write_rows,
    write_start,
)

CASES: dict[str, dict[str, Any]] = {
    "awr": {"offline.algorithm": "awr"},
    "value": {"offline.advantage": "value", "model.critic": "value"},
    "ilql": {"offline.algorithm": "ilql", "model.critic": "q", "offline.polyak": 0.3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"layout.tp": 2, "layout.pp": 2, "layout.sp": True},
    "dp2-zero3": {"layout.dp": 2, "zero.stage": 3, "train.micro_batch": 1},
}


def scored(count: int = 12) -> list[dict[str, Any]]:
    """Three answers to each of four prompts, the later ones better."""
    return [
        {"prompt": f"{i % 4}+1=", "completion": "x" * (1 + i % 3) + str(i), "reward": i // 4 + 0.25 * (i % 4)}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, str, str]:
    """A folder for runs, a model to start from, and a file of answers with rewards."""
    folder = tmp_path_factory.mktemp("offline")
    return folder, write_start(folder / "start"), write_rows(folder / "rows.jsonl", scored())


@pytest.fixture(scope="module")
def whole(place):
    """name -> the run of one process, made once."""
    folder, start, source = place
    return {
        name: train("offline", folder / name, start, source, **values) for name, values in CASES.items()
    }


def all_of_them(folder: Path, start: str, source: str, layout: str, values: dict[str, Any]) -> None:
    """Every case at one layout, on this rank."""
    for name, own in CASES.items():
        train("offline", folder / f"{name}-{layout}", start, source, **own | values)


def same(ours: Path, theirs: Path, within: float = 1e-9) -> None:
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, rel=within, abs=within)
    assert worst(weights(ours, 3), weights(theirs, 3)) < within


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, whole, layout):
    values = LAYOUTS[layout]
    world = math.prod(v for key, v in values.items() if key in ("layout.tp", "layout.pp", "layout.dp"))
    run_ranks(world, all_of_them, *place, layout, values)
    for name in CASES:
        same(place[0] / f"{name}-{layout}", whole[name])


def test_packed_equals_padded(place):
    folder, start, source = place
    one = {"train.global_batch": 1, "train.micro_batch": 1, "train.steps": 2, "data.seq_len": 128, "data.packing": True}
    all_at_once = {"train.global_batch": 12, "train.micro_batch": 12, "train.steps": 2}
    for name in ("value", "ilql"):
        packed = train("offline", folder / f"{name}-packed", start, source, **CASES[name] | one)
        padded = train("offline", folder / f"{name}-padded", start, source, **CASES[name] | all_at_once)
        assert worst(weights(packed, 2), weights(padded, 2)) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_for_bit(place, whole, name):
    """Also the target's Q, which the checkpoint holds."""
    folder, start, source = place
    for stop in (2, None):
        run = train("offline", folder / f"{name}-stopped", start, source, **CASES[name], **{"train.stop_at": stop})
    ours, theirs = weights(run, 3), weights(whole[name], 3)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], x) for key, x in theirs.items())
    kept = {key for key in ours if key.startswith("optim.reference.")}
    assert kept == {f"optim.reference.critic.{one}" for one in ("q1", "q2") if name == "ilql"}
    assert metrics(run) == metrics(whole[name])


def test_the_target_follows_by_its_share(place, whole, monkeypatch):
    """After three steps it is between the start and Q; a share of 1 makes them equal; a target that is not loaded is
    noticed on resume."""
    folder, start, source = place
    found = weights(whole["ilql"], 3)
    target, now = (found[f"{prefix}critic.q2"] for prefix in ("optim.reference.", ""))
    assert not torch.equal(target, now)
    equal = weights(train("offline", folder / "share", start, source, **CASES["ilql"] | {"offline.polyak": 1.0}), 3)
    assert torch.equal(equal["optim.reference.critic.q2"], equal["critic.q2"])
    monkeypatch.setattr(offline.WeightsCopy, "load", lambda self, step: None)
    for stop in (2, None):
        run = train("offline", folder / "lost", start, source, **CASES["ilql"], **{"train.stop_at": stop})
    assert not torch.equal(weights(run, 3)["optim.reference.critic.q2"], target)


# Which rows, and how they count


def prepared(folder: Path, source: str, **changes: Any):
    config = ChatDataConfig(sources={source: None}, tokenizer="bytes", seq_len=128, seed=0, **changes)
    return prepare(config, "scored", folder / "cache")


def test_advantages_are_rewards_less_the_mean(tmp_path):
    rows = prepared(tmp_path, write_rows(tmp_path / "rows.jsonl", scored()))
    rewards = np.array([row["reward"] for row in scored()])
    of_all = advantages(rows.sources, by_prompt=False)
    assert of_all == pytest.approx(rewards - rewards.mean())
    of_prompt = advantages(rows.sources, by_prompt=True)
    assert of_prompt == pytest.approx([-1.0] * 4 + [0.0] * 4 + [1.0] * 4)


def test_a_prompt_is_the_same_in_several_files(tmp_path):
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"prompt": "a", "completion": "b" * n, "reward": n}]) for n in (1, 3)]
    config = ChatDataConfig(sources=dict.fromkeys(files), tokenizer="bytes", seq_len=64, seed=0)
    assert advantages(prepare(config, "scored", tmp_path / "cache").sources, True) == pytest.approx([-1, 1])


def test_raft_keeps_the_best_of_each_prompt(place, tmp_path):
    rows = prepared(tmp_path, write_rows(tmp_path / "rows.jsonl", scored()))
    best = keep_best(rows, 1, None, tmp_path / "cache")
    (source,) = best.sources.values()
    assert [source.row(n).label for n in range(len(source))] == [2.0, 2.25, 2.5, 2.75]
    assert "kept 4 of 12 rows" in best.notes[-1]
    (source,) = keep_best(rows, 3, 2.3, tmp_path / "cache").sources.values()
    assert [source.row(n).label for n in range(len(source))] == [2.5, 2.75]
    with pytest.raises(DataError, match="no row has a reward of at least 9"):
        keep_best(rows, 1, 9, tmp_path / "cache")


def test_raft_is_sft_on_what_it_keeps(place):
    """The rows of the worse answers have no part in it."""
    folder, start, source = place
    made = train("offline", folder / "raft", start, source, **{"offline.algorithm": "raft"})
    kept = write_rows(folder / "kept.jsonl", scored()[8:])
    alone = train("offline", folder / "alone", start, kept, **{"offline.algorithm": "raft", "offline.keep": 9})
    ours, theirs = weights(made, 3), weights(alone, 3)
    assert worst(ours, theirs) < 1e-9  # four rows a step: all of them, in whatever order


def test_several_completions_are_as_many_rows(tmp_path):
    row = {"prompt": "1+1=", "completions": ["2", "3", "4"], "scores": [1, 0, 0.5]}
    (source,) = prepared(tmp_path, write_rows(tmp_path / "rows.jsonl", [row])).sources.values()
    assert [source.row(n).label for n in range(3)] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("edges", "condition", "said"),
    [
        ((0.5, 1.0), "<{bucket}> ", ["<0> ", "<1> ", "<2> ", "<2> "]),
        ((), "r={reward}:", ["r=0:", "r=0.5:", "r=1:", "r=7:"]),
    ],
)
def test_a_prompt_is_told_the_reward(tmp_path, edges, condition, said):
    rows = [{"prompt": "p", "completion": "c", "reward": reward} for reward in (0, 0.5, 1.0, "7")]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    files = [
        write_rows(tmp_path / "texts.jsonl", rows),
        write_rows(tmp_path / "talks.jsonl", [{"messages": talk, "reward": row["reward"]} for row in rows]),
    ]
    for name in files:
        made = prepared(tmp_path, name, condition=condition, return_edges=edges)
        (source,) = made.sources.values()
        texts = [made.words.decode(source.row(n).sequence.ids.tolist()) for n in range(4)]
        assert all(f"{told}p" in text for told, text in zip(said, texts, strict=True))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "reward": None}, ":2: the column reward is missing or null"),
        ({"prompt": "a", "completion": "b", "reward": "good"}, ":2: reward is 'good', want a number"),
        ({"prompt": "a", "completion": "b", "reward": float("nan")}, ":2: reward is 'nan', want a number"),
        ({"prompt": "a", "completion": "b", "reward": 10**400}, ":2: reward is '1000.*', want a number"),
        ({"prompt": "a", "completion": "b", "reward": 1e300}, r":2: reward is '1e\+300', want a number"),
        ({"prompt": "a", "completion": "", "reward": 1}, ":2: completion is empty"),
    ],
)
def test_bad_rows_end_with_their_line(tmp_path, row, words):
    name = write_rows(tmp_path / "rows.jsonl", [scored()[0], row])
    with pytest.raises(DataError, match=words):
        prepared(tmp_path, name)


def test_rows_without_rewards_are_refused(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"scored rows are needed: .*prompt-completion .*and reward"):
        prepared(tmp_path, name)
    same_reward = write_rows(tmp_path / "same.jsonl", [{"prompt": p, "completion": "b", "reward": 1} for p in "ab"])
    with pytest.raises(DataError, match="no prompt has two answers with different rewards"):
        advantages(prepared(tmp_path, same_reward).sources, by_prompt=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"offline.algorithm": "ilql"}, "model.critic is null; offline.algorithm ilql trains q"),
        ({"offline.advantage": "value"}, "offline.algorithm awr trains value"),
        ({"offline.keep": 2}, "offline.keep is 2, which offline.algorithm raft reads"),
        ({"offline.algorithm": "return"}, "give data.condition"),
        ({"data.condition": "{reward}"}, "offline.algorithm awr has no data.condition"),
        ({"offline.algorithm": "return", "data.condition": "x"}, r"neither \{bucket\} nor \{reward\}"),
        ({"offline.algorithm": "return", "data.condition": "{bucket}"}, r"return_edges and \{bucket\}"),
        ({"offline.algorithm": "return", "data.condition": "{bucket}", "data.return_edges": (1, 0)}, "do not ascend"),
        ({"offline.tau": 1.0, "offline.algorithm": "ilql", "model.critic": "q"}, "offline.tau"),
        ({"model.critic": "q", "model.head": "value"}, "stands beside model.head lm"),
    ],
)
def test_what_does_not_go_together_is_refused(place, values, words):
    with pytest.raises(UsageError, match=words):
        config_of("offline", place[0] / "bad", place[1], place[2], **values)


def test_the_reward_of_an_answer_stands_at_its_last_token():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1]]).bool()
    batch = {"mask": mask, "cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32), "reward": torch.tensor([2.0, 3.0])}
    assert at_last("reward", batch).tolist() == [[0, 0, 2, 0, 0, 0, 0, 3]]


def test_adapters_leave_values_trained(place):
    """LoRA freezes the base, and values beside its head are new."""
    folder, start, source = place
    lora = {"peft.method": "lora", "peft.dim": 2}
    found = weights(train("offline", folder / "lora", start, source, **CASES["ilql"] | lora), 3)
    assert {"critic.value", "critic.q1", "optim.reference.critic.q1"} <= found.keys()
    assert "layers.0.mlp.down.weight" not in found


def test_the_wanted_of_a_run_without_q(place):
    run = OfflineRun(config_of("offline", place[0] / "none", place[1], place[2]))
    assert run.loss().needs == ("log_prob",) and isinstance(run.config, OfflineConfig)
    engine = Engine.build(run.config.engine, Mesh.single())
    assert not any(name.startswith("critic") for name in engine.parameters.shapes)
    assert dataclasses.replace(run.config.model, critic="q").scores[-1] == "q2_log_prob"
