"""Losses with one ratio for a whole sequence.

Shape legend: N sequences, T response tokens in all, `offsets` [N+1] bounds each sequence's tokens.
With d_it = logprobs - old_logprobs, the sequence ratio is s_i = exp(mean over t of d_it).

Each is written token by token: token t carries sg[s_i] * exp(logprobs - sg[logprobs]), the value of s_i
and the token's own share of its gradient (sg stops the gradient). Under `seq-mean-token-mean`, the one
aggregation they go with, value and gradient are those of the papers' sequence form.

References:
    GSPO  Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071
    GMPO  Zhao et al. 2025, Geometric-Mean Policy Optimization, arXiv 2507.20673
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqrl.algos.losses.base import Surrogate, clipped
from seqrl.algos.numerics import exp_or_tangent
from seqrl.algos.segments import segment_index, segment_mean


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
    log_ratio = segment_mean(current - old_logprobs, offsets)[segment_index(offsets, logprobs.numel())]
    return clipped(log_ratio + (logprobs - current), advantages, clip_low, clip_high, clip_c)


def gspo_token(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> Surrogate:
    """GSPO-token: the sequence's ratio, an advantage for each token (arXiv 2507.18071, eq. 13-14).

    `gspo` is written in this form, so that the two differ by their advantages alone: here A_it may vary
    within a sequence, and a token is clipped on the side of its own sign. Arguments as in `gspo`.
    """
    return gspo(
        logprobs,
        old_logprobs,
        advantages,
        offsets,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_c=clip_c,
    )


def geo_mean(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GMPO: the geometric mean of token ratios that were clipped one by one (arXiv 2507.20673).

    The paper's objective, for a sequence of advantage A, is A * exp(mean over t of c_t), where c_t is
        min(d_t, clip_high)  with A > 0,
        max(d_t, -clip_low)  with A < 0:
    clipped on the log scale, token by token, on the side that A's sign makes pessimistic. A clipped
    token gives no gradient, but counts in the mean and so in the weight of all the others.

    Departs from the paper in that a geometric mean above e^20 (only A < 0 leaves it unbounded) goes on
    along its tangent.

    Args:
        logprobs, old_logprobs, offsets: as in `gspo`.
        advantages: [T], constant over a sequence.
        clip_low, clip_high: each ratio is clipped to [exp(-clip_low), exp(clip_high)]; the paper: 0.4.
    """
    current = logprobs.detach()
    log_ratio = current - old_logprobs
    clipped_low = (advantages < 0) & (log_ratio < -clip_low)
    clipped_high = (advantages > 0) & (log_ratio > clip_high)
    bounded = torch.where(clipped_low, -clip_low, torch.where(clipped_high, clip_high, log_ratio))
    mean = segment_mean(bounded, offsets)[segment_index(offsets, logprobs.numel())]
    share = torch.where(clipped_low | clipped_high, torch.zeros_like(mean), logprobs - current)
    values = -advantages * exp_or_tangent(mean + share)
    return Surrogate(values, clipped_low, clipped_high, torch.zeros_like(clipped_low))
