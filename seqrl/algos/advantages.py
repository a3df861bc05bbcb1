"""Advantages: how much better a response is than what was to be expected.

Shape legend: N responses; `group` [N] int64 names the prompt each answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6


def grpo(reward: Tensor, group: Tensor, *, norm_by_std: bool) -> Tensor:
    """Group advantage: (r - mean of the group) / (std of the group + epsilon), [N] -> [N].

    GRPO (arXiv 2402.03300, section 4.1.2; GSPO arXiv 2507.18071, eq. 6), with the sample standard
    deviation; without the division it is Dr. GRPO's (arXiv 2503.20783). A group whose rewards are
    all equal gets exactly 0, whatever rounding its mean suffers.
    """
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    zeros = reward.new_zeros(count.numel())
    mean = zeros.index_add(0, index, reward) / count
    deviation = reward - mean[index]
    if norm_by_std:
        variance = zeros.index_add(0, index, deviation.square()) / (count - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt()[index] + EPSILON)
    return torch.where(all_equal(reward, group), torch.zeros_like(reward), deviation)


def all_equal(reward: Tensor, group: Tensor) -> Tensor:
    """[N] bool: one and the same reward in the response's whole group: nothing can be learnt from it."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    low = reward.new_full((count.numel(),), torch.inf).scatter_reduce(0, index, reward, "amin")
    high = reward.new_full((count.numel(),), -torch.inf).scatter_reduce(0, index, reward, "amax")
    return (low == high)[index]


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
}
"""By `algorithm.adv_estimator`."""
