"""Losses of a value head and of hidden tokens, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megallm.losses.language import MaskedDiffusion
from megallm.losses.scores import Regression, Value

VALUE = torch.tensor([[1.0, 9.0, 3.0], [9.0, -1.0, 2.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [False, True, True]])
TARGETS = torch.tensor([[0.0, 9.0, 5.0], [9.0, -1.0, 5.0]], dtype=torch.float64)


def ran(loss, batch, value=VALUE):
    value = value.clone().requires_grad_()
    batch = {"mask": MASK, "targets": TARGETS} | batch
    (total,) = loss({"value": value}, batch).losses.values()
    total.backward()
    return total.item(), value.grad, int(loss.counts(batch)["loss"])


def test_regression_is_the_sum_of_squares_where_a_target_counts():
    total, grad, count = ran(Regression(), {})
    assert (total, count) == (1 + 4 + 0 + 9, 4)
    assert torch.equal(grad, 2 * (VALUE - TARGETS) * MASK)


def test_a_critic_gains_nothing_beyond_the_clip():
    assert ran(Value(), {})[0] == 14 / 2
    old = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 1.9]], dtype=torch.float64)
    total, grad, count = ran(Value(clip=0.5), {"old_values": old})
    # 1 -> 0: inside. 3 -> 5 came from 0: held at 0.5, the larger square counts and has no slope. 2 -> 5: inside.
    assert total == pytest.approx((1 + 4.5**2 + 0 + 9) / 2) and count == 4
    assert grad[0].tolist() == [1.0, 0.0, 0.0] and grad[1].tolist() == [0.0, 0.0, -3.0]


def test_diffusion_weighs_hidden_tokens_and_counts_all_that_could_be_hidden():
    log_prob = -VALUE.abs()
    weight = torch.tensor([[2.0, 2.0, 0.0], [0.0, 4.0, 0.0]])
    batch = {"mask": MASK, "weight": weight}  # the middle of the first row is padding
    total = MaskedDiffusion()({"log_prob": log_prob}, batch).losses["loss"]
    assert total.item() == 2 * 1 + 4 * 1 and int(MaskedDiffusion().counts(batch)["loss"]) == 4
