"""The next-token loss: sums and counts of the labels that are not masked."""

from __future__ import annotations

import torch

from megallm.losses.language import NextToken


def test_sum_and_count():
    batch = {"mask": torch.tensor([[True, False, True], [False, False, True]])}
    log_prob = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], dtype=torch.float64, requires_grad=True)
    loss = NextToken()
    assert {term: int(n) for term, n in loss.counts(batch).items()} == {"loss": 3}
    total = loss({"log_prob": log_prob}, batch).losses["loss"]
    total.backward()
    assert total.dtype == torch.float64 and total.item() == 37.0
    assert torch.equal(log_prob.grad, -batch["mask"].double())


def test_nothing_to_count():
    batch = {"mask": torch.zeros(2, 3, dtype=torch.bool)}
    assert int(NextToken().counts(batch)["loss"]) == 0
    assert NextToken()({"log_prob": torch.full((2, 3), -5.0)}, batch).losses["loss"] == 0
