"""Reductions and sums over the sequences of a flat batch.

Shape legend: N sequences, T response tokens in all; `offsets` [N+1] bounds each sequence's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_index(offsets: Tensor, tokens: int | None = None) -> Tensor:
    """The sequence of each token: [N+1] -> [T] int64. On CUDA it waits for the device, unless it is told T,
    the number of `tokens`."""
    return torch.repeat_interleave(offsets.diff(), output_size=tokens)


def segment_position(offsets: Tensor) -> Tensor:
    """How many tokens of its sequence stand before each token: [N+1] -> [T] int64."""
    index = segment_index(offsets)
    return torch.arange(index.numel(), device=offsets.device) - offsets[index]


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each sequence: [T] -> [N]; an empty sequence gives 0."""
    if values.is_floating_point() and offsets.numel() > 1:  # ten times as fast as `index_add`
        # The check of the lengths waits for the device.
        return torch.segment_reduce(values, "sum", lengths=offsets.diff(), unsafe=values.is_cuda)
    index = segment_index(offsets, values.numel())
    return values.new_zeros(offsets.numel() - 1).index_add(0, index, values)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each sequence: [T] -> [N]; an empty sequence gives 0."""
    return segment_sum(values, offsets) / offsets.diff().clamp(min=1)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Maximum over each sequence: [T] -> [N]; an empty sequence gives 0."""
    zeros, index = values.new_zeros(offsets.numel() - 1), segment_index(offsets, values.numel())
    return zeros.scatter_reduce(0, index, values, "amax", include_self=False)


def segment_return(values: Tensor, offsets: Tensor, *, discount: float) -> Tensor:
    """What is to come, each token's own included: sum over k >= 0 of discount^k * values[t + k], [T] -> [T].

    Within the token's sequence. Works by doubling: after step s each token holds the sum of its next 2s
    tokens, so that a batch takes log2(longest) steps, and no power of the discount is ever divided by.
    """
    to_come = offsets.diff()[segment_index(offsets)] - segment_position(offsets)
    token = torch.arange(values.numel(), device=values.device)
    longest = int(to_come.max()) if values.numel() else 0
    step = 1
    while step < longest:
        later = discount**step * values[(token + step).clamp(max=values.numel() - 1)]
        values = values + torch.where(to_come > step, later, torch.zeros_like(later))
        step *= 2
    return values


def segment_cumsum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the sequence's tokens up to each token, its own included: [T] -> [T]."""
    mirrored = offsets[-1] - offsets.flip(0)
    return segment_return(values.flip(0), mirrored, discount=1.0).flip(0)
