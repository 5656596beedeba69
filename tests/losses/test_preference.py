"""Losses of pairs and of single answers, where TRL's numbers (test_trl.py) say nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megallm.losses.preference import (
    KINDS,
    Kto,
    Preference,
    cpo_loss,
    orpo_loss,
    reference_point,
    simpo_loss,
)
from tests.losses.averages import averaged, packed, split

RANDOM = torch.Generator().manual_seed(8)
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0]]).bool()
POLICY, REFERENCE = -torch.rand(2, *MASK.shape, generator=RANDOM, dtype=torch.float64) * 2
BATCH = {"mask": MASK, "ref_log_probs": REFERENCE}
ANY = {"exo_pair": {"label_smoothing": 0.1}, "orpo": {"reference_free": True}}
LN2 = math.log(2)


def ran(loss, batch=None, log_prob=POLICY, *ends):
    leaf = log_prob.clone().requires_grad_()
    value, report = averaged(loss, split({"log_prob": leaf}, batch or BATCH, *ends))
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient, report


def gaps():
    """Log-ratio sums of chosen and rejected answers, and their tokens."""
    scores = ((POLICY - REFERENCE) * MASK).sum(-1).view(-1, 2)
    return scores[:, 0], scores[:, 1], MASK.sum(-1).view(-1, 2)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("sigmoid", LN2), ("sigmoid_norm", LN2), ("cdpo", LN2), ("robust", LN2), ("hinge", 1.0),
        ("ipo", 1 / (4 * 0.2**2)), ("ipo_sum", 1 / (4 * 0.2**2)), ("nca_pair", 2 * LN2), ("bco_pair", 2 * LN2),
        ("sppo_hard", 2 * (0.5 / 0.2) ** 2), ("aot", LN2), ("aot_unpaired", LN2), ("apo_zero", 1.0),
        ("apo_down", 1.0), ("discopop", (LN2 + 1) / 2), ("exo_pair", -0.5 * math.log(4 * 0.1 * 0.9)),
    ],
)  # fmt: skip
def test_the_first_loss(kind, want):
    loss = Preference(kind, beta=0.2, **ANY.get(kind, {}))
    assert loss.first_loss() == pytest.approx(want, rel=1e-12)
    assert ran(loss, BATCH | {"ref_log_probs": POLICY})[0] == pytest.approx(want, rel=1e-12)


def test_first_losses_of_mixtures_and_without_a_reference():
    mixed = Preference(("sigmoid", "hinge"), (0.5, 2.0), gamma=0.5, nll=1.0)
    assert mixed.first_loss() == pytest.approx(0.5 * math.log1p(math.exp(0.5)) + 2 * 1.5)
    assert simpo_loss().first_loss() is None
    assert Kto().first_loss() == 0.5 and Kto(undesirable_weight=2.0).first_loss(0.75) == 0.625


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pairs_split_packed_and_padded(kind):
    loss = Preference(kind, beta=0.2, nll=0.5, **ANY.get(kind, {}))
    value, gradient, report = ran(loss)
    assert report["loss"] != 0 and gradient[MASK].all() and not gradient[~MASK].any()
    if not kind.startswith("aot"):
        assert ran(loss, BATCH, POLICY, 2)[0] == pytest.approx(value, rel=1e-13)
    together, _ = averaged(loss, [packed({"log_prob": POLICY}, BATCH)])
    assert together.item() == pytest.approx(value, rel=1e-13)
    # A pair of padding, with anything in it, changes nothing.
    rest = torch.full((2, 4), float("nan"), dtype=torch.float64)
    padded = {
        "mask": torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)]),
        "ref_log_probs": torch.cat([REFERENCE, rest]),
    }
    again, slope, numbers = ran(loss, padded, torch.cat([POLICY, rest]))
    assert again == pytest.approx(value, rel=1e-13) and numbers == pytest.approx(report)
    assert torch.allclose(slope[:6], gradient) and not slope[6:].any()
    empty, nothing, _ = ran(loss, padded, torch.cat([POLICY, rest]), 6)  # a microbatch of padding alone
    assert empty == pytest.approx(value) or kind.startswith("aot")
    assert nothing.isfinite().all()


def test_the_two_ipo_conventions():
    chosen, rejected, tokens = gaps()
    by_sum = ((chosen - rejected - 1 / (2 * 0.2)) ** 2).mean().item()
    assert ran(Preference("ipo_sum", beta=0.2))[0] == pytest.approx(by_sum)
    mean = chosen / tokens[:, 0] - rejected / tokens[:, 1]
    by_token = ((mean - 1 / (2 * 0.2)) ** 2).mean().item()
    assert ran(Preference("ipo", beta=0.2))[0] == pytest.approx(by_token)
    assert ran(Preference("ipo_sum", beta=0.2, length_normalized=True))[0] == pytest.approx(by_token)
    assert by_sum != pytest.approx(by_token, rel=1e-2)


def test_length_normalised_dpo_is_sigmoid_norm():
    normal, slope, _ = ran(Preference("sigmoid_norm"))
    value, gradient, _ = ran(Preference("sigmoid", length_normalized=True))
    assert value == normal and torch.equal(gradient, slope)


def test_margins_of_the_batch_and_of_the_loss():
    margin = torch.tensor([0.5, 0.0, 2.0, 1.5, 0.5, 0.0], dtype=torch.float64)  # 0.5 for every pair
    given = ran(Preference("hinge"), BATCH | {"margin": margin})[0]
    assert given == pytest.approx(ran(Preference("hinge", gamma=0.5))[0])
    assert given == pytest.approx(ran(Preference("hinge"))[0] + 0.5)
    with pytest.raises(ValueError, match="the batch has margins, which nca_pair cannot use"):
        ran(Preference("nca_pair"), BATCH | {"margin": margin})


def test_the_likelihood_of_chosen_answers():
    chosen = MASK.clone()
    chosen[1::2] = False
    plain, with_nll = ran(Preference()), ran(Preference(nll=0.7))
    want = -(POLICY * chosen).sum().item() / int(chosen.sum())
    assert with_nll[0] - plain[0] == pytest.approx(0.7 * want)
    assert torch.equal((with_nll[1] - plain[1]).abs() > 1e-12, chosen)
    each = -((POLICY * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)).sum().item() / 3
    by_answer = ran(Preference(nll=0.7, nll_aggregate="seq_mean_token_mean"))
    assert by_answer[0] - plain[0] == pytest.approx(0.7 * each)
    # DPO alone pushes a rejected answer down harder than it lifts any; with the term the chosen one rises.
    assert (with_nll[1][chosen] < plain[1][chosen]).all()


def test_a_shift_of_bco_is_data():
    batch = BATCH | {"reference_point": torch.full((6,), 0.3, dtype=torch.float64)}
    chosen, rejected, _ = gaps()
    log = torch.nn.functional.logsigmoid
    want = -(log(0.1 * chosen - 0.3) + log(0.3 - 0.1 * rejected)).mean().item()
    assert ran(Preference("bco_pair"), batch)[0] == pytest.approx(want)
    assert ran(Preference("bco_pair"))[0] != pytest.approx(want, rel=1e-2)


def test_aot_compares_sorted_gaps():
    policy, reference = ((x * MASK).sum(-1).view(-1, 2) for x in (POLICY, REFERENCE))
    gap = sorted((policy[:, 0] - policy[:, 1]).tolist())
    ref = sorted((reference[:, 0] - reference[:, 1]).tolist())
    want = sum(math.log1p(math.exp(-0.1 * (a - b))) for a, b in zip(gap, ref, strict=True)) / 3
    assert ran(Preference("aot"))[0] == pytest.approx(want)


def test_orpo_near_certainty_stays_finite():
    sure = torch.zeros_like(POLICY)
    value, gradient, _ = ran(orpo_loss(), BATCH, sure)
    assert math.isfinite(value) and gradient.isfinite().all()
    value, gradient, _ = ran(orpo_loss(), BATCH, sure.to(torch.float32))
    assert math.isfinite(value) and gradient.isfinite().all()


def test_metrics_are_trl_s():
    _, _, report = ran(Preference(beta=0.2), BATCH, POLICY, 2)
    chosen, rejected, _ = gaps()
    assert report["rewards/chosen"] == pytest.approx(0.2 * chosen.mean().item())
    assert report["rewards/rejected"] == pytest.approx(0.2 * rejected.mean().item())
    assert report["rewards/margins"] == pytest.approx(0.2 * (chosen - rejected).mean().item())
    assert report["rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())
    assert report["logps/chosen"] == pytest.approx((POLICY * MASK).sum(-1)[::2].mean().item())
    equal = ran(Preference(), BATCH | {"ref_log_probs": POLICY})[2]
    assert equal["rewards/accuracies"] == equal["rewards/margins"] == 0


def test_an_empty_answer_is_part_of_its_pair_and_an_odd_one_is_refused():
    batch = {"mask": MASK.clone(), "ref_log_probs": REFERENCE}
    batch["mask"][1] = False
    assert int(Preference().counts(batch)["loss"]) == 3 and math.isfinite(ran(Preference(), batch)[0])
    with pytest.raises(ValueError, match="has 5 sequences; .* must be even"):
        Preference().counts({"mask": MASK[:5]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "none of sigmoid, sigmoid_norm"),
        ({"kind": ("sigmoid", "ipo")}, "2 preference losses need as many weights"),
        ({"kind": "exo_pair"}, "exo_pair needs a label_smoothing"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect on sigmoid"),
        ({"kind": "robust", "label_smoothing": 0.5}, "must be in"),
        ({"kind": "ipo", "gamma": 1.0}, "gamma has no effect on ipo"),
        ({"kind": "orpo"}, "set reference_free"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"nll_aggregate": "mean"}, "none of token_mean"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Preference(**options)


def test_builders():
    assert simpo_loss(2.0, 0.5) == Preference(beta=2.0, gamma=0.5, reference_free=True, length_normalized=True)
    assert cpo_loss(0.2, 0.5) == Preference(beta=0.2, nll=0.5, reference_free=True)
    assert replace(orpo_loss(0.3), nll=0.0).kinds == ("orpo",)


DESIRABLE = torch.tensor([True, False, False, True, True, False])


def kto_batch(point):
    every = torch.full((6,), point, dtype=torch.float64)
    return BATCH | {"desirable": DESIRABLE, "reference_point": every}


def test_kto_is_its_formula_and_does_not_depend_on_the_split():
    loss = Kto(beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    ratio = ((POLICY - REFERENCE) * MASK).sum(-1)
    value = torch.where(DESIRABLE, 1.5 * torch.sigmoid(-0.4 * (ratio - 0.2)), 0.5 * torch.sigmoid(0.4 * (ratio - 0.2)))
    found, gradient, report = ran(loss, kto_batch(0.2))
    assert found == pytest.approx(value.mean().item()) and torch.equal(gradient != 0, MASK)
    assert ran(loss, kto_batch(0.2), POLICY, 1, 2)[0] == pytest.approx(found, rel=1e-13)
    assert report["rewards/chosen"] == pytest.approx(0.4 * ratio[DESIRABLE].mean().item())
    assert report["logps/rejected"] == pytest.approx((POLICY * MASK).sum(-1)[~DESIRABLE].mean().item())
    first = kto_batch(0.0) | {"ref_log_probs": POLICY}
    assert ran(Kto(), first)[0] == pytest.approx(Kto().first_loss()) == 0.5
    with pytest.raises(ValueError, match="none of kto, apo_zero_unpaired"):
        Kto("apo")


def test_the_reference_point_is_global():
    policy, reference = torch.tensor([[1.0, 0.5, 0.25, -1.0], [0.0, 0.0, 0.5, -1.5]], requires_grad=True)
    point = reference_point(policy, reference)
    assert point.item() == pytest.approx((1 + 0.5 - 0.25 + 0.5) / 4) and not point.requires_grad
    assert reference_point(reference, policy) == 0
    # Negative control: a point of each half of the answers gives another loss.
    halves = [reference_point(policy[a : a + 2], reference[a : a + 2]).item() for a in (0, 2)]
    whole = ran(Kto(beta=0.4), kto_batch(point.item()))[0]
    batch = kto_batch(0.0)
    batch["reference_point"] = torch.tensor([halves[0]] * 3 + [halves[1]] * 3, dtype=torch.float64)
    assert abs(ran(Kto(beta=0.4), batch)[0] - whole) > 1e-3
