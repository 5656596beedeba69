"""Low-rank terms added in place are those that are written out, with their gradients, at once or put off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.parallel.linear import WeightGradQueue, compute_weight_grads
from megallm.parallel.low_rank import LowRankSum, add_low_rank

STARTS, SCALES, DIMS, OUT = (0, 10), (0.5, 3.0), (2, 3), 5  # columns 5 to 10 have no adapter


def inputs(bias: bool, trains_input: bool) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x, base = new(2, 4, 7).requires_grad_(trains_input), new(15, 7)
    a = [new(dim, 7).requires_grad_() for dim in DIMS]
    b = [new(OUT, dim).requires_grad_() for dim in DIMS]
    return x, F.linear(x, base, new(15) if bias else None), *a, *b


def written(x: Tensor, y: Tensor, *matrices: Tensor) -> Tensor:
    a, b = matrices[:2], matrices[2:]
    made = [scale * x @ one.T @ two.T for scale, one, two in zip(SCALES, a, b, strict=True)]
    return y + torch.cat((made[0], torch.zeros_like(made[0]), made[1]), -1)


def gradients(x: Tensor, y: Tensor, *matrices: Tensor, queue: WeightGradQueue | None = None, ours: bool = True) -> list:
    if ours:
        made = add_low_rank(x, y, LowRankSum(STARTS, SCALES, queue), matrices[:2], matrices[2:])
    else:
        made = written(x, y, *matrices)
    made.square().sum().backward()
    if queue is not None:
        assert all(one.grad is None for one in matrices)
        compute_weight_grads(queue.take())
    return [made.detach(), x.grad, *(one.grad for one in matrices)]


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("trains_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_as_written_out(bias, trains_input, put_off):
    want = gradients(*inputs(bias, trains_input), ours=False)
    found = gradients(*inputs(bias, trains_input), queue=WeightGradQueue() if put_off else None)
    for one, other in zip(found, want, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_width_of_the_output_is_made():
    """The output is the base's, changed; a view is copied once, since autograd would change its base."""
    x, y, *matrices = inputs(False, True)
    address = y.data_ptr()
    made = add_low_rank(x, y, LowRankSum(STARTS, SCALES, None), matrices[:2], matrices[2:])
    assert made.data_ptr() == address
    x, y, *matrices = inputs(True, True)
    before = y.detach().clone()
    made = add_low_rank(x, y, LowRankSum(STARTS, SCALES, None), matrices[:2], matrices[2:])
    assert torch.equal(y, before) and not torch.equal(made, before)


def test_zeros_leave_every_bit():
    x, y, *matrices = inputs(False, True)
    before = y.detach().clone()
    zeros = [torch.zeros_like(one) for one in matrices[2:]]
    assert torch.equal(add_low_rank(x, y, LowRankSum(STARTS, SCALES, None), matrices[:2], zeros), before)
