"""Advantages from rewards, in float64 and without torch.

Rewards are those of the whole batch, over all data ranks: a baseline or a deviation of one rank's
share would depend on the layout. A reward that is None or NaN says nothing: it enters no mean and
no deviation, and its answer has the advantage 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
DELTA = 1e-4  # TRL's; verl adds 1e-6
SCALES = ("group", "batch", "none")


def combine_rewards(
    rewards: Sequence[Sequence[float | None]] | Floats, weights: ArrayLike
) -> Floats:
    """Returns the weighted sum `[n]` of the rewards `[n, k]` of k functions.

    A missing reward adds nothing; an answer without any reward is NaN. Errors: ValueError when the
    number of weights is not k.
    """
    table = _numbers(rewards)
    weight = np.asarray(weights, np.float64)
    if table.ndim != 2 or weight.shape != table.shape[1:]:
        raise ValueError(
            f"rewards of the shape {table.shape} need {table.shape[-1]} weights, one for each "
            f"reward function, and got {weight.size}."
        )
    total = np.nansum(table * weight, axis=1)
    total[np.isnan(table).all(axis=1)] = np.nan
    return total


def group_advantages(
    rewards: ArrayLike, groups: ArrayLike, scale: str = "group", delta: float = DELTA
) -> Floats:
    """Returns `(reward - mean of its group) / (std + delta)` `[n]` (GRPO, arXiv 2402.03300).

    `groups` `[n]` names the prompt of each answer. The deviation is unbiased, of the group or of
    the batch; `none` divides by nothing (Dr. GRPO, arXiv 2503.20783). An answer that is alone keeps
    its reward as advantage, as in verl. Errors: ValueError for an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"the scale {scale!r} of advantages is none of {', '.join(SCALES)}.")
    reward, index = _grouped(rewards, groups)
    _, mean, deviation = _moments(reward, index)
    alone = (np.bincount(index) == 1)[index]
    advantage = np.where(alone, reward, reward - mean[index])
    if scale == "group":
        advantage = np.where(alone, advantage, advantage / (deviation[index] + delta))
    elif scale == "batch":
        advantage = advantage / (_deviation(reward) + delta)
    return np.nan_to_num(advantage, nan=0.0)


def decoupled_advantages(
    rewards: Sequence[Sequence[float | None]] | Floats,
    weights: ArrayLike,
    groups: ArrayLike,
    delta: float = DELTA,
) -> Floats:
    """Returns advantages `[n]` whose k rewards are each normalised in their group, then weighted,
    summed and normalised over the batch (GDPO, arXiv 2601.05242; TRL's `normalize_then_sum`).
    """
    table = _numbers(rewards)
    missing = np.isnan(table)
    columns = []
    for column in table.T:
        reward, index = _grouped(column, groups)
        _, mean, deviation = _moments(reward, index)
        columns.append((reward - mean[index]) / (deviation[index] + delta))
    scaled = np.where(missing, np.nan, np.stack(columns, axis=1))
    total = combine_rewards(scaled, weights)
    known = total[~np.isnan(total)]
    mean = known.mean() if known.size else 0.0
    return np.nan_to_num((total - mean) / (_deviation(total) + delta), nan=0.0)


def leave_one_out(rewards: ArrayLike, groups: ArrayLike) -> Floats:
    """Returns `reward - mean of the others of its group` `[n]` (RLOO, arXiv 2402.14740); an answer
    that is alone keeps its reward.
    """
    reward, index = _grouped(rewards, groups)
    number, mean, _ = _moments(reward, index)
    factor = np.where(number > 1, number / np.maximum(number - 1, 1), 0.0)
    advantage = factor[index] * (reward - mean[index])
    alone = (np.bincount(index) == 1)[index]
    return np.nan_to_num(np.where(alone, reward, advantage), nan=0.0)


def reinforce_plus_plus(
    rewards: ArrayLike,
    mask: NDArray[np.bool_],
    penalties: Floats | None = None,
    groups: ArrayLike | None = None,
) -> Floats:
    """Returns advantages `[n, T]` whitened over all tokens of the batch (REINFORCE++, arXiv
    2501.03262).

    The return of a token is the answer's reward less the `penalties` `[n, T]`, such as beta times
    k1, from that token on. With `groups` `[n]` the group's mean is subtracted from the reward first
    (the variant with a baseline). Tokens where `mask` is False get 0.
    """
    reward = _numbers(rewards)
    if groups is not None:
        index = _grouped(reward, groups)[1]
        reward = reward - _moments(reward, index)[1][index]
    known = mask & ~np.isnan(reward)[:, None]
    returns = np.repeat(np.nan_to_num(reward)[:, None], mask.shape[1], axis=1)
    if penalties is not None:
        returns = returns - np.where(mask, penalties, 0.0)[:, ::-1].cumsum(axis=1)[:, ::-1]
    return whiten(returns, known)


def whiten(values: Floats, mask: NDArray[np.bool_], shift: bool = True) -> Floats:
    """Returns `(values - mean) / (std + 1e-8)` over the tokens that count, 0 elsewhere; without
    `shift` the mean is added again. The deviation is unbiased.
    """
    counted = np.asarray(values, np.float64)[mask]
    mean = counted.mean() if counted.size else 0.0
    deviation = _deviation(counted)
    return np.where(mask, (values - mean) / (deviation + 1e-8) + (0.0 if shift else mean), 0.0)


def gae(
    rewards: Floats,
    values: Floats,
    mask: NDArray[np.bool_],
    bootstrap: ArrayLike = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Floats, Floats]:
    """Returns advantages and returns `[n, T]` (generalised advantage estimation, arXiv 1506.02438).

    `values[t]` is the critic's value before token t is drawn and `rewards[t]` what drawing it
    earns. Tokens where `mask` is False (prompt, tools, padding) are no steps: the next value of a
    token is that of the next one that counts. After the last one stands `bootstrap` `[n]`: 0 where
    the answer ended, the critic's value after its last token where it was truncated.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    following = np.broadcast_to(np.asarray(bootstrap, np.float64), len(mask)).copy()
    running = np.zeros(len(mask))
    advantages = np.zeros(mask.shape)
    for t in range(mask.shape[1] - 1, -1, -1):
        counted = mask[:, t]
        surprise = rewards[:, t] + gamma * following - values[:, t]
        running = np.where(counted, surprise + gamma * lam * running, running)
        advantages[:, t] = np.where(counted, running, 0.0)
        following = np.where(counted, values[:, t], following)
    return advantages, np.where(mask, advantages + values, 0.0)


def overlong_punishment(tokens: ArrayLike, max_tokens: int, cache: int) -> Floats:
    """Returns a reward in [-1, 0] for answers of `tokens` `[n]`: 0 up to `max_tokens - cache`, from
    there falling to -1 at `max_tokens` (DAPO, arXiv 2503.14476, equation 13).
    """
    over = np.asarray(tokens, np.float64) - (max_tokens - cache)
    if cache == 0:
        return np.where(over > 0, -1.0, 0.0)
    return -np.clip(over / cache, 0.0, 1.0)


def informative(rewards: ArrayLike, groups: ArrayLike) -> NDArray[np.bool_]:
    """Returns True `[n]` for answers of a group whose rewards differ: the others have no gradient,
    and DAPO draws new prompts for them.
    """
    reward, index = _grouped(rewards, groups)
    low, high = (
        np.full(index.max(initial=-1) + 1, np.inf),
        np.full(index.max(initial=-1) + 1, -np.inf),
    )
    known = ~np.isnan(reward)
    np.minimum.at(low, index[known], reward[known])
    np.maximum.at(high, index[known], reward[known])
    return (high > low)[index]


def _deviation(values: Floats) -> float:
    """Unbiased deviation of the numbers that are known; 0 of fewer than two."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0


def _numbers(rewards: ArrayLike | Sequence[Sequence[float | None]]) -> Floats:
    """None becomes NaN."""
    return np.array(rewards, dtype=np.float64)


def _grouped(rewards: ArrayLike, groups: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """Rewards `[n]` and the index `[n]` of their group, counted from 0."""
    reward = _numbers(rewards)
    index = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if reward.shape != index.shape:
        raise ValueError(f"{reward.size} rewards need as many groups, and got {index.size}.")
    return reward, index


def _moments(reward: Floats, index: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Number, mean and unbiased deviation of the known rewards of each group; 0 where there are too
    few of them.
    """
    known = ~np.isnan(reward)
    size = index.max(initial=-1) + 1
    number = np.bincount(index[known], minlength=size).astype(np.float64)
    mean = np.bincount(index[known], reward[known], size) / np.maximum(number, 1)
    square = np.bincount(index[known], (reward - mean[index])[known] ** 2, size)
    return number, mean, np.sqrt(square / np.maximum(number - 1, 1))
