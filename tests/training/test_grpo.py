"""GRPO and its kin: the same run at every layout, what must hold in it, and that it learns."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any, get_args

import numpy as np
import pytest

from megallm.base.errors import InternalError, RewardError
from megallm.losses.policy import ALGORITHMS
from megallm.models.sections import MoeConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training.advantages import ESTIMATORS
from megallm.training.responses import Response, ResponseRows
from megallm.training.rl_config import Algorithm, Estimator
from megallm.training.rollout import Experience
from tests.engine.tiny import engine_of
from tests.ranks import run_ranks
from tests.training.rl import MODEL, OPTIM, Functions, learn, trainer_of

MOE = MoeConfig(num_experts=4, ffn_hidden_size=14, shared_ffn_hidden_size=10)
# Two updates a step, a reference, and unequal lengths; at dp = 2 nothing divides evenly.
SOME = {"rl.updates": 2, "train.global_batch": 6, "train.micro_batch": 3, "rl.kl.loss": 0.1,
        "rl.entropy_coef": 0.01, "rl.algorithm": "dapo"}  # fmt: skip


def train(layout: Layout, moe: bool, zero: int, options: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """On a rank: the answers of each step, their rewards and the losses."""
    mesh = Mesh.start(layout)
    model = dataclasses.replace(MODEL, moe=MOE).resolve() if moe else MODEL
    engines = [
        engine_of(mesh, model=model, optim=OPTIM, zero=zero, sp=options.get("sp", False)) for _ in range(2)
    ]
    kept: list = []
    trainer = trainer_of(mesh, engines[0], Functions, lambda: nullcontext(engines[1]), **{
        key: value for key, value in options.items() if key != "sp"
    })  # fmt: skip
    trainer.feeds = dataclasses.replace(
        trainer.feeds, tell=lambda step, drawn, rewards: kept.append((drawn.texts, rewards))
    )
    reports = [trainer.step(step) for step in range(1, steps + 1)]
    numbers = [[each.losses["train/loss"], each.stats.grad_norm, each.metrics["kl"]] for each in reports]
    return {"said": kept, "numbers": numbers, "held_out": trainer.evaluate()}


LAYOUTS = {
    "tp2 pp2": (Layout(tp=2, pp=2), False, 1, {"sp": True}),
    "dp2 zero3": (Layout(dp=2), False, 3, {}),
    "dp2 packed": (Layout(dp=2), False, 0, {"rl.packing": True}),
    "cp2 tp2": (Layout(cp=2, tp=2), False, 0, {}),
    "ep2": (Layout(dp=2, ep=2), True, 0, {}),
}


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict[str, Any]]:
    return {moe: train(Layout(), moe, 0, SOME) for moe in (False, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_run_at_every_layout(alone, name):
    layout, moe, zero, more = LAYOUTS[name]
    results = run_ranks(layout.world, train, layout, moe, zero, SOME | more)
    for result in results:
        assert result["said"] == alone[moe]["said"], "the same tokens and rewards"
        np.testing.assert_allclose(result["numbers"], alone[moe]["numbers"], rtol=1e-9, atol=1e-12)
        assert result["held_out"] == alone[moe]["held_out"]
    texts = [text for step, _ in alone[moe]["said"] for text in step]
    assert len(set(texts)) > 5 and len({len(text) for text in texts}) > 1
    first, second = alone[moe]["numbers"]
    assert first != second


def test_the_tables_name_what_the_losses_have():
    assert {*get_args(Algorithm)} == {*ALGORITHMS}
    assert {*get_args(Estimator)} == {*ESTIMATORS}


@pytest.mark.parametrize("algorithm", sorted({*ALGORITHMS} - {"ppo"}))
def test_each_algorithm_makes_a_step_of_two_updates(algorithm):
    trainer = trainer_of(**{"rl.algorithm": algorithm, "rl.updates": 2, "train.global_batch": 8})
    report = trainer.step(1)
    assert report.stats.grad_norm > 0 and report.metrics["ratio/mean"] == pytest.approx(1, abs=0.2)
    assert trainer.engine.counters()["updates"] == 2


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_each_estimator_gives_advantages(estimator):
    assert trainer_of(**{"rl.advantage": estimator}).step(1).stats.grad_norm > 0


def test_it_learns():
    trainer = trainer_of(**{
        "sampling.group": 8, "train.global_batch": 64, "train.micro_batch": 64,
        "train.precision": "fp32", "eval.batches": 3, "train.steps": 25, "rl.algorithm": "dapo",
    })  # fmt: skip
    learn(trainer.engine, 12)
    before = trainer.evaluate()
    rewards = [trainer.step(step).metrics["reward"] for step in range(1, 26)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    assert trainer.evaluate()["val/reward"] > before["val/reward"]


# What must hold


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_update_finds_the_policy_that_sampled(precision):
    frozen = engine_of(model=MODEL, optim=OPTIM, precision=precision)
    trainer = trainer_of(reference=lambda: nullcontext(frozen), **{
        "train.precision": precision, "rl.kl.loss": 0.1, "train.global_batch": 16, "sampling.temperature": 0.7
    })  # fmt: skip
    figures = trainer.step(1).metrics
    limit = 1e-4 if precision == "fp32" else 0.05
    assert abs(figures["ratio/mean"] - 1) < limit and abs(figures["kl"]) < limit
    if precision == "fp32":
        assert figures["off_policy"] == figures["clip_ratio/region_mean"] == 0


def test_stale_answers_stop_the_run():
    axes = Mesh.single().axes
    broken = {name: dataclasses.replace(axis, broken=frozenset({"rollout.stale"})) for name, axis in axes.items()}
    mesh = Mesh(Layout(), 0, Mesh.single().device, broken)
    trainer = trainer_of(mesh)
    trainer.step(1)
    with pytest.raises(InternalError, match="Step 2: In the first update of a rollout the mean ratio is"):
        trainer.step(2)
    assert InternalError.exit_code == 70


def test_another_temperature_stops_the_run():
    trainer = trainer_of()
    trainer.loss = dataclasses.replace(trainer.loss, temperature=0.9)
    with pytest.raises(InternalError, match="have another log-prob than in the rollout"):
        trainer.step(1)
    trainer = trainer_of(**{"rl.recompute": True})
    trainer.config = dataclasses.replace(
        trainer.config, sampling=dataclasses.replace(trainer.config.sampling, temperature=0.9)
    )
    with pytest.raises(InternalError, match="The trainer's log-probs of new answers differ"):
        trainer.step(1)


def test_a_reference_with_other_weights_stops_the_run():
    other = engine_of(model=MODEL, optim=OPTIM, seed=6)
    trainer = trainer_of(reference=lambda: nullcontext(other), **{"rl.kl.loss": 0.1})
    with pytest.raises(InternalError, match="the KL divergence to a reference with the same weights is"):
        trainer.step(1)


# Rewards


def rewarding(*made: Any):
    class Said(Functions):
        names, weights = ["odd"], [1.0]

        def __call__(self, samples, step=0):
            return [[each] for each in (*made, *[0.0] * (len(samples) - len(made)))]

    return Said


def test_answers_without_a_reward_count_in_no_mean():
    figures = trainer_of(functions=rewarding(*[None] * 8, 1.0)).step(1).metrics
    assert figures["reward"] == pytest.approx(1 / 8)
    assert trainer_of(functions=rewarding(*[None] * 16)).step(1).metrics["reward"] is None


def broken_on_one_rank(layout: Layout) -> str:
    class Raises(Functions):
        def __call__(self, samples, step=0):
            raise RewardError("no reward today")

    with pytest.raises(RewardError, match="no reward today") as found:
        trainer_of(Mesh.start(layout), functions=Raises).step(1)
    return str(found.value)


def test_an_error_of_the_rank_that_calls_reaches_all():
    assert len(set(run_ranks(2, broken_on_one_rank, Layout(dp=2)))) == 1


def test_metrics_of_several_draws_are_means_over_their_answers():
    draws = [Experience([None] * n, np.zeros((n, 1)), [{}] * n, [""] * n, [{}] * n, {"turns": x, str(n): 1.0})
             for n, x in ((1, 4.0), (3, 2.0))]  # fmt: skip
    assert draws[0].join(draws[1]).metrics == {"turns": 2.5, "1": 1.0, "3": 1.0}


def test_groups_without_a_difference_are_replaced():
    options = {"sampling.resample": 3, "eval.batches": 0, "train.global_batch": 8}
    trainer = trainer_of(**options)
    trainer.rollouts.scorer.weights[:] = [1.0, 0.0]
    learn(trainer.engine, 12)
    kept: list = []
    trainer.feeds = dataclasses.replace(
        trainer.feeds, tell=lambda step, drawn, rewards: kept.append((drawn.answers, rewards))
    )
    report = trainer.step(1)
    answers, rewards = kept[0]
    assert report.metrics["rl/draws"] > 1 and report.data["draws"] == report.metrics["rl/draws"]
    groups = {answer.group for answer in answers}
    assert 0 < len(groups) <= 2
    for group in groups:
        assert len({r for a, r in zip(answers, rewards, strict=True) if a.group == group}) > 1
    ids = [answer.id for answer in answers]
    assert len(set(ids)) == len(ids)


def test_long_answers_cost_and_truncated_ones_may_be_left_out():
    plain = trainer_of().step(1)
    costly = trainer_of(**{"rl.overlong_cache": 3}).step(1)
    assert costly.metrics["reward"] < plain.metrics["reward"]
    assert costly.metrics["rewards/right/mean"] == plain.metrics["rewards/right/mean"]
    left = trainer_of(**{"rl.mask_truncated": True, "rl.algorithm": "bnpo"}).step(1)
    cut = plain.metrics["completions/clipped_ratio"]
    assert 0 < left.stats.counts["entropy"] < plain.stats.counts["entropy"] and cut > 0


def test_kl_in_the_reward_is_steered():
    frozen = engine_of(model=MODEL, optim=OPTIM)
    options = {"rl.kl.reward": 0.05, "rl.kl.target": 0.001, "rl.kl.horizon": 160}
    trainer = trainer_of(reference=lambda: nullcontext(frozen), **options)
    first, second = trainer.step(1), trainer.step(2)
    assert first.metrics["rl/kl"] == pytest.approx(0, abs=1e-12) and second.metrics["rl/kl"] > 0
    assert first.data["kl_coefficient"] == pytest.approx(0.05 * 0.98)
    assert second.data["kl_coefficient"] > first.data["kl_coefficient"]
    assert trainer_of(ledger=second.data, **options).coefficient == second.data["kl_coefficient"]


# Old answers


def test_old_answers_are_weighed_and_bounded_in_age():
    options = {"rl.replay.staleness": 2, "rl.replay.prompts": 2, "optim.lr": 0.05}
    trainer = trainer_of(**options)
    seen: list[list[Response]] = []
    layer, batches = trainer.rows, []

    @dataclasses.dataclass(frozen=True)
    class Seen(ResponseRows):
        def batches(self, answers):
            seen.append(list(answers))
            batches.append(super().batches(answers))
            return batches[-1]

    trainer.rows = Seen(**vars(layer))
    reports = [trainer.step(step) for step in range(1, 5)]
    assert [len(each) for each in seen] == [16, 24, 24, 24]
    for step, answers in enumerate(seen, start=1):
        old = [one for one in answers if one.step < step]
        assert all(step - one.step <= 2 for one in old) and len(old) in (0, 8)
    weights = batches[-1][-1]["importance_weights"][batches[-1][-1]["mask"]]
    assert float(weights.max()) <= 2.0 and float((weights - 1).abs().max()) > 1e-3
    assert reports[-1].metrics["ratio/mean"] == pytest.approx(1)
    assert {one.step for one in trainer.buffer.answers} == {3, 4}
    names = {part.name: part.tensor for part in trainer.state() if "rollout" in part.name}
    again = trainer_of(**options)
    again.buffer.load(Stored(names))
    assert [vars(one) | {"old": 0, "reference": 0} for one in again.buffer.answers] == [
        vars(one) | {"old": 0, "reference": 0} for one in trainer.buffer.answers
    ]


class Stored:
    """What a checkpoint gives back."""

    def __init__(self, tensors) -> None:
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def read(self, name):
        return self.tensors[name]
