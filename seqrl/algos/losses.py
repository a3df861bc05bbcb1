"""Policy losses: how far, and in which direction, each token's log-prob is pushed.

Shape legend: N sequences, T response tokens in all (prompt and masked tokens are gone before a loss
is called), `offsets` [N+1] bounds each sequence's tokens. With d_it = logprobs - old_logprobs:
    token ratio     r_it = exp(d_it)
    sequence ratio  s_i  = exp(mean over t of d_it)

A loss returns its surrogate, to be minimised, for each token. It applies no aggregation, weight or
KL; `training/objective.py` does these once for all losses.

References:
    GSPO   Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071
    PPO    Schulman et al. 2017, arXiv 1707.06347
    dual clip  Ye et al. 2020, arXiv 1912.09729
    DAPO (clip-higher)  Yu et al. 2025, arXiv 2503.14476
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqrl.algos.segments import segment_index, segment_mean


@dataclass(frozen=True)
class Surrogate:
    """What a loss gives back; all [T]."""

    values: Tensor
    """The surrogate of each token, to be minimised."""
    clipped_low: Tensor
    """bool: a negative advantage, and the ratio already below 1 - clip_low: no gradient."""
    clipped_high: Tensor
    """bool: a positive advantage, and the ratio already above 1 + clip_high: no gradient."""
    clipped_dual: Tensor
    """bool: a negative advantage, and the ratio above clip_c: no gradient."""


Loss = Callable[..., Surrogate]


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> Surrogate:
    """GSPO: one ratio for the whole sequence (arXiv 2507.18071, eq. 5-7; token form eq. 13-14).

    Each token carries the value of s_i and its own share of the gradient,
    sg[s_i] * exp(logprobs - sg[logprobs]). Under a sequence's one advantage and
    `seq-mean-token-mean` the gradient is that of the paper's section 4.2:
    s_i * A_i * mean over t of grad logprobs_it.

    Departs from the paper by the dual clip `clip_c`, which bounds the loss of a negative advantage.

    Args:
        logprobs: [T] of the policy being trained; the only input that carries gradient.
        old_logprobs: [T] of the policy that generated.
        advantages: [T], constant over a sequence.
        offsets: [N+1].
        clip_low, clip_high: s_i is clipped to [1 - clip_low, 1 + clip_high]; the paper: 3e-4, 4e-4.
        clip_c: with A < 0 the surrogate never exceeds -A * clip_c.
    """
    current = logprobs.detach()
    log_ratio = segment_mean(current - old_logprobs, offsets)[segment_index(offsets)]
    return _clipped(log_ratio + (logprobs - current), advantages, clip_low, clip_high, clip_c)


def vanilla(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> Surrogate:
    """PPO's clipped surrogate on token ratios, as GRPO and DAPO use it (arXiv 1707.06347, eq. 7).

    The clip range may differ below and above (DAPO's clip-higher); `clip_c` is the dual clip.
    Arguments as in `gspo`; `offsets` is not used.
    """
    return _clipped(logprobs - old_logprobs, advantages, clip_low, clip_high, clip_c)


def _clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_c: float
) -> Surrogate:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), and for A < 0 never above -A clip_c; all [T].

    Decided on the ratio's side first and exponentiated after: a token that is clipped takes a
    constant, so that a ratio which overflows never meets a zero gradient (0 * inf = nan). With A > 0
    the ratio is at most 1 + high, with A < 0 at most clip_c, so that the exponential cannot overflow.
    """
    ratio = log_ratio.detach().exp()
    clipped_low = (advantages < 0) & (ratio < 1 - clip_low)
    clipped_high = (advantages > 0) & (ratio > 1 + clip_high)
    clipped_dual = (advantages < 0) & (ratio > clip_c)
    no_gradient = clipped_low | clipped_high | clipped_dual | (advantages == 0)
    bounded = torch.where(no_gradient, torch.zeros_like(log_ratio), log_ratio).exp()
    bounded = torch.where(clipped_low, 1 - clip_low, bounded)
    bounded = torch.where(clipped_high, 1 + clip_high, bounded)
    bounded = torch.where(clipped_dual, clip_c, bounded)
    return Surrogate(-advantages * bounded, clipped_low, clipped_high, clipped_dual)


LOSSES: dict[str, Loss] = {
    "gspo": gspo,
    "vanilla": vanilla,
}

DEFAULT_AGGREGATION: dict[str, str] = {
    "gspo": "seq-mean-token-mean",
    "vanilla": "token-mean",
}
"""The aggregation each loss's paper means."""
