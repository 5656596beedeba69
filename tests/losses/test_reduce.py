"""Averages over tokens and sequences: the same number however a batch is split, packed or padded."""

from __future__ import annotations

import pytest
import torch

from megallm.losses.reduce import MODES, counted_tokens, divisor, per_sequence, per_token, token_values, total
from tests.losses.averages import packed, rows

MASK = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
X = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4).square()
WANT = {
    "token_mean": (4 + 9 + 16 + 25 + 81 + 100 + 121 + 144) / 8,
    "seq_mean_token_mean": ((4 + 9 + 16) / 3 + 25 + (81 + 100 + 121 + 144) / 4) / 3,
    "seq_mean_token_sum": (4 + 9 + 16 + 25 + 81 + 100 + 121 + 144) / 3,
    "constant": (4 + 9 + 16 + 25 + 81 + 100 + 121 + 144) / (3 * 7),
}


def mean(micros, mode):
    """Sums of all microbatches over counts of all microbatches."""
    above = sum(total(x["x"], batch, mode) for x, batch in micros)
    return (above / sum(float(divisor(batch, mode, 7)) for _, batch in micros)).item()


@pytest.mark.parametrize("mode", MODES)
def test_an_average_does_not_depend_on_the_split(mode):
    batch, outputs = {"mask": MASK}, {"x": X}

    def cut(*edges):
        return [(rows(outputs, a, b), rows(batch, a, b)) for a, b in zip(edges, edges[1:], strict=False)]

    for micros in (cut(0, 4), cut(0, 1, 4), cut(0, 2, 4), cut(0, 1, 2, 3, 4), [packed(outputs, batch)]):
        assert mean(micros, mode) == pytest.approx(WANT[mode], rel=1e-14)
    # Negative control: a mean of means is another number.
    means = [mean([micro], mode) for micro in cut(0, 1, 3)]
    assert sum(means) / 2 != pytest.approx(WANT[mode], rel=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_may_hold_anything(mode):
    x = X.masked_fill(~MASK, float("nan")).requires_grad_()
    found = total(x, {"mask": MASK}, mode)
    found.backward()
    assert (found / divisor({"mask": MASK}, mode, 7)).item() == pytest.approx(WANT[mode])
    assert torch.equal(x.grad != 0, MASK)


def test_sequences_are_rows_or_documents():
    ends = torch.tensor([0, 1, 1, 4], dtype=torch.int32)  # the second document is empty
    row = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64, requires_grad=True)
    batch = {"mask": torch.tensor([[True, False, True, True]]), "cu_seqlens": ends}
    sums = per_sequence(row, batch)
    assert sums.tolist() == [1, 0, 14] and counted_tokens(batch).tolist() == [1, 0, 2]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([3.0, 5.0, 7.0])).sum(), row)
    assert gradient.tolist() == [[3, 7, 7, 7]]
    assert per_token(torch.tensor([3, 5, 7]), batch).tolist() == [[3, 7, 7, 7]]
    assert per_sequence(X, {"mask": MASK}).tolist() == X.sum(1).tolist()
    spread = token_values("a", {"mask": MASK, "a": torch.tensor([1, 2, 3, 4])})
    assert spread.shape == MASK.shape and spread[2].tolist() == [3] * 4


def test_modes_that_cannot_be():
    with pytest.raises(ValueError, match="'mean' is none of token_mean, seq_mean"):
        total(X, {"mask": MASK}, "mean")
    with pytest.raises(ValueError, match="set length to the longest answer"):
        divisor({"mask": MASK}, "constant")
