"""ops.cross_entropy: logits in blocks of rows, in part of the vocabulary, overwritten or not, against log_softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops import cross_entropy
from megallm.ops.cross_entropy import (
    Projection,
    Softmax,
    Statistics,
    Targets,
    Upstream,
    frozen_gradient,
    linear_gradients,
    linear_statistics,
    logit_gradient_,
    statistics,
)

VOCAB, ROWS = 37, 15  # a block of four rows leaves a last one of three
BEGIN = 11
TEMPERATURES = (1.0, 0.7)


@pytest.fixture(params=[1, 4 * VOCAB, 2**20], ids=["a row", "four rows", "all"])
def block(request, monkeypatch):
    """Rows of a block, given in wide numbers: of float64 half as many."""
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 8 * request.param)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[15, V]` of entries from BEGIN on, labels some of which lie elsewhere, gradients `[2, 15]`."""
    make = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(ROWS, VOCAB, generator=make, dtype=torch.float64)
    labels = torch.randint(0, BEGIN + VOCAB + 9, (ROWS,), generator=make)
    return logits.to(dtype), labels, torch.randn(2, ROWS, generator=make, dtype=torch.float64)


def expected(logits: Tensor, labels: Tensor, grads: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """lse, the label's logit, the entropy and the gradients by autograd, in float64: of both, and of the first."""
    whole = logits.double().clone().requires_grad_()
    z = whole / temperature
    lse, here = z.logsumexp(-1), (labels >= BEGIN) & (labels < BEGIN + VOCAB)
    chosen = z.gather(-1, (labels - BEGIN).clamp(0, VOCAB - 1)[..., None]).squeeze(-1) * here
    entropy = torch.distributions.Categorical(logits=z).entropy()
    (first,) = torch.autograd.grad(((chosen - lse) * grads[0]).sum(), whole, retain_graph=True)
    (second,) = torch.autograd.grad((entropy * grads[1]).sum(), whole)
    return lse.detach(), chosen.detach(), entropy.detach(), first + second, first


def softmax_of(found: Statistics) -> Softmax:
    """What one piece of the vocabulary knows when it is the whole."""
    return Softmax(found.top + found.total.log(), found.total.log() - found.moment / found.total)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.usefixtures("block")
def test_blocks_equal_log_softmax(dtype, atol, temperature):
    logits, labels, grads = problem(dtype)
    before, targets = logits.clone(), Targets(labels, BEGIN, temperature)
    lse, chosen, entropy, gradient, first = expected(logits, labels, grads, temperature)
    found = statistics(logits, targets, moment=True, best=True)
    mine, close = softmax_of(found), {"rtol": 0, "atol": max(atol / 10, 1e-12) / temperature}  # numbers grow alike
    assert torch.equal(logits, before) and torch.equal(found.best, logits.argmax(-1))
    torch.testing.assert_close(mine.lse.double(), lse, **close)
    torch.testing.assert_close(mine.entropy.double(), entropy, **close)
    torch.testing.assert_close(found.label.double(), chosen, **close)
    upstream = Upstream(*grads.to(mine.lse.dtype))
    alone = logit_gradient_(logits.clone(), targets, mine, upstream._replace(entropy=None))
    torch.testing.assert_close(alone.double(), first, rtol=0, atol=atol)
    found = logit_gradient_(logits, targets, mine, upstream)
    assert found.dtype == dtype and torch.equal(logits, found) and logits.data_ptr() == found.data_ptr()
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=atol)
    other = Softmax(*(x.roll(1) for x in mine))
    wrong = logit_gradient_(before, targets, other, upstream)
    assert (wrong.double() - gradient).abs().max() > 10 * atol  # the control: rows of another token


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.usefixtures("block")
def test_the_form_without_logits_equals_it(monkeypatch, temperature):
    """Here blocks overwrite the logits of a chunk."""
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", 7)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)
    make = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 6, generator=make, dtype=torch.float64) for n in (ROWS, VOCAB))
    _, labels, grads = problem(torch.float64)
    logits, targets = F.linear(hidden, weight), Targets(labels, BEGIN, temperature)
    lse, chosen, entropy, gradient, _ = expected(logits, labels, grads, temperature)
    head = Projection(weight)
    found = linear_statistics(hidden, head, targets, moment=True, best=True)
    mine = softmax_of(found)
    torch.testing.assert_close(mine.lse, lse, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.entropy, entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.label, chosen, rtol=0, atol=1e-12)
    assert torch.equal(found.best, logits.argmax(-1))
    weight.requires_grad_()
    gradients = linear_gradients(hidden, head, targets, mine, Upstream(*grads))
    torch.testing.assert_close(gradients.hidden, gradient @ weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients.weight, gradient.mT @ hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.usefixtures("block")
def test_a_frozen_head_needs_its_logits_once(monkeypatch, temperature, moment):
    """In two pieces of the vocabulary, whose shares add up to the gradient of the whole."""
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", 7)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)
    make = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 6, generator=make, dtype=torch.float64) for n in (ROWS, VOCAB))
    _, labels, grads = problem(torch.float64)
    lse, _, _, _, gradient = expected(F.linear(hidden, weight), labels, grads, temperature)
    total = torch.zeros_like(hidden)
    for first, rows in ((0, weight[:20]), (20, weight[20:])):
        targets = Targets(labels, BEGIN + first, temperature)
        found = linear_statistics(hidden, Projection(rows), targets, moment, others=True)
        total += frozen_gradient(rows, targets, found, lse, grads[0])
    torch.testing.assert_close(total, gradient @ weight, rtol=0, atol=1e-12)
    wrong = frozen_gradient(rows, targets, found, lse + 0.01, grads[0])  # the control: another sum
    assert (wrong - frozen_gradient(rows, targets, found, lse, grads[0])).abs().max() > 1e-3


def test_a_likely_label_keeps_its_gradient_in_bf16():
    """1 - p of the label is some 1e-4; with its row in the sum of all, 8 bits leave nothing of that."""
    weight = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(2)) / 3
    weight[3] = 2.0
    weight, hidden, labels = weight.bfloat16(), torch.ones(1, 6).bfloat16(), torch.tensor([3])
    logits = F.linear(hidden, weight).double()
    lse = logits.logsumexp(-1)
    share = F.one_hot(labels, VOCAB) - (logits - lse[:, None]).exp()
    expected = share @ weight.double()
    assert 0 < float(share[0, 3]) < 1e-3
    found = linear_statistics(hidden, Projection(weight), Targets(labels), others=True)
    mine = frozen_gradient(weight, Targets(labels), found, lse.float(), torch.ones(1))
    limit = float(expected.abs().max()) / 16
    torch.testing.assert_close(mine.double(), expected, rtol=0, atol=limit)
    together = weight[labels] - (logits - lse[:, None]).exp().bfloat16() @ weight  # the control
    assert (together.double() - expected).abs().max() > 4 * limit


def test_no_tokens_give_nothing_and_a_gradient_of_zeros():
    empty, targets = torch.zeros(0), Targets(torch.zeros(0, dtype=torch.long))
    found = statistics(torch.zeros(0, VOCAB), targets, moment=True, best=True)
    assert all(part.shape == (0,) for part in found if part is not None)
    softmax, upstream = Softmax(empty, empty), Upstream(empty, empty)
    assert logit_gradient_(torch.zeros(0, VOCAB), targets, softmax, upstream).shape == (0, VOCAB)
    head = Projection(torch.ones(VOCAB, 6))
    assert linear_statistics(torch.zeros(0, 6), head, targets).total.shape == (0,)
    head.weight.requires_grad_()
    gradients = linear_gradients(torch.zeros(0, 6), head, targets, softmax, upstream)
    assert gradients.hidden.shape == (0, 6) and torch.equal(gradients.weight, torch.zeros(VOCAB, 6))
