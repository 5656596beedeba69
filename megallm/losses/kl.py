"""Estimates of the reverse KL divergence to a reference, from the log-probs of sampled tokens.

With `log r = ref_log_prob - log_prob` (Schulman, "Approximating KL divergence", 2020):

    k1     -log r                 unbiased; as a loss its gradient is 0 on average: for rewards only
    k2     (log r)^2 / 2          biased, but on-policy its gradient is that of the divergence
    k3     r - 1 - log r          unbiased, never negative; its gradient is that of the *forward* KL
    k3_is  (r - 1 - log r) ratio  k3 weighed by the differentiable ratio policy / sampling policy:
                                  value and gradient are right (DeepSeek-V3.2, arXiv 2512.02556)
    k1+, k3+                      the value of k1 or k3 with the gradient of k2 (straight-through)

TRL has k3 and, by default, k3_is (`use_bias_correction_kl`). verl calls k1 "kl", k2 "mse" and k3
"low_var_kl", with the same "+".
"""

from __future__ import annotations

from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3", "k3_is", "k1+", "k3+")
# exp(20) = 4.9e8: a token that the policy has all but forgotten must not drown the batch.
CLAMP = 20.0


def check_estimator(kind: str, used_in: str = "loss") -> None:
    """Errors: ValueError for an unknown estimator, and for k1 as a loss, which has no gradient."""
    if kind not in ESTIMATORS:
        raise ValueError(f"the KL estimator {kind!r} is none of {', '.join(ESTIMATORS)}.")
    if used_in == "loss" and kind == "k1":
        raise ValueError(
            "the KL estimator 'k1' in the loss has a gradient that is 0 on average: take k2, k3_is "
            "or k1+, or subtract k1 from the reward."
        )


def estimate_kl(
    kind: str, log_prob: Tensor, ref_log_prob: Tensor, ratio: Tensor | None = None
) -> Tensor:
    """Returns the estimate of KL(policy || reference) of each token, with the shape of `log_prob`.

    `ratio` is policy / sampling policy with its gradient; only k3_is reads it, and without one the
    policy itself has sampled. log r is clamped to +-20 before the exponential.
    """
    check_estimator(kind, "reward")
    log_r = (ref_log_prob - log_prob).clamp(-CLAMP, CLAMP)
    k2 = log_r.square() / 2
    if kind == "k2":
        return k2
    value = -log_r if kind.startswith("k1") else log_r.expm1() - log_r
    if kind.endswith("+"):
        return k2 + (value - k2).detach()
    if kind == "k3_is":
        return value * ((log_prob - log_prob.detach()).exp() if ratio is None else ratio)
    return value


def adapt_kl_coefficient(
    beta: float, kl: float, target: float, samples: int, horizon: int = 10_000
) -> float:
    """Returns the next KL coefficient (Ziegler et al., arXiv 1909.08593, section 2.2).

    `kl` is the measured divergence per sequence in nats, `samples` the sequences since the last
    call: the coefficient moves by at most 20 % in `horizon` samples.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * samples / horizon)
