"""Policy losses, their corrections and CHORD, where TRL's numbers (test_trl.py) say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megallm.losses.chord import Chord, mu_schedule
from megallm.losses.importance import CORRECTIONS, compare_log_probs, importance_weights, off_policy_mask
from megallm.losses.policy import ALGORITHMS, Policy, first_update_fault, policy_loss
from tests.losses.averages import averaged, packed, split

RANDOM = torch.Generator().manual_seed(4)
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
LOG_PROB = -torch.rand(*MASK.shape, generator=RANDOM, dtype=torch.float64) * 3
OLD = LOG_PROB + 0.4 * torch.randn(*MASK.shape, generator=RANDOM, dtype=torch.float64)
ENTROPY = torch.rand(*MASK.shape, generator=RANDOM, dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -0.25], dtype=torch.float64)
BATCH = {"mask": MASK, "advantages": ADVANTAGES, "old_log_probs": OLD, "ref_log_probs": OLD + 0.1}


def ran(loss, batch=BATCH, log_prob=LOG_PROB, *ends):
    leaf = log_prob.clone().requires_grad_()
    value, report = averaged(loss, split({"log_prob": leaf, "entropy": ENTROPY}, batch, *ends))
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient, report


@pytest.mark.parametrize("name", ALGORITHMS)
def test_split_packed_padded_and_garbage_where_nothing_counts(name):
    loss = policy_loss(name, length=6, beta=0.1, entropy_coef=0.01, opsm=0.05)
    value, gradient, report = ran(loss)
    assert not gradient[~MASK].any() and gradient[MASK].any()
    assert ran(loss, BATCH, LOG_PROB, 1)[0] == pytest.approx(value, rel=1e-12)
    outputs = {"log_prob": LOG_PROB, "entropy": ENTROPY}
    together, numbers = averaged(loss, [packed(outputs, BATCH)])
    assert together.item() == pytest.approx(value, rel=1e-12) and numbers == pytest.approx(report)
    bad = float("nan")
    garbage = {
        name: x.masked_fill(~MASK, bad) if x.shape == MASK.shape and name != "mask" else x for name, x in BATCH.items()
    }
    again, slope, numbers = ran(loss, garbage, LOG_PROB.masked_fill(~MASK, -float("inf")))
    assert again == pytest.approx(value, rel=1e-12) and numbers == pytest.approx(report)
    assert torch.allclose(slope, gradient)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_update_has_the_ratio_one(name):
    loss = policy_loss(name, length=6, beta=0.1)
    same = BATCH | {"ref_log_probs": LOG_PROB}
    del same["old_log_probs"]
    value, gradient, report = ran(loss, same)
    assert first_update_fault(report, reference_is_policy=True) is None
    assert report["off_policy"] == 0 and report["ratio/mean"] == 1 and report["kl"] == 0
    given, slope, _ = ran(loss, same | {"old_log_probs": LOG_PROB})
    assert given == value and torch.equal(slope, gradient)
    # All of them are the same policy gradient there, but for the divisor: sequence, token or constant.
    plain = torch.where(MASK, -ADVANTAGES[:, None], 0.0)
    if loss.level != "trajectory":
        assert torch.allclose(
            gradient / gradient.abs().sum(-1, keepdim=True), plain / plain.abs().sum(-1, keepdim=True)
        )


def test_what_a_stale_rollout_is_told():
    report = ran(policy_loss("grpo"))[2]
    assert "In the first update of a rollout the mean ratio is" in first_update_fault(report)
    clean = {"ratio/mean": 1.0, "off_policy": 0.0, "clip_ratio/low_mean": 0.0, "kl": 0.01}
    assert first_update_fault(clean) is None
    assert "divergence to a reference with the same weights is 0.010000" in first_update_fault(clean, True)
    assert "low_mean is 25.00%" in first_update_fault(clean | {"clip_ratio/low_mean": 0.25})


def test_dual_clip_bounds_what_a_bad_answer_costs():
    old = LOG_PROB - 2.0  # a ratio of 7.4
    batch = {"mask": MASK, "advantages": -torch.ones(4), "old_log_probs": old}
    plain, slope, _ = ran(policy_loss("ppo", dual_clip=None), batch)
    bounded, nothing, _ = ran(policy_loss("ppo"), batch)
    assert plain == pytest.approx(torch.tensor(2.0).exp().item(), rel=1e-6) and slope[MASK].all()
    assert bounded == pytest.approx(3.0) and not nothing.any()


def test_gspo_token_is_gspo_where_the_advantage_is_the_answer_s():
    value, gradient, _ = ran(policy_loss("gspo", low=0.5, high=0.5))
    other, slope, _ = ran(policy_loss("gspo_token", low=0.5, high=0.5))
    assert other == pytest.approx(value) and torch.allclose(slope, gradient)
    each = BATCH | {"advantages": torch.randn(MASK.shape, generator=RANDOM, dtype=torch.float64)}
    assert not torch.allclose(ran(policy_loss("gspo_token"), each)[1], ran(policy_loss("gspo"), each)[1])
    assert policy_loss("gspo").low == 3e-4 and policy_loss("gspo").high == 4e-4


def test_the_two_bounds_of_cispo():
    absolute = ran(policy_loss("cispo", high=1.2))
    relative = ran(policy_loss("cispo", high=0.2, cispo_bound="relative"))
    assert absolute[0] == relative[0] and torch.equal(absolute[1], relative[1])
    ratio = (LOG_PROB - OLD).exp().clamp(max=1.2)
    want = -(ratio * ADVANTAGES[:, None] * MASK) / MASK.sum()
    assert torch.allclose(absolute[1], want)


def test_reinforce_is_its_formula():
    value, gradient, _ = ran(policy_loss("reinforce"))
    assert value == pytest.approx((-(ADVANTAGES[:, None] * LOG_PROB * MASK).sum() / MASK.sum()).item())
    assert torch.allclose(gradient, -ADVANTAGES[:, None] * MASK / MASK.sum())


def test_importance_weights_scale_the_policy_and_not_the_kl():
    loss = policy_loss("dapo", beta=0.3)
    weighted = ran(loss, BATCH | {"importance_weights": torch.full((4,), 0.5)})[2]
    plain = ran(loss)[2]
    assert weighted["loss"] == pytest.approx(plain["loss"] / 2)
    assert weighted["kl_loss"] == pytest.approx(plain["kl_loss"]) == pytest.approx(0.3 * plain["kl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "ppo"}, "surrogate is 'ppo'; it must be one of clip, cispo, sapo, reinforce"),
        ({"level": "batch"}, "level is 'batch'"),
        ({"cispo_bound": "upper"}, "cispo_bound is 'upper'"),
        ({"dual_clip": 1.1}, "must be above 1 \\+ high"),
        ({"low": -0.1}, "both must be >= 0"),
        ({"aggregate": "constant"}, "set length"),
        ({"kl": "k1"}, "0 on average"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Policy(**options)
    with pytest.raises(ValueError, match="'ppg' is none of grpo"):
        policy_loss("ppg")


ROLLOUT = OLD + torch.linspace(-1.2, 1.2, 20, dtype=torch.float64).view(4, 5)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_importance_weights(correction):
    level, _, action = correction.partition("_")
    found = importance_weights(OLD, ROLLOUT, BATCH, correction, 0.5, 1.5)
    for row in range(4):
        logs = [(OLD - ROLLOUT)[row, t] for t in range(5) if MASK[row, t]]
        summed = torch.stack(logs).sum() / (len(logs) if level == "geometric" else 1)
        for t in range(5):
            if MASK[row, t]:
                ratio = ((OLD - ROLLOUT)[row, t] if level == "token" else summed).exp()
                inside = 0.5 <= ratio <= 1.5
                want = ratio.clamp(0.5, 1.5) if action == "truncate" else ratio * inside
                assert found[row, t].item() == pytest.approx(want.item())
    assert not found.requires_grad
    outputs = {"log_prob": OLD, "entropy": ENTROPY}
    wide, batch = packed(outputs, BATCH | {"rollout_log_probs": ROLLOUT})
    again = importance_weights(wide["log_prob"], batch["rollout_log_probs"], batch, correction, 0.5, 1.5)
    assert torch.allclose(again[batch["mask"]], found[MASK])


def test_a_token_without_a_score_has_the_weight_one():
    rollout = OLD.clone()
    rollout[0, 1] = float("nan")
    for correction in ("token_truncate", "sequence_mask"):
        assert (importance_weights(OLD, rollout, BATCH, correction)[MASK] == 1).all()
    with pytest.raises(ValueError, match="'tis' is none of token_truncate"):
        importance_weights(OLD, rollout, BATCH, "tis")


def test_sequences_that_the_policy_has_left_are_masked():
    rollout = LOG_PROB + torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)[:, None]
    kept = off_policy_mask(LOG_PROB, rollout, ADVANTAGES[:, None].expand(4, 5), BATCH, 0.1)
    # Row 0 drifts but is good, row 1 drifts and is bad, rows 2 and 3 have become likelier.
    assert kept[MASK].view(-1).tolist() == [1] * 3 + [0] * 2 + [1] * 7


def test_comparison_of_two_log_probs():
    same = compare_log_probs(OLD, OLD, MASK)
    assert same["max_difference"] == 0 and same["ess_fraction"] == same["perplexity_ratio"] == 1
    other = compare_log_probs(OLD, ROLLOUT, MASK)
    ratio = (OLD - ROLLOUT)[MASK].exp()
    assert other["max_difference"] == pytest.approx((OLD - ROLLOUT)[MASK].abs().max().item())
    assert other["ess_fraction"] == pytest.approx((ratio.sum() ** 2 / ratio.square().sum() / 12).item())
    assert other["chi_square"] == pytest.approx((ratio.square().mean() - 1).item())
    assert compare_log_probs(OLD, OLD, torch.zeros_like(MASK)) == same


DEMONSTRATION = torch.tensor([False, True, False, True])


def test_chord_divides_each_part_by_its_own_count():
    batch = BATCH | {"demonstration": DEMONSTRATION}
    sampled = {name: x[~DEMONSTRATION] for name, x in BATCH.items()}
    outputs = {"log_prob": LOG_PROB[~DEMONSTRATION], "entropy": ENTROPY[~DEMONSTRATION]}
    rl, _ = averaged(policy_loss("grpo"), [(outputs, sampled)])
    shown = MASK & DEMONSTRATION[:, None]
    for phi in (False, True):
        p = LOG_PROB.exp() if phi else None
        each = -LOG_PROB * (p * (1 - p) if phi else 1.0)
        want = 0.7 * rl.item() + 0.3 * (each * shown).sum().item() / int(shown.sum())
        loss = Chord(policy_loss("grpo"), 0.3, phi)
        for ends in ((), (1,), (1, 2)):
            value, gradient, report = ran(loss, batch, LOG_PROB, *ends)
            assert value == pytest.approx(want, rel=1e-12)
        weight = p * (1 - p) if phi else torch.ones_like(LOG_PROB)
        assert torch.allclose(gradient[shown], -0.3 * weight[shown] / shown.sum())
        together, _ = averaged(loss, [packed({"log_prob": LOG_PROB, "entropy": ENTROPY}, batch)])
        assert together.item() == pytest.approx(want, rel=1e-12)
    assert replace(loss, policy=Policy(temperature=0.7)).temperature == 0.7
    value, _, report = ran(Chord(policy_loss("grpo"), 2.5, keep=True), batch, LOG_PROB, 2)  # PPO-ptx
    assert value == pytest.approx(rl.item() + 2.5 * report["sft_nll"], rel=1e-12)
    with pytest.raises(ValueError, match="must be bool"):
        loss.counts(batch | {"demonstration": DEMONSTRATION.long()})
    with pytest.raises(ValueError, match="mu is 1.5"):
        Chord(mu=1.5)


def test_the_schedule_of_mu():
    assert [mu_schedule(s, 0.9, 0.05) for s in (0, 100, 200, 999)] == pytest.approx([0.9, 0.475, 0.05, 0.05])
    assert [mu_schedule(s, 0.5, 0.02, 200, 400) for s in (0, 100, 200, 600)] == pytest.approx([0, 0.25, 0.5, 0.02])
    assert mu_schedule(50, 0.1, 0.1) == pytest.approx(0.1)
