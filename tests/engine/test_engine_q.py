"""Values beside a language model's head: ILQL against a tabular solution, and decoding with Q at every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.engine.weights_copy import WeightsCopy
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.losses.offline import Ilql, perturbed_log_probs
from megallm.losses.terms import Terms
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import MODEL, batches, config_of, share
from tests.ranks import run_ranks

# Decoding

Q_MODEL = dataclasses.replace(MODEL, critic="q")
PROMPTS = [[3, 1, 4], [3, 1, 4], [5, 9, 2, 6], [7]]


class OnLabels(Ilql):
    """ILQL on rewards and targets that follow from the labels."""

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        made = (batch["labels"] % 7 / 7).to(outputs["value"].dtype)
        return super().__call__(outputs, batch | {"rewards": made, "target_q": made.flip(-1)})


def sampled(layout: Layout, options: dict[str, Any], q_beta: float, temperature: float = 1.0) -> list[tuple]:
    """Tokens and log-probabilities of some answers after one update."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = Engine.build(config_of(Q_MODEL, **options), mesh)
    engine.train_step(share(batches(4), mesh), OnLabels(), 0.05)
    requests = [Request.of(n, prompt, 5) for n, prompt in enumerate(PROMPTS)]
    with engine.generator(batch=4) as generator:
        mine = generator.generate(engine.mine(requests), Sampling(5, temperature, seed=3, q_beta=q_beta))
    return [tuple(one) for one in engine.all([[one.tokens, one.log_probs] for one in mine])]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(tp=2, pp=2), {"sp": True}),
        (Layout(tp=4), {}),
        (Layout(dp=2), {"zero": 3}),
        (Layout(cp=2), {}),
    ],
    ids=str,
)
def test_decoding_with_q_is_the_same_at_every_layout(layout, options):
    found = run_ranks(layout.world, sampled, layout, options, 2.0)[0]
    for (tokens, log_probs), (wanted, numbers) in zip(found, sampled(Layout(), {}, 2.0), strict=True):
        assert tokens == wanted
        assert log_probs == pytest.approx(numbers, abs=1e-9)


def test_q_changes_what_is_drawn_and_0_does_not():
    plain, none, much = (sampled(Layout(), {}, beta) for beta in (0.0, 0.0, 20.0))
    assert plain == none and plain != much


def test_it_draws_from_pi_exp_beta_q():
    """The first token's log-probability is that of the formula, with Q and V of every token asked for as labels."""
    engine = Engine.build(config_of(Q_MODEL), Mesh.single())
    vocab, prompt, beta = Q_MODEL.vocab_size, PROMPTS[0], 2.5
    asked = {
        "tokens": torch.tensor([prompt]).expand(vocab, -1).contiguous(),
        "labels": torch.arange(vocab)[:, None].expand(-1, len(prompt)).contiguous(),
        "positions": torch.arange(len(prompt)).expand(vocab, -1).contiguous(),
        "mask": torch.ones(vocab, len(prompt), dtype=torch.bool),
    }
    (found,) = engine.scores([asked], ("log_prob", "q1", "q2", "value"))
    last = {name: x[:, -1] for name, x in found.items()}
    wanted = perturbed_log_probs(last["log_prob"], torch.minimum(last["q1"], last["q2"]), last["value"][0], beta)
    with engine.generator(batch=1) as generator:
        (best,) = generator.generate([Request.of(0, prompt, 1)], Sampling(1, 0.0, q_beta=beta))
        (other,) = generator.generate([Request.of(0, prompt, 1)], Sampling(1, 0.0))
    assert best.tokens == [int(wanted.argmax())] and best.log_probs == pytest.approx([float(wanted.max())], abs=1e-9)
    assert other.log_probs == pytest.approx([float(last["log_prob"].max())], abs=1e-9)


def test_a_model_without_q_refuses_it():
    engine = Engine.build(config_of(MODEL), Mesh.single())
    words = "q_beta 1.* needs a model with Q heads"
    with engine.generator(batch=1) as generator, pytest.raises(UsageError, match=words):
        generator.generate([Request.of(0, [1], 1)], Sampling(1, 0.0, q_beta=1.0))


def test_a_language_models_step_leaves_values_alone():
    engine = Engine.build(config_of(Q_MODEL), Mesh.single())
    before = {one.name: one.tensor.clone() for one in engine.masters() if one.name.startswith("critic")}
    engine.train_step(batches(2), NextToken(), 0.0)
    assert len(before) == 3
    assert all(torch.equal(one.tensor, before[one.name]) for one in engine.masters() if one.name in before)


# A tabular solution: two tokens are chosen, 1, 2 or 3; the best answer, 3 then 2, is rare

START, GAMMA, TAU = 0, 0.9, 0.9
REWARD = torch.tensor([[0.4, 0.4, 0.4], [0.0, 0.6, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
COUNTS = torch.tensor([[8, 8, 8], [4, 4, 4], [2, 2, 2]])  # answers of the data: cloned, 1 comes first


def expectile(values: Tensor, weights: Tensor, tau: float) -> float:
    """The number v with sum of weights |tau - [x < v]| (x - v) = 0, by bisection."""
    low, high = float(values.min()), float(values.max())
    for _ in range(60):
        middle = (low + high) / 2
        away = values - middle
        slope = (weights * torch.where(away < 0, 1 - tau, tau) * away).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


def table() -> tuple[Tensor, Tensor]:
    """Q of the first token [3] and of the second [3, 3]."""
    after = torch.tensor([expectile(REWARD[a], COUNTS[a].double(), TAU) for a in range(3)])
    return GAMMA * after, REWARD


def data() -> dict[str, Tensor]:
    rows = [(a, b) for a in range(3) for b in range(3) for _ in range(int(COUNTS[a, b]))]
    first, second = torch.tensor(rows).T
    zero = torch.zeros(len(rows), dtype=torch.float64)
    return {
        "tokens": torch.stack((torch.full_like(first, START), first + 1), 1),
        "labels": torch.stack((first + 1, second + 1), 1),
        "positions": torch.arange(2).expand(len(rows), 2).contiguous(),
        "mask": torch.ones(len(rows), 2, dtype=torch.bool),
        "rewards": torch.stack((zero, REWARD[first, second]), 1),
    }


def learned(tau: float) -> tuple[Engine, dict[str, Tensor]]:
    """A model of the data, trained as `megallm offline` does, and its scores of the data."""
    sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 5, "critic": "q"}
    config = config_of(dataclasses.replace(MODEL, **sizes), OptimConfig(clip=1.0, weight_decay=0.0))
    engine = Engine.build(config, Mesh.single())
    target, loss, batch = WeightsCopy(engine, "critic.q"), Ilql(GAMMA, tau, 0.003, 1.0), data()
    for step in range(220):
        with target.in_use():
            (found,) = engine.scores([batch], ("q1", "q2"))
        target_q = torch.minimum(found["q1"], found["q2"])
        engine.train_step([batch | {"target_q": target_q}], loss, 0.01 * min(1.0, (220 - step) / 110))
        target.mix(0.2)
    (scores,) = engine.scores([batch], ("q1", "q2", "value"))
    return engine, scores


def worth(engine: Engine, q_beta: float) -> float:
    """The reward of the likeliest answer."""
    with engine.generator(batch=1) as generator:
        (one,) = generator.generate([Request.of(0, [START], 2)], Sampling(2, 0.0, q_beta=q_beta))
    first, second = (token - 1 for token in one.tokens)
    return float(REWARD[first, second]) if {first, second} <= {0, 1, 2} else 0.0


def test_ilql_is_the_tabular_solution_and_beats_behaviour_cloning():
    engine, scores = learned(TAU)
    batch, (of_first, of_second) = data(), table()
    first, second = batch["labels"].T - 1
    for twin in ("q1", "q2"):
        assert scores[twin][:, 0].sub(of_first[first]).abs().max() < 0.08
        assert scores[twin][:, 1].sub(of_second[first, second]).abs().max() < 0.08
    assert worth(engine, 0.0) == pytest.approx(0.4)  # what the data does most
    assert worth(engine, 30.0) == pytest.approx(1.0)


def test_an_expectile_of_the_middle_does_not_find_the_rare_answer():
    """The control: at tau 0.5 values are means, by which the first token of the best answer is not the best."""
    means = GAMMA * (REWARD * COUNTS).sum(1) / COUNTS.sum(1)
    assert int(means.argmax()) == 0 and int(table()[0].argmax()) == 2
    engine, _ = learned(0.5)
    assert worth(engine, 30.0) == pytest.approx(0.4)
