"""Estimators of KL(policy || reference) from the log-probs of tokens that the policy sampled.

Reference: J. Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
All take and return [T].
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q): unbiased, high variance, can be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q)^2 / 2: biased, low variance, never negative."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased, low variance, never negative.

    Departs from verl, which clamps the log ratio to +-20 and the estimate to +-10: a clamp takes the
    gradient away just where the policy has strayed furthest.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": k1,
    "k1": k1,
    "mse": k2,
    "k2": k2,
    "low_var_kl": k3,
    "k3": k3,
}
"""By verl's names and the field's."""
