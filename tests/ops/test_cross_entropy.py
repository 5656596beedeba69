"""ops.cross_entropy: logits in blocks of rows, in part of the vocabulary, overwritten or not, against log_softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops import cross_entropy
from megallm.ops.cross_entropy import linear_gradients, linear_statistics, logit_gradient_, statistics

VOCAB, ROWS = 37, (3, 5)  # 15 rows; a block of four rows leaves a last one of three
BEGIN = 11


@pytest.fixture(params=[1, 4 * VOCAB, 2**20], ids=["a row", "four rows", "all"])
def block(request, monkeypatch):
    """Rows of a block, given in wide numbers: of float64 half as many."""
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 8 * request.param)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[3, 5, V]` of entries from BEGIN on, labels some of which lie elsewhere, gradients."""
    make = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(*ROWS, VOCAB, generator=make, dtype=torch.float64)
    labels = torch.randint(0, BEGIN + VOCAB + 9, ROWS, generator=make)
    return logits.to(dtype), labels, torch.randn(ROWS, generator=make, dtype=torch.float64)


def expected(logits: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, the label's logit and the gradient by autograd, in float64."""
    whole = logits.double().clone().requires_grad_()
    lse, here = whole.logsumexp(-1), (labels >= BEGIN) & (labels < BEGIN + VOCAB)
    chosen = whole.gather(-1, (labels - BEGIN).clamp(0, VOCAB - 1)[..., None]).squeeze(-1) * here
    ((chosen - lse) * grad).sum().backward()
    return lse.detach(), chosen.detach(), whole.grad


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.usefixtures("block")
def test_blocks_equal_log_softmax(dtype, atol):
    logits, labels, grad = problem(dtype)
    before = logits.clone()
    lse, chosen, gradient = expected(logits, labels, grad)
    found = statistics(logits, labels, BEGIN)
    mine = found.top + found.total.log()
    assert found.top.shape == found.total.shape == found.label.shape == ROWS and torch.equal(logits, before)
    torch.testing.assert_close(mine.double(), lse, rtol=0, atol=max(atol / 10, 1e-12))
    torch.testing.assert_close(found.label.double(), chosen, rtol=0, atol=max(atol / 10, 1e-12))
    found = logit_gradient_(logits, mine, labels, BEGIN, grad.to(mine.dtype))
    assert found.dtype == dtype and torch.equal(logits, found) and logits.data_ptr() == found.data_ptr()
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=atol)
    other = logit_gradient_(before, mine.roll(1, 1), labels, BEGIN, grad.to(mine.dtype))
    assert (other.double() - gradient).abs().max() > 10 * atol  # the control: rows of another token


@pytest.mark.usefixtures("block")
def test_the_form_without_logits_equals_it(monkeypatch):
    """Here blocks overwrite the logits of a chunk."""
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", 7)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)
    make = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 6, generator=make, dtype=torch.float64) for n in (15, VOCAB))
    _, labels, grad = problem(torch.float64)
    labels, grad = labels.flatten(), grad.flatten()
    logits = F.linear(hidden, weight)
    lse, chosen, gradient = expected(logits, labels, grad)
    found = linear_statistics(hidden, weight, None, labels, BEGIN)
    mine = found.top + found.total.log()
    torch.testing.assert_close(mine, lse, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.label, chosen, rtol=0, atol=1e-12)
    gradients = linear_gradients(hidden, weight.requires_grad_(), None, labels, BEGIN, mine, grad)
    torch.testing.assert_close(gradients.hidden, gradient @ weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients.weight, gradient.mT @ hidden, rtol=0, atol=1e-12)


def test_no_tokens_give_nothing():
    found = statistics(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.long), 0)
    assert all(part.shape == (0,) for part in found)
    empty = torch.zeros(0)
    assert logit_gradient_(torch.zeros(0, VOCAB), empty, empty.long(), 0, empty).shape == (0, VOCAB)
