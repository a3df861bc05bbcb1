"""Reductions over the sequences of a flat batch.

Shape legend: N sequences, T response tokens in all; `offsets` [N+1] bounds each sequence's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_index(offsets: Tensor) -> Tensor:
    """The sequence of each token: [N+1] -> [T] int64."""
    return torch.arange(offsets.numel() - 1, device=offsets.device).repeat_interleave(offsets.diff())


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each sequence: [T] -> [N]; an empty sequence gives 0."""
    return values.new_zeros(offsets.numel() - 1).index_add(0, segment_index(offsets), values)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each sequence: [T] -> [N]; an empty sequence gives 0."""
    return segment_sum(values, offsets) / offsets.diff().clamp(min=1)
