"""Advantages against their definitions, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from megallm.losses.advantage import (
    combine_rewards,
    decoupled_advantages,
    gae,
    group_advantages,
    informative,
    leave_one_out,
    overlong_punishment,
    reinforce_plus_plus,
    whiten,
)

RANDOM = np.random.default_rng(5)


def test_a_group_is_normalised_by_its_unbiased_deviation():
    rewards, groups = [1.0, 0.0, 0.0, 2.0, 5.0, 5.0], ["a", "b", "a", "b", "c", "c"]
    std = np.sqrt(0.5)
    want = [0.5 / (std + 1e-4), -1 / (2 * std + 1e-4), -0.5 / (std + 1e-4), 1 / (2 * std + 1e-4), 0, 0]
    np.testing.assert_allclose(group_advantages(rewards, groups), want, rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, groups, "none"), [0.5, -1, -0.5, 1, 0, 0])
    batch = group_advantages(rewards, groups, "batch")
    np.testing.assert_allclose(batch, np.array([0.5, -1, -0.5, 1, 0, 0]) / (np.std(rewards, ddof=1) + 1e-4))
    assert informative(rewards, groups).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_missing_reward_is_in_no_mean_and_no_deviation(scale):
    known = group_advantages([1.0, 0.0, 3.0], [0, 0, 0], scale)
    missing = group_advantages([1.0, None, 0.0, float("nan"), 3.0], [0] * 5, scale)
    np.testing.assert_array_equal(missing, [known[0], 0, known[1], 0, known[2]])
    np.testing.assert_array_equal(group_advantages([None, None], [0, 0], scale), [0, 0])
    # One known reward of a group says nothing; an answer that was alone from the start keeps its own.
    np.testing.assert_array_equal(group_advantages([2.0, None], [0, 0], scale), [0, 0])
    np.testing.assert_array_equal(group_advantages([2.0, -0.5], [0, 1], scale), [2.0, -0.5])


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    rewards = RANDOM.normal(size=12)
    groups = np.arange(12) % 3
    found = leave_one_out(rewards, groups)
    for i in range(12):
        others = [rewards[j] for j in range(12) if groups[j] == groups[i] and j != i]
        assert found[i] == pytest.approx(rewards[i] - np.mean(others), rel=1e-12)
    np.testing.assert_allclose(found, 4 / 3 * group_advantages(rewards, groups, "none"), rtol=1e-12)
    np.testing.assert_array_equal(leave_one_out([2.0, None, 4.0, 7.0], [0, 0, 0, 1]), [-2, 0, 2, 7])


def test_rewards_are_weighed_and_summed():
    found = combine_rewards([[1.0, 2.0], [None, 3.0], [None, None]], [1.0, 0.5])
    np.testing.assert_array_equal(found, [2.0, 1.5, np.nan])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) need 2 weights.* got 3"):
        combine_rewards([[1.0, 2.0]], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="'std' of advantages is none of group, batch, none"):
        group_advantages([1.0], [0], "std")
    with pytest.raises(ValueError, match="2 rewards need as many groups, and got 1"):
        group_advantages([1.0, 2.0], [0])
    none = decoupled_advantages([[None, None], [None, None]], [1.0, 1.0], [0, 0])
    np.testing.assert_array_equal(none, [0, 0])


def test_reinforce_plus_plus_whitens_over_all_tokens():
    rewards = np.array([1.0, 0.0, 3.0])
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]], bool)
    penalties = RANDOM.uniform(size=mask.shape)
    found = reinforce_plus_plus(rewards, mask, penalties)
    returns = np.full(mask.shape, np.nan)
    for i, t in np.argwhere(mask):
        returns[i, t] = rewards[i] - sum(penalties[i, u] for u in range(t, 4) if mask[i, u])
    want = (returns - np.nanmean(returns)) / (np.nanstd(returns, ddof=1) + 1e-8)
    np.testing.assert_allclose(found, np.nan_to_num(want), rtol=1e-9, atol=1e-12)
    assert found[mask].mean() == pytest.approx(0, abs=1e-12) and not found[~mask].any()
    # Negative control: whitening each row by itself, as one rank's share would be, is something else.
    assert abs(found[0][mask[0]].mean()) > 0.1
    based = reinforce_plus_plus(rewards, mask, groups=[0, 0, 1])
    np.testing.assert_allclose(based, whiten(np.array([[0.5], [-0.5], [0.0]]) * np.ones(4), mask))


def test_whitening_may_keep_the_mean_and_may_have_nothing():
    values, mask = RANDOM.normal(3, 2, size=(2, 5)), np.array([[1] * 5, [1, 1, 0, 0, 0]], bool)
    assert whiten(values, mask, shift=False)[mask].mean() == pytest.approx(values[mask].mean())
    assert not whiten(values, np.zeros_like(mask)).any()


def gae_definition(rewards, values, mask, bootstrap, gamma, lam):
    """sum over l of (gamma lam)^l delta of the l-th next counted token, in O(T^2)."""
    advantages = np.zeros(mask.shape)
    for row in range(len(mask)):
        steps = np.flatnonzero(mask[row])
        after = [*values[row, steps[1:]], bootstrap[row]]
        delta = [rewards[row, t] + gamma * v - values[row, t] for t, v in zip(steps, after, strict=True)]
        for place, t in enumerate(steps):
            advantages[row, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[place:]))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    rewards, values = RANDOM.normal(size=(2, 3, 9))
    mask = np.array([[0, 0, 1, 1, 0, 0, 1, 1, 0], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    bootstrap = np.array([0.0, 1.5, 0.0])  # the second answer was truncated
    advantages, returns = gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    want = gae_definition(rewards, values, mask, bootstrap, gamma, lam)
    np.testing.assert_allclose(advantages, want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(returns, np.where(mask, want + values, 0), rtol=1e-12)
    # Values and rewards of tool tokens are never read; that of the truncation is.
    values[0, 4:6], rewards[0, 4:6] = 1e9, np.nan
    np.testing.assert_array_equal(gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)[0], advantages)
    ended = gae(rewards, values, mask, gamma=gamma, lam=lam)[0]
    assert abs(ended[1, -1] - advantages[1, -1]) == pytest.approx(gamma * 1.5)


def test_monte_carlo_returns():
    rewards = np.array([[0.0, 0.0, 1.0, 9.0]])
    mask = np.array([[True, True, True, False]])
    advantages, returns = gae(rewards, np.zeros((1, 4)), mask, gamma=1.0, lam=1.0)
    assert advantages.tolist() == returns.tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_overlong_answers_are_punished_softly():
    tokens = [10, 80, 90, 100, 150]
    np.testing.assert_allclose(overlong_punishment(tokens, 100, 20), [0, 0, -0.5, -1, -1])
    np.testing.assert_allclose(overlong_punishment([100, 101], 100, 0), [0, -1])
