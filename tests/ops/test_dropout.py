"""Dropout by keys: the share, the scale, and independence of how a tensor is cut."""

from __future__ import annotations

import pytest
import torch

from megallm.ops.dropout import keyed_dropout, token_keys

KEY = 2**64 - 12345


def keys(rows: int = 8, tokens: int = 16) -> torch.Tensor:
    return token_keys(torch.arange(rows), torch.arange(tokens).expand(rows, tokens))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_rest_scaled(rate):
    x = torch.ones(8, 16, 512, dtype=torch.float64)
    y = keyed_dropout(x, rate, KEY, keys())
    kept = y != 0
    assert float(kept.double().mean()) == pytest.approx(1 - rate, abs=0.01)
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - rate), dtype=torch.float64))
    for dim in ((1, 2), (0, 2), (0, 1)):  # no sample, place or feature stands out
        spread = kept.double().mean(dim).std()
        assert float(spread) < 3 * (rate * (1 - rate) / (x.numel() / kept.double().mean(dim).numel())) ** 0.5


def test_a_piece_is_a_piece_of_the_whole():
    x = torch.randn(8, 16, 40, dtype=torch.float64)
    whole = keyed_dropout(x, 0.3, KEY, keys())
    piece = keyed_dropout(x[2:5, 3:9, 10:30], 0.3, KEY, keys()[2:5, 3:9], first=10)
    assert torch.equal(piece, whole[2:5, 3:9, 10:30])
    other = keyed_dropout(x[2:5, 3:9, 10:30], 0.3, KEY, keys()[2:5, 3:9])
    assert not torch.equal(other, piece)


def test_keys_are_of_samples_and_places():
    places = torch.arange(16).expand(8, 16)
    by_token = torch.arange(8)[:, None].expand(8, 16)
    assert torch.equal(token_keys(by_token, places), keys())
    assert keys().unique().numel() == 8 * 16
    x = torch.ones(8, 16, 64)
    assert not torch.equal(keyed_dropout(x, 0.5, KEY, keys()), keyed_dropout(x, 0.5, 1, keys()))


def test_the_gradient_has_the_same_mask():
    x = torch.randn(8, 16, 5, requires_grad=True)
    y = keyed_dropout(x, 0.4, KEY, keys())
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0) and float(grad.max()) == pytest.approx(1 / 0.6)
