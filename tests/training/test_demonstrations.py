"""Demonstrations beside answers: CHORD and PPO-ptx in a trainer, at layouts, and over interruptions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallm.base.config import load
from megallm.base.errors import DataError, UsageError
from megallm.data.chat.rows import SftRow
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training import grpo, ppo
from megallm.training.demonstrations import Demonstrations, demonstration_of
from megallm.training.finetune import check_chat_files
from megallm.training.responses import ResponseRows
from megallm.training.rl_config import ExpertConfig, GrpoConfig, PpoConfig
from megallm.training.validate import check
from tests.engine.tiny import engine_of
from tests.ranks import run_ranks
from tests.training.rl import MODEL, OPTIM, Functions, Sums, Words, trainer_of
from tests.training.test_grpo_run import Killed, answers_of, made, rows_of


class Shown:
    """Right sums, of two lengths; the prompt is not trained."""

    def __init__(self, count: int) -> None:
        self.sums, self.count = Sums(count), count

    def examples(self, step: int) -> list[tuple[int, Any]]:
        rows = []
        for i, row in self.sums.examples(step):
            ids = np.concatenate([row.ids, Words().encode(row.columns["answer"] + ". "[: 1 + i % 2])])
            rows.append((i, SftRow(ids.astype(np.int32), np.arange(len(ids)) >= len(row.ids))))
        return rows

    def state_after(self, step: int) -> dict[str, Any]:
        return {"read": step * self.count}


def beside(trainer, **changes: Any) -> Demonstrations:
    """Demonstrations of the trainer, three an update."""
    config = ExpertConfig(sources={"x": None}, batch=3, **changes)
    made = Demonstrations(config, Shown(3), {})
    trainer.feeds = dataclasses.replace(trainer.feeds, demonstrations=made)
    return made


# Rows


def test_demonstrations_lie_beside_answers_padded_and_packed():
    trainer = trainer_of()
    answers = trainer.rollouts.draw(1, 1, Sums(2), lambda name: torch.no_grad()).answers
    row = SftRow(np.array([3, 10, 4, 11, 7, 12], np.int32), np.array([0, 0, 1, 0, 1, 1], bool))
    shown = demonstration_of(row)
    for packing in (False, True):
        rows = ResponseRows(trainer.engine, 3, 1, packing, torch.float64)
        micros = rows.batches([*answers, shown])
        assert [each["demonstration"].tolist()[: 3] for each in micros] == [
            [False] * 3, [False] * 3, [False, False, True]
        ]  # fmt: skip
        last = micros[-1]
        begin = int(last["cu_seqlens"][2]) if packing else 0
        place = (0, slice(begin, begin + 5)) if packing else (2, slice(0, 5))
        assert last["tokens"][place].tolist() == [3, 10, 4, 11, 7]
        assert last["labels"][place].tolist() == [10, 4, 11, 7, 12]
        assert last["mask"][place].tolist() == [False, True, False, True, True]
        assert not last["advantages"][place].any() and not last["old_log_probs"][place].any()
        assert "demonstration" not in rows.batches(answers)[0]


# Steps


def test_mu_divides_the_weight_and_one_gives_plain_fine_tuning():
    trainer = trainer_of(**{"train.global_batch": 8})
    shown = beside(trainer, mu_peak=1.0, mu_valley=0.5, mu_decay_steps=2)
    first = trainer.step(1)
    rows = trainer.rows.batches([demonstration_of(row) for _, row in Shown(3).examples(1)])
    twin = engine_of(Mesh.single(), model=MODEL, optim=OPTIM, precision="fp64")
    plain = twin.train_step(rows, NextToken(), 2e-3)
    assert first.losses["train/loss"] == pytest.approx(plain.loss, rel=1e-12)
    assert first.stats.grad_norm == pytest.approx(plain.grad_norm, rel=1e-9), "mu 1: nothing of the answers"
    assert first.metrics["sft_nll"] == pytest.approx(plain.loss, rel=1e-12)
    reports = [trainer.step(step) for step in (2, 3)]
    assert [each.metrics["rl/mu"] for each in reports] == pytest.approx([0.75, 0.5])
    assert shown.draws == 3 and trainer.ledger()["demonstrations"] == {"draws": 3, "stream": {"read": 9}}


def test_ptx_leaves_the_policy_whole():
    losses = {}
    for mix, mu in (("none", 0.0), ("ptx", 2.0), ("chord", 0.25)):
        trainer = trainer_of(**{"train.global_batch": 8, "rl.entropy_coef": 0.1})
        if mix != "none":
            beside(trainer, mix=mix, mu_peak=mu, mu_valley=None)
        losses[mix] = trainer.step(1)
    nll, policy = losses["ptx"].metrics["sft_nll"], losses["none"].losses["train/loss"]
    assert losses["ptx"].losses["train/loss"] == pytest.approx(policy + 2 * nll, rel=1e-12)
    assert losses["chord"].losses["train/loss"] == pytest.approx(0.75 * policy + 0.25 * nll, rel=1e-12)


def train(layout: Layout, zero: int = 0, packing: bool = False) -> list[list[float]]:
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = engine_of(mesh, model=MODEL, optim=OPTIM, zero=zero)
    trainer = trainer_of(mesh, engine, Functions, **{"rl.updates": 2, "train.global_batch": 8, "rl.packing": packing})
    beside(trainer, mu_peak=0.4, phi=True)
    reports = [trainer.step(step) for step in (1, 2)]
    return [
        [r.losses["train/loss"], r.stats.grad_norm, r.metrics["sft_nll"], r.metrics["entropy"]] for r in reports
    ]


@pytest.mark.parametrize(
    ("layout", "zero", "packing"),
    [(Layout(dp=2), 3, False), (Layout(tp=2, pp=2), 0, False), (Layout(cp=2), 0, True)],
)
def test_the_same_steps_at_every_layout(layout, zero, packing):
    alone = train(Layout())
    assert alone[0] != alone[1]
    for numbers in run_ranks(layout.world, train, layout, zero, packing):
        np.testing.assert_allclose(numbers, alone, rtol=1e-9)


# Runs

RUN = {"expert.batch": 2, "expert.mu_peak": 0.5, "rl.replay.prompts": 0, "rl.replay.staleness": 0}


def with_experts(folder: Path, **values: Any) -> GrpoConfig:
    shown = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(30, 37)]
    folder.mkdir(exist_ok=True)
    (folder / "expert.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    return made(folder, **(RUN | {"expert.sources": f"{{{folder}/expert.jsonl: 1}}"} | values))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chord")
    grpo.run(with_experts(folder), Mesh.single(), "never")
    return folder


def test_a_run_killed_between_its_updates_goes_on_with_the_same_demonstrations(quiet, tmp_path, monkeypatch):
    rows = rows_of(quiet)
    assert rows[-1]["sft_nll"] < rows[0]["sft_nll"] and rows[0]["rl/mu"] == 0.5
    calls, step = [], Engine.train_step

    def killed(engine, *args):
        calls.append(1)
        if len(calls) == 6:  # the second update of step 3
            raise Killed
        return step(engine, *args)

    config = with_experts(tmp_path)
    monkeypatch.setattr(Engine, "train_step", killed)
    with pytest.raises(Killed):
        grpo.run(config, Mesh.single(), "auto")
    grpo.run(config, Mesh.single(), "must")
    assert rows_of(tmp_path) == rows and answers_of(tmp_path) == answers_of(quiet)
    (tmp_path / "expert.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(UsageError, match="data.content of .*expert.jsonl"):
        grpo.run(config, Mesh.single(), "must")


def test_ppo_ptx_trains_the_policy_and_not_the_critic(tmp_path):
    words = {"rl.algorithm": "ppo", "train.steps": 2, "expert.mix": "ptx", "expert.mu_peak": 3}
    runs = {}
    for name in ("plain", "ptx"):
        config = with_experts(tmp_path / name)
        sources = "{}" if name == "plain" else f"{{{tmp_path / name}/expert.jsonl: 1}}"
        given = [f"{key}={x}" for key, x in (RUN | words | {"expert.sources": sources}).items()]
        config = check(load(PpoConfig, tmp_path / name / "grpo.yaml", given))
        ppo.run(config, Mesh.single(), "never")
        runs[name] = rows_of(tmp_path / name)
    plain, mixed = runs["plain"][0], runs["ptx"][0]
    assert mixed["loss/value_avg"] == pytest.approx(plain["loss/value_avg"], rel=1e-12)
    assert mixed["train/grad_norm"] != plain["train/grad_norm"] and "sft_nll" not in plain


def test_what_cannot_be_shown_is_said(tmp_path):
    with pytest.raises(UsageError, match="mu_peak 3 leaves 1 - mu"):
        with_experts(tmp_path, **{"expert.mu_peak": 3})
    config = with_experts(tmp_path)
    (tmp_path / "expert.jsonl").write_text('{"picture": 1}\n')
    with pytest.raises(DataError, match="expert.jsonl"):
        check_chat_files(config)
