"""Divergences of a student from a teacher, and offline RL on fixed answers, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from megallm.losses.distill import Distillation
from megallm.losses.offline import AdvantageWeighted, Ilql, next_counted, perturbed_log_probs
from megallm.ops.divergence import generalized_jsd, kl_divergence, with_tail
from tests.losses.averages import averaged, packed, split

RANDOM = torch.Generator().manual_seed(6)
STUDENT, TEACHER = torch.log_softmax(torch.randn(2, 3, 4, 9, generator=RANDOM, dtype=torch.float64), -1)
MASK = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()


def test_the_ends_and_the_middle():
    p, q = TEACHER.exp(), STUDENT.exp()
    assert torch.allclose(generalized_jsd(STUDENT, TEACHER, 0), (p * (p / q).log()).sum(-1))
    assert torch.allclose(generalized_jsd(STUDENT, TEACHER, 1), (q * (q / p).log()).sum(-1))
    m = 0.3 * p + 0.7 * q
    want = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    assert torch.allclose(generalized_jsd(STUDENT, TEACHER, 0.3), want)
    assert generalized_jsd(STUDENT, STUDENT, 0.5).abs().max() < 1e-15
    # beta -> 0 is the forward KL at the rate beta.
    small = generalized_jsd(STUDENT, TEACHER, 1e-6) / 1e-6
    assert torch.allclose(small, generalized_jsd(STUDENT, TEACHER, 0), rtol=1e-4)
    with pytest.raises(ValueError, match="beta is 1.5"):
        generalized_jsd(STUDENT, TEACHER, 1.5)


def test_the_rest_of_a_stored_top_k_is_one_class():
    top, ids = TEACHER.topk(4, -1)
    student = STUDENT.gather(-1, ids)
    assert torch.allclose(with_tail(top).exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))
    coarse = generalized_jsd(with_tail(student), with_tail(top), 0.0)
    fine = generalized_jsd(STUDENT, TEACHER, 0.0)
    assert (coarse > 0).all() and (coarse <= fine + 1e-12).all()  # lumping classes loses information
    everything = with_tail(TEACHER)
    assert torch.allclose(generalized_jsd(with_tail(STUDENT), everything, 0.0), fine, atol=1e-6)
    impossible = torch.tensor([0.0, -math.inf])
    assert kl_divergence(impossible, torch.tensor([0.5, 0.5]).log()).item() == pytest.approx(math.log(2))


def test_distillation_sums_the_head_s_divergence():
    divergence = generalized_jsd(STUDENT, TEACHER)
    outputs = {"divergence": divergence, "log_prob": STUDENT[..., 0]}
    want = (divergence * MASK).sum() / MASK.sum() - 0.5 * (STUDENT[..., 0] * MASK).sum() / MASK.sum()
    for micros in (split(outputs, {"mask": MASK}, 1), [packed(outputs, {"mask": MASK})]):
        loss, _ = averaged(Distillation(nll=0.5), micros)
        assert loss.item() == pytest.approx(want.item())


def test_reverse_kl_as_a_reward_is_minus_the_divergence_on_average():
    """What `megallm distill` rewards each sampled token with."""
    vocabulary, every = STUDENT[0, 0].exp(), TEACHER[0, 0] - STUDENT[0, 0]
    assert (vocabulary * every).sum().item() == pytest.approx(-generalized_jsd(STUDENT, TEACHER, 1)[0, 0].item())


def test_advantage_weighted_regression():
    batch = {"mask": MASK, "advantages": torch.tensor([1.0, -1.0, 9.0], dtype=torch.float64)}
    log_prob = STUDENT[..., 0]
    weight = torch.tensor([math.exp(2), math.exp(-2), 5.0], dtype=torch.float64).clamp(max=5)[:, None]
    for micros in (split({"log_prob": log_prob}, batch, 1), [packed({"log_prob": log_prob}, batch)]):
        loss, report = averaged(AdvantageWeighted(0.5, max_weight=5.0), micros)
        assert loss.item() == pytest.approx((-(weight * log_prob * MASK).sum() / MASK.sum()).item())
        assert report["weight"] == pytest.approx(((weight * MASK).sum() / MASK.sum()).item())


def test_ilql_is_its_formula():
    draw = lambda: torch.randn(3, 4, generator=RANDOM, dtype=torch.float64)  # noqa: E731
    outputs = {name: draw().requires_grad_() for name in Ilql(gamma=0.9, tau=0.8, alpha=0.5).needs}
    batch = {"mask": MASK, "rewards": draw(), "target_q": draw()}
    terms = {"q": 0.0, "v": 0.0, "cql": 0.0}
    for row in range(3):
        places = [t for t in range(4) if MASK[row, t]]
        for t, after in zip(places, [*places[1:], None], strict=True):
            v = {name: x[row, t].item() for name, x in (outputs | batch).items()}
            target = v["rewards"] + 0.9 * (0.0 if after is None else outputs["value"][row, after].item())
            terms["q"] += (v["q1"] - target) ** 2 + (v["q2"] - target) ** 2
            u = v["target_q"] - v["value"]
            terms["v"] += (0.2 if u < 0 else 0.8) * u**2
            terms["cql"] -= 0.5 * (v["q1_log_prob"] + v["q2_log_prob"])
    loss = Ilql(gamma=0.9, tau=0.8, alpha=0.5)
    for micros in (split(outputs, batch, 2), [packed(outputs, batch)]):
        value, report = averaged(loss, micros)
        told = {name: report[name] for name in terms}
        assert told == pytest.approx({name: x / int(MASK.sum()) for name, x in terms.items()})
    (slope,) = torch.autograd.grad(value, outputs["value"])
    below = 0.8 - 0.6 * (batch["target_q"] < outputs["value"]).double()
    want = -2 * below * (batch["target_q"] - outputs["value"]) * MASK / MASK.sum()
    assert torch.allclose(slope, want)  # V learns from the expectile only, never as the next value


def test_the_next_counted_token():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, True, True]])
    assert next_counted(x, {"mask": mask}).tolist() == [[3, 3, 4, 0]]
    ends = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert next_counted(x, {"mask": mask, "cu_seqlens": ends}).tolist() == [[3, 3, 0, 0]]


def test_decoding_with_q_minus_v():
    q, value = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(perturbed_log_probs(STUDENT, q, value, 0.0), STUDENT)
    greedy = perturbed_log_probs(STUDENT, q, value, 1e6).argmax(-1)
    assert torch.equal(greedy, q.argmax(-1))
