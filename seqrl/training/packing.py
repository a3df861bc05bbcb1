"""Which sequences go through the model together, and how they do so without padding.

A micro-batch is one row of flat tokens. Everything in a transformer but attention treats each token
by itself, so only attention has to know where a sequence ends: `flat_attention` lays queries, keys
and values out as [sequences, longest], runs plain causal attention, and takes the tokens back.

Shape legend: N sequences, T tokens in all, L longest sequence, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.errors import UserError

ATTENTION_NAME = "seqrl_flat"


def by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits sequences into as few micro-batches as fit `max_tokens`, each of similar lengths.

    Longest first, so that sequences laid side by side for attention waste little, and the largest
    micro-batch fails for lack of memory at once if at all. A sequence longer than `max_tokens` goes
    alone. Returns indices into `lengths`.
    """
    parts: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not parts or lengths[index] > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(index)
        room -= lengths[index]
    return parts


def by_count(sequences: int, per_part: int) -> list[list[int]]:
    """Splits sequences, in order, into micro-batches of `per_part`."""
    return [list(range(i, min(i + per_part, sequences))) for i in range(0, sequences, per_part)]


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a flat row begin and end, for attention."""

    sequences: int
    longest: int
    to_padded: Tensor | None
    """[N*L] index into T (0 where padding); None where all sequences have one length."""
    to_flat: Tensor | None
    """[T] index into N*L."""
    positions: Tensor
    """[T] position of each token within its sequence."""

    @classmethod
    def of(cls, offsets: Tensor) -> Layout:
        lengths = offsets.diff()
        sequences, longest = lengths.numel(), int(lengths.max())
        total = int(offsets[-1])
        positions = torch.arange(total, device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
        if total == sequences * longest:
            return cls(sequences, longest, None, None, positions)
        row = torch.arange(sequences, device=offsets.device).repeat_interleave(lengths)
        to_flat = row * longest + positions
        to_padded = torch.zeros(sequences * longest, dtype=torch.long, device=offsets.device)
        to_padded[to_flat] = torch.arange(total, device=offsets.device)
        return cls(sequences, longest, to_padded, to_flat, positions)

    def pad(self, x: Tensor) -> Tensor:
        """[1, H, T, D] -> [N, H, L, D]."""
        rows = x[0].transpose(0, 1)
        if self.to_padded is not None:
            rows = rows.index_select(0, self.to_padded)
        return rows.reshape(self.sequences, self.longest, *rows.shape[1:]).transpose(1, 2)

    def flatten(self, x: Tensor) -> Tensor:
        """[N, H, L, D] -> [1, T, H, D]."""
        rows = x.transpose(1, 2).flatten(0, 1)
        if self.to_flat is not None:
            rows = rows.index_select(0, self.to_flat)
        return rows[None]


def flat_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each sequence of one flat row, in the form transformers calls.

    query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]. Without a layout (the model is
    called as anyone would call it) it is transformers' own attention. There is no dropout: a ratio
    compares one network with itself.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others | {"dropout": 0.0}
        )
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} needs attention with {name}, which seqrl's training forward "
                "does not have; choose a model of another architecture"
            )
    mask = None
    if sliding_window is not None and layout.longest > sliding_window:
        i = torch.arange(layout.longest, device=query.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < sliding_window)
    out = F.scaled_dot_product_attention(
        layout.pad(query),
        layout.pad(key),
        layout.pad(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return layout.flatten(out), None


def register() -> None:
    """Makes `flat_attention` known to transformers as an attention implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(**arguments: Any) -> Tensor | None:
        # A flat row comes without a mask, and must not get one of [T, T].
        return None if arguments["attention_mask"] is None else sdpa_mask(**arguments)

    AttentionInterface.register(ATTENTION_NAME, flat_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)
