"""Losses of a reward model: pairs with margins, and several ranked answers of a prompt."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megallm.losses.reward import BradleyTerry, RankedReward
from tests.losses.averages import averaged, packed, split

VALUE = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LAST = torch.tensor([2, 1, 0, 2, 2, 2, 1, 0])
MASK = torch.zeros(8, 3, dtype=torch.bool).index_put((torch.arange(8), LAST), torch.tensor(True))
SCORES = VALUE[torch.arange(8), LAST].tolist()


def softplus(x):
    return math.log1p(math.exp(x))


def test_a_pair_is_chosen_and_rejected_in_the_order_of_the_microbatch():
    loss = averaged(BradleyTerry(), split({"value": VALUE}, {"mask": MASK}))[0].item()
    pairs = zip(SCORES[::2], SCORES[1::2], strict=True)
    assert loss == pytest.approx(sum(softplus(low - high) for high, low in pairs) / (len(SCORES) // 2))


def test_a_margin_and_centring():
    margin = torch.tensor([1.0, 0.25] * 4, dtype=torch.float64)
    batch = {"mask": MASK, "margin": margin}
    pairs = list(zip(SCORES[::2], SCORES[1::2], strict=True))
    want = sum(softplus(-(a - b - 0.75)) + 0.01 * (a + b) ** 2 for a, b in pairs) / 4
    for micros in (split({"value": VALUE}, batch, 2), [packed({"value": VALUE}, batch)]):
        loss, report = averaged(BradleyTerry(0.01), micros)
        assert loss.item() == pytest.approx(want)
        assert report["accuracy"] == sum(a > b for a, b in pairs) / 4
        assert report["margin"] == pytest.approx(sum(a - b for a, b in pairs) / 4)
        assert report["mean_reward"] == pytest.approx(sum(SCORES) / 8)


def test_ranked_answers_weigh_one_over_their_pairs():
    prompt = torch.tensor([7, 7, 7, 7, 3, 3, 9, 7])
    rank = torch.tensor([0, 1, 2, 3, 1, 0, 0, 0])
    mask = MASK.clone()
    mask[7] = False  # padding
    batch = {"mask": mask, "prompt": prompt, "rank": rank}
    four = [softplus(-(SCORES[a] - SCORES[b])) for a, b in itertools.combinations(range(4), 2)]
    want = (sum(four) / 6 + softplus(-(SCORES[5] - SCORES[4]))) / 2  # the prompt 9 has no pair
    for micros in (
        split({"value": VALUE}, batch), split({"value": VALUE}, batch, 4), [packed({"value": VALUE}, batch)],
    ):  # fmt: skip
        loss, report = averaged(RankedReward(), micros)
        assert loss.item() == pytest.approx(want, rel=1e-12)
        right = sum(SCORES[a] > SCORES[b] for a, b in itertools.combinations(range(4), 2)) + (SCORES[5] > SCORES[4])
        assert report["accuracy"] == pytest.approx(right / 7)
    # Answers of equal rank are no pair; one pair of four answers that tie weighs all the prompt has.
    tied = {"mask": MASK[:4], "prompt": prompt[:4], "rank": torch.tensor([0, 1, 1, 1])}
    loss, _ = averaged(RankedReward(), [({"value": VALUE[:4]}, tied)])
    assert loss.item() == pytest.approx(sum(softplus(-(SCORES[0] - SCORES[b])) for b in (1, 2, 3)) / 3)
    # Negative control: a prompt split over microbatches loses the pairs across the split.
    lost, _ = averaged(RankedReward(), split({"value": VALUE}, batch, 2))
    assert abs(lost.item() - want) > 1e-3


def test_scores_that_cannot_be():
    half = MASK.clone()
    half[1] = False
    with pytest.raises(ValueError, match="a score for one of its sequences only"):
        BradleyTerry().counts({"mask": half})
    half[0] = False
    assert int(BradleyTerry().counts({"mask": half})["loss"]) == 3
    twice = MASK.clone()
    twice[0] = True
    with pytest.raises(ValueError, match="a sequence has several counted tokens"):
        BradleyTerry().counts({"mask": twice})
