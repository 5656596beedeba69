"""A reward for what is new: random network distillation on pooled hidden states."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training import grpo
from megallm.training.novelty import PREFIX, Moments, Novelty
from megallm.training.rl_config import NoveltyConfig
from tests.engine.tiny import engine_of
from tests.ranks import run_ranks
from tests.training.rl import MODEL, OPTIM, Functions, trainer_of
from tests.training.test_grpo_run import answers_of, made, rows_of

DRAW = np.random.default_rng(0)
CONFIG = NoveltyConfig(coefficient=1.0, width=32, outputs=8, lr=3e-3)


def test_moments_are_those_of_everything_seen():
    rows, moments = torch.from_numpy(DRAW.normal(3, 2, (50, 4))), Moments(4)
    for part in rows.split([1, 20, 29]):
        moments.see(part)
    assert torch.allclose(moments.mean, rows.mean(0)) and torch.allclose(moments.deviation, rows.std(0, correction=0))


def test_what_was_seen_is_no_longer_new():
    novelty, known = Novelty(CONFIG, 16, 3), DRAW.normal(size=(64, 16))
    errors = []
    for _ in range(60):
        novelty(known)
        errors.append(novelty.error)
    assert errors[-1] < errors[1] / 5
    rewards = novelty(np.concatenate([known[:8], DRAW.normal(size=(8, 16))]))
    assert rewards[8:].mean() > 2 * rewards[:8].mean() > 0


def test_one_update_is_adams():
    novelty, x = Novelty(dataclasses.replace(CONFIG, updates=3), 16, 3), DRAW.normal(size=(9, 16))
    twin = Novelty(dataclasses.replace(CONFIG, updates=3), 16, 3)
    novelty(x)
    inputs = torch.from_numpy((x - x.mean(0)) / x.std(0)).clamp(-5, 5)
    weights = twin.predictor.weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=CONFIG.lr)
    for _ in range(3):
        optimizer.zero_grad()
        (twin.predictor(inputs, weights) - twin.target(inputs, twin.target.weights)).square().mean().backward()
        optimizer.step()
    assert torch.allclose(novelty.predictor.weights, weights, rtol=1e-12)
    assert torch.equal(novelty.target.weights, twin.target.weights), "the target stays"


def test_its_state_comes_back_bit_for_bit():
    first, second = Novelty(CONFIG, 16, 3), Novelty(CONFIG, 16, 3)
    first(DRAW.normal(size=(9, 16)))
    parts = {part.name: part.tensor.clone() for part in first.state()}
    assert all(name.startswith(PREFIX) for name in parts)
    second.load(SimpleNamespace(names=lambda: list(parts), read=parts.__getitem__))
    x = DRAW.normal(size=(7, 16))
    assert first(x).tolist() == second(x).tolist() and first.error == second.error
    fresh = Novelty(CONFIG, 16, 3)
    fresh.load(SimpleNamespace(names=list))  # a checkpoint without it
    assert fresh(x).tolist() != second(x).tolist()


NEW = {"rl.novelty.coefficient": 0.5, "rl.novelty.width": 16, "train.global_batch": 8}


def train(layout: Layout, zero: int = 0, packing: bool = False, sharing: str = "off") -> list[list[float]]:
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = engine_of(mesh, model=MODEL, optim=OPTIM, zero=zero, sp=layout.tp > 1)
    trainer = trainer_of(mesh, engine, Functions, **NEW, **{"rl.packing": packing, "rl.shared_prefix": sharing})
    names = ("novelty/reward", "novelty/error")
    reports = [trainer.step(step) for step in (1, 2)]
    return [[r.losses["train/loss"], r.stats.grad_norm, *(r.metrics[name] for name in names)] for r in reports]


@pytest.mark.parametrize(
    ("layout", "zero", "packing", "sharing"),
    [(Layout(dp=2), 3, False, "off"), (Layout(tp=2, pp=2), 0, False, "on"), (Layout(cp=2), 0, True, "off"),
     (Layout(), 0, True, "on")],
)  # fmt: skip
def test_the_same_rewards_at_every_layout(layout, zero, packing, sharing):
    alone = train(Layout())
    plain = trainer_of(**{"train.global_batch": 8}).step(1)
    assert alone[0][2:] != alone[1][2:] and alone[0][1] != plain.stats.grad_norm
    for numbers in run_ranks(layout.world, train, layout, zero, packing, sharing):
        np.testing.assert_allclose(numbers, alone, rtol=1e-8, atol=1e-12)


def test_pooled_states_are_means_of_hidden_states_over_the_answer():
    trainer = trainer_of(**NEW, **{"rl.shared_prefix": "off"})
    answers = trainer.rollouts.draw(1, 1, trainer.feeds.prompts, lambda name: torch.no_grad()).answers[:5]
    found = trainer.rows.pooled(answers)
    stage, seen = trainer.engine.model.stages[0], []
    hook = stage.final_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    trainer.rows.scores(answers, trainer.engine.log_probs)
    hook.remove()
    states = torch.cat(seen)
    for row, (answer, ours) in enumerate(zip(answers, found, strict=True)):
        begin = len(answer.prompt) - 1
        theirs = states[row, begin : begin + len(answer.tokens)].mean(0)
        assert np.allclose(ours, theirs.detach().numpy(), rtol=1e-12)


def test_a_run_goes_on_with_what_it_knew(tmp_path):
    given = {"rl.novelty.coefficient": 0.3, "train.steps": 4, "rl.updates": 1, "rl.replay.prompts": 0}
    given |= {"rl.replay.staleness": 0}
    for name, stop in (("whole", 4), ("parts", 2), ("parts", 4)):
        (tmp_path / name).mkdir(exist_ok=True)
        grpo.run(made(tmp_path / name, **given, **{"train.stop_at": stop}), Mesh.single(), "auto")
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    ours = [{key: x for key, x in row.items() if key in other} for row, other in zip(parts, whole, strict=True)]
    assert ours == whole and answers_of(tmp_path / "parts") == answers_of(tmp_path / "whole")
    assert {"novelty/reward", "novelty/error"} <= whole[0].keys()
