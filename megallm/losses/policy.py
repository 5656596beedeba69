"""Policy-gradient losses of language models: GRPO and its kin, PPO's clip, REINFORCE.

A batch holds `advantages`, one number a sequence `[S]` or one a token `[B, T]`, and may hold, each
`[B, T]`: `old_log_probs`, those of the policy at the start of the step (without them the ratio is
exactly 1, with its gradient); `ref_log_probs` for the KL term; `importance_weights` (or `[S]`, see
losses/importance.py); `rollout_log_probs` for the off-policy mask. All are log-probs at
`temperature`, that of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megallm.losses.importance import off_policy_mask
from megallm.losses.kl import CLAMP, check_estimator, estimate_kl
from megallm.losses.reduce import (
    check_mode,
    divisor,
    per_sequence,
    per_token,
    token_values,
    tokens_per_sequence,
    total,
)
from megallm.losses.terms import Terms

LEVELS = ("token", "sequence", "sequence_token", "trajectory")


@dataclass(frozen=True)
class PolicyTokens:
    """What a surrogate reads, each `[B, T]`: the policy's log-probs and its ratio to the sampling
    policy, both with a gradient, and the advantages.
    """

    log_prob: Tensor
    ratio: Tensor
    advantage: Tensor


# One function a surrogate: tokens and the options of the loss -> the loss [B, T].


def clip(tokens: PolicyTokens, loss: Policy) -> Tensor:
    """Computes PPO's clipped surrogate (Schulman et al., arXiv 1707.06347), with `dual_clip`
    bounded for negative advantages too (Ye et al., arXiv 1912.09729; TRL's `delta`).
    """
    near = tokens.ratio.clamp(1 - loss.low, 1 + loss.high)
    ratio = tokens.ratio if loss.dual_clip is None else tokens.ratio.clamp(max=loss.dual_clip)
    return -torch.minimum(ratio * tokens.advantage, near * tokens.advantage)


def cispo(tokens: PolicyTokens, loss: Policy) -> Tensor:
    """Computes CISPO (MiniMax-M1, arXiv 2506.13585): the log-prob, weighed by the ratio up to a
    bound.
    """
    bound = loss.high if loss.cispo_bound == "absolute" else 1 + loss.high
    return -tokens.ratio.detach().clamp(max=bound) * tokens.advantage * tokens.log_prob


def sapo(tokens: PolicyTokens, loss: Policy) -> Tensor:
    """Computes SAPO (arXiv 2511.20347): a sigmoid gate of the ratio instead of a clip."""
    heat = torch.where(
        tokens.advantage > 0,
        tokens.ratio.new_tensor(loss.sapo_positive),
        tokens.ratio.new_tensor(loss.sapo_negative),
    )
    return -torch.sigmoid(heat * (tokens.ratio - 1)) * 4 / heat * tokens.advantage


def reinforce(tokens: PolicyTokens, loss: Policy) -> Tensor:
    """Returns the plain policy gradient (Williams, 1992): no ratio, for one update a rollout."""
    return -tokens.advantage * tokens.log_prob


Surrogate = Callable[[PolicyTokens, "Policy"], Tensor]
SURROGATES: dict[str, Surrogate] = {f.__name__: f for f in (clip, cispo, sapo, reinforce)}


@dataclass(frozen=True)
class Policy:
    """One policy loss; `policy_loss(name)` makes those of the papers.

    `level` is what a ratio belongs to: the `token`; the `sequence`, the geometric mean over its
    tokens (GSPO, arXiv 2507.18071); `sequence_token`, the same value with each token's own gradient
    (GSPO-token); or the `trajectory`, the product over its tokens (RLOO as in TRL). A ratio is
    clipped to [1 - low, 1 + high]. `cispo_bound` says whether `high` is CISPO's bound itself
    (`absolute`, TRL) or 1 less than it (`relative`, the paper). `aggregate` and `length`: see
    losses/reduce.py. `beta` weighs the estimate `kl` of the divergence to the reference, and
    `entropy_coef` the mean entropy of a token, which is added to the objective. With `opsm`
    sequences of negative advantage that have drifted by more than so many nats a token say nothing.
    """

    surrogate: str = "clip"
    level: str = "token"
    low: float = 0.2
    high: float = 0.2
    dual_clip: float | None = None
    cispo_bound: str = "absolute"
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    aggregate: str = "token_mean"
    length: int | None = None
    beta: float = 0.0
    kl: str = "k3_is"
    entropy_coef: float = 0.0
    opsm: float | None = None
    temperature: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("log_prob", "entropy")

    def __post_init__(self) -> None:
        check_mode(self.aggregate, self.length)
        check_estimator(self.kl)
        for name, value, known in (
            ("surrogate", self.surrogate, tuple(SURROGATES)),
            ("level", self.level, LEVELS),
            ("cispo_bound", self.cispo_bound, ("absolute", "relative")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        if self.low < 0 or self.high < 0:
            raise ValueError(
                f"the clip range is low={self.low}, high={self.high}; both must be >= 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.high:
            raise ValueError(
                f"dual_clip is {self.dual_clip}; it must be above 1 + high, here {1 + self.high}."
            )

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what divides each term: by `aggregate` for the loss and its KL, by the counted
        tokens for entropy and most metrics, and for clipped ratios by tokens or sequences, as
        `level` has it.
        """
        tokens = batch["mask"].sum()
        loss = divisor(batch, self.aggregate, self.length)
        ratios = divisor(batch, self._ratio_mode)
        counts = {"loss": loss} | dict.fromkeys(self._ratio_metrics, ratios)
        counts |= {"entropy": tokens, "approx_kl": tokens, "off_policy": tokens}
        if self.beta:
            counts |= {"kl_loss": loss, "kl": tokens}
        if self.entropy_coef:
            counts["entropy_bonus"] = tokens
        return counts

    @property
    def _ratio_mode(self) -> str:
        return "token_mean" if self.level == "token" else "seq_mean_token_mean"

    @property
    def _ratio_metrics(self) -> tuple[str, ...]:
        names = ("ratio/mean", "ratio/mean_square")
        if self.surrogate == "clip":
            return (*names, *(f"clip_ratio/{side}_mean" for side in ("low", "high", "region")))
        return (*names, "cispo_clip_ratio") if self.surrogate == "cispo" else names

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        mask = batch["mask"]
        log_prob = outputs["log_prob"].masked_fill(~mask, 0)
        old = batch.get("old_log_probs", log_prob.detach()).masked_fill(~mask, 0)
        advantage = token_values("advantages", batch).to(log_prob.dtype)
        log_ratio = log_prob - old
        tokens = PolicyTokens(log_prob, self._ratio(log_ratio, log_prob, batch), advantage)

        each = SURROGATES[self.surrogate](tokens, self)
        if self.opsm is not None:
            rollout = batch.get("rollout_log_probs", old)
            each = each * off_policy_mask(log_prob, rollout, advantage, batch, self.opsm)
        if "importance_weights" in batch:
            each = each * token_values("importance_weights", batch).to(each.dtype)
        losses = {"loss": total(each, batch, self.aggregate)}
        metrics = self._metrics(tokens, log_ratio.detach(), outputs, batch)
        if self.beta:
            reference = batch["ref_log_probs"].masked_fill(~mask, 0)
            divergence = estimate_kl(self.kl, log_prob, reference, tokens.ratio)
            losses["kl_loss"] = self.beta * total(divergence, batch, self.aggregate)
            metrics["kl"] = total(divergence.detach(), batch, "token_mean")
        if self.entropy_coef:
            entropy = total(outputs["entropy"], batch, "token_mean")
            losses["entropy_bonus"] = -self.entropy_coef * entropy
        return Terms(losses, metrics)

    def _ratio(self, log_ratio: Tensor, log_prob: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """`[B, T]`; log-ratios are clamped to +-20, where every bound has long been passed."""
        if self.level != "token":
            summed = per_sequence(log_ratio, batch)
            if self.level != "trajectory":
                summed = summed / tokens_per_sequence(batch).clamp(min=1).to(summed.dtype)
            log_ratio = per_token(summed, batch)
        if self.level == "sequence_token":
            log_ratio = log_ratio.detach() + log_prob - log_prob.detach()
        return log_ratio.clamp(-CLAMP, CLAMP).exp()

    @torch.no_grad()
    def _metrics(
        self,
        tokens: PolicyTokens,
        log_ratio: Tensor,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """TRL's names where it has one; ESS is ratio/mean^2 / ratio/mean_square. `off_policy` is
        the share of tokens whose log-ratio is off 0 by more than 1e-4: exactly 0 in the first
        update.
        """
        ratio, advantage = tokens.ratio, tokens.advantage
        drift = log_ratio.clamp(-CLAMP, CLAMP)
        low = (ratio < 1 - self.low) & (advantage < 0)
        high = (ratio > 1 + self.high) & (advantage > 0)
        bound = self.high if self.cispo_bound == "absolute" else 1 + self.high
        ratios = {
            "ratio/mean": ratio,
            "ratio/mean_square": ratio.square(),
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
            "cispo_clip_ratio": (ratio > bound) & (advantage > 0),
        }
        sums = {
            name: total(ratios[name].to(ratio.dtype), batch, self._ratio_mode)
            for name in self._ratio_metrics
        }
        counted = {
            "entropy": outputs["entropy"],
            "approx_kl": drift.expm1() - drift,
            "off_policy": (drift.abs() > 1e-4).to(drift.dtype),
        }
        return sums | {name: total(x, batch, "token_mean") for name, x in counted.items()}


# The losses of the papers, by name. "grpo", "bnpo", "dr_grpo", "dapo", "cispo" and "sapo" are TRL's
# loss_type; the clip ranges are those of the papers, where TRL's default is 0.2 on both sides. BNPO
# divides by the tokens of the global batch: TRL by those of a microbatch, whatever its size.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "seq_mean_token_mean"},
    "bnpo": {"aggregate": "token_mean"},
    "dr_grpo": {"aggregate": "constant"},
    "dapo": {"aggregate": "token_mean", "high": 0.28},
    "gspo": {"aggregate": "seq_mean_token_mean", "level": "sequence", "low": 3e-4, "high": 4e-4},
    "gspo_token": {
        "aggregate": "seq_mean_token_mean", "level": "sequence_token", "low": 3e-4, "high": 4e-4,
    },
    "cispo": {"surrogate": "cispo", "aggregate": "token_mean", "high": 5.0},
    "sapo": {"surrogate": "sapo", "aggregate": "seq_mean_token_mean"},
    "rloo": {"aggregate": "seq_mean_token_mean", "level": "trajectory"},
    "reinforce": {"surrogate": "reinforce", "aggregate": "token_mean"},
    "reinforce_plus_plus": {"aggregate": "token_mean"},
    "ppo": {"aggregate": "token_mean", "dual_clip": 3.0},
}  # fmt: skip


def policy_loss(name: str, **changes: Any) -> Policy:
    """Returns the loss `name` of `ALGORITHMS` with `changes`; dr_grpo needs `length`, the longest
    answer that is possible. Errors: ValueError for an unknown name.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"the policy loss {name!r} is none of {', '.join(ALGORITHMS)}.")
    return Policy(**(ALGORITHMS[name] | changes))


def first_update_fault(
    report: dict[str, float], reference_is_policy: bool = False, tolerance: float = 1e-4
) -> str | None:
    """Returns the sentence that says what is wrong with the metrics of a rollout's first update, or
    None: there every ratio is 1, nothing is clipped, and the divergence to a reference with the
    policy's weights is 0. Otherwise the rollout came from other weights or another temperature.
    """
    clipped = [name for name in report if "clip_ratio" in name and report[name] > 0]
    if abs(report["ratio/mean"] - 1) > tolerance or report["off_policy"] > 0:
        fault = (
            f"the mean ratio is {report['ratio/mean']:.6f}, and {report['off_policy']:.2%} of the "
            "tokens have another log-prob than in the rollout"
        )
    elif clipped:
        fault = f"{clipped[0]} is {report[clipped[0]]:.2%}"
    elif reference_is_policy and abs(report.get("kl", 0.0)) > tolerance:
        fault = f"the KL divergence to a reference with the same weights is {report['kl']:.6f}"
    else:
        return None
    return (
        f"In the first update of a rollout {fault}; the policy that is trained must be the one "
        "that has sampled: compare its weights, the sampling temperature and the tokens."
    )
