"""KL estimators: their mean and their gradient against the exact sum over a small vocabulary."""

from __future__ import annotations

import pytest
import torch

from megallm.losses.kl import ESTIMATORS, adapt_kl_coefficient, check_estimator, estimate_kl

GENERATOR = torch.Generator().manual_seed(3)
POLICY, REFERENCE = torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def expected(kind):
    """Mean over the policy's own samples of an estimate, and the mean of its gradient."""
    logits = POLICY.clone().requires_grad_()
    log_prob = torch.log_softmax(logits, -1)
    each = estimate_kl(kind, log_prob, torch.log_softmax(REFERENCE, -1))
    weight = log_prob.detach().exp()
    (gradient,) = torch.autograd.grad((weight * each).sum(), logits)
    return (weight * each).sum().item(), gradient


def exact(forward=False):
    logits = POLICY.clone().requires_grad_()
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(REFERENCE, -1)
    value = kl(q, p) if forward else kl(p, q)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_mean_and_its_gradient(kind):
    value, gradient = expected(kind)
    want, slope = exact()
    if kind != "k2":
        assert value == pytest.approx(want, rel=1e-12)
    right = {"k2", "k3_is", "k1+", "k3+"}
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-12) == (kind in right)


def test_what_the_wrong_gradients_are():
    assert expected("k1")[1].abs().max() < 1e-15
    assert torch.allclose(expected("k3")[1], exact(forward=True)[1], rtol=1e-10)
    assert expected("k2")[0] != pytest.approx(exact()[0], rel=1e-2)


def test_k3_is_is_right_for_samples_of_another_policy():
    old = torch.log_softmax(POLICY + torch.linspace(-0.5, 0.5, 7, dtype=torch.float64), -1)
    logits = POLICY.clone().requires_grad_()
    log_prob = torch.log_softmax(logits, -1)
    each = estimate_kl("k3_is", log_prob, torch.log_softmax(REFERENCE, -1), (log_prob - old).exp())
    mean = (old.exp() * each).sum()
    (gradient,) = torch.autograd.grad(mean, logits)
    assert mean.item() == pytest.approx(exact()[0])
    assert torch.allclose(gradient, exact()[1], rtol=1e-10, atol=1e-12)


def test_equal_policies_and_forgotten_tokens():
    zero = torch.zeros(3, requires_grad=True)
    far = torch.tensor([-1000.0, -30.0, 0.0], requires_grad=True)
    for kind in ESTIMATORS:
        assert not estimate_kl(kind, zero, torch.zeros(3)).any()
        value = estimate_kl(kind, far, torch.zeros(3))
        (gradient,) = torch.autograd.grad(value.sum(), far)
        assert value.isfinite().all() and gradient.isfinite().all()
    assert estimate_kl("k1", far, torch.zeros(3)).tolist() == [-20, -20, 0]


def test_names():
    with pytest.raises(ValueError, match="'k4' is none of k1, k2, k3, k3_is, k1\\+, k3\\+"):
        check_estimator("k4")
    with pytest.raises(ValueError, match="0 on average"):
        check_estimator("k1")
    check_estimator("k1", "reward")


def test_the_adaptive_coefficient():
    assert adapt_kl_coefficient(0.1, kl=6.0, target=6.0, samples=64) == 0.1
    assert adapt_kl_coefficient(0.1, kl=60.0, target=6.0, samples=10_000) == pytest.approx(0.12)
    assert adapt_kl_coefficient(0.1, kl=0.0, target=6.0, samples=5_000) == pytest.approx(0.09)
    assert adapt_kl_coefficient(0.1, kl=6.6, target=6.0, samples=10_000) == pytest.approx(0.11)
