"""Attention on CUDA in half precision: torch's FlashAttention, causal over flat tokens with a gradient, and
of one query a row over the pages of a cache. For pages there are torch's own operations beside it.

Shape legend: T tokens, B rows, Q and K query and key heads, D head size; a page is C columns of a row.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

FLASH_PAGE = 256
"""Columns of a page: FlashAttention 2 wants a multiple of them."""


def is_flash(device_tensor: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether there is FlashAttention where this tensor is, for products in `dtype` and heads of `size`."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device_tensor.is_cuda and half and size % 8 == 0 and size <= 256


@functools.cache
def has_pages() -> bool:
    """Whether this torch's FlashAttention looks into pages; that of 2.13 does, that of 2.9 does not."""
    from torch.nn.attention.varlen import varlen_attn

    return {"seqused_k", "block_table", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys()


def attend_flat(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, longest: int
) -> Tensor:
    """Causal attention of `q` [T', Q, D] to `k` and `v` [T, K, D] within each sequence: [T', Q, D].

    Sequence i has the queries `q_offsets[i]:q_offsets[i+1]`, both [N+1] int32, which are the last of its
    keys; `longest` is the most keys of one.
    """
    from torch.nn.attention.varlen import varlen_attn

    attended: Any = varlen_attn(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        longest,
        longest,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended


def attend_pages(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, rows: Tensor | None = None
) -> Tensor:
    """One query a row, `q` [B, Q, D], over the first `lengths` [B] int32 columns of its pages: [B, Q D].

    `keys` and `values` are [pages, C, K, D]; `table` [B, W] int32 has the pages of each row, in order.
    `rows` are the numbers from 0 to B [B+1] int32, where FlashAttention is to be used.
    """
    if rows is None:
        return _attend_pages_by_torch(q, keys, values, table, lengths)
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.shape[1] != keys.shape[2]
    attended: Any = varlen_attn(
        q,
        keys,
        values,
        rows,
        rows,  # not read: the table says where keys are
        1,
        table.shape[1] * keys.shape[1],
        # No window: only so are the heads that share keys computed together.
        enable_gqa=grouped,
        seqused_k=lengths,
        block_table=table,
        # Split over a row's keys where rows are few; FlashAttention 2 does so rightly only of grouped heads.
        num_splits=None if grouped else 1,
    )
    return attended.flatten(1)


def _attend_pages_by_torch(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Page after page, with what is known so far."""
    rows, columns, kv_heads, size = len(q), keys.shape[1], keys.shape[2], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q * size**-0.5).view(rows, kv_heads, -1, size)
    out = torch.zeros_like(q, dtype=wide)  # [B, K, Q / K, D]
    total = out.new_zeros(*out.shape[:-1], 1)
    largest = torch.full_like(total, torch.finfo(wide).min)
    column = torch.arange(columns, device=q.device)
    for number, page in enumerate(table.unbind(1)):
        k, v = (x.index_select(0, page) for x in (keys, values))  # [B, C, K, D]
        scores = (q @ k.permute(0, 2, 3, 1)).to(wide)  # [B, K, Q / K, C]
        seen = (number * columns + column < lengths[:, None])[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        keep, share = (before - largest).exp(), (scores - largest).exp()
        total = total * keep + share.sum(-1, keepdim=True)
        out = out * keep + (share.to(v.dtype) @ v.transpose(1, 2)).to(wide)
    return (out / total).to(values.dtype).flatten(1)
