"""Queries and keys, and causal attention over flat tokens: of training, with its gradient, and of decoding.

In C where it `fits`; for what else there is, `turned` has torch's own operations, compiled on CUDA (`fused`),
and the caller attends.

Shape legend: T tokens, B rows, Q and K query and key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels.call import LANES, SUFFIX, call, fits, types_of, words_of
from seqrl.kernels.fused import fused
from seqrl.kernels.record import current, made


@dataclass(frozen=True)
class Turn:
    """How the projections of a layer become queries and keys: normed by head where there are weights, and
    turned by position (RoPE, arXiv 2104.09864). cos, sin: [positions, D / 2] float32."""

    heads: int
    kv_heads: int
    size: int
    cos: Tensor
    sin: Tensor
    eps: float = 0.0


@dataclass(frozen=True)
class Spans:
    """Which tokens of a flat row a sequence sees: some that are computed for it by another, then its own,
    each of those up to itself. All [N] int64."""

    shared: Tensor
    shared_columns: Tensor
    own: Tensor
    own_columns: Tensor

    def check(self, tokens: int) -> None:
        """That the C reads and writes nothing behind the last of them."""
        for first, columns in ((self.shared, self.shared_columns), (self.own, self.own_columns)):
            assert not len(first) or int((first + columns).max()) <= tokens, (
                "a span ends behind the last token"
            )


def turned(
    qkv: Tensor, positions: Tensor, turn: Turn, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Q, D], k [T, K, D] and v [T, K, D] (a view) of `qkv` [T, (Q + 2K) D] at `positions` [T].

    With a gradient where there is no C for it alone; where there is, `self_attention` has one.
    """
    tokens = qkv.shape[0]
    rows = qkv.view(tokens, turn.heads + 2 * turn.kv_heads, turn.size)
    v = rows[:, turn.heads + turn.kv_heads :]
    stream = qkv.dtype if q_weight is None else q_weight.dtype
    if qkv.is_cuda:
        return _Turned.apply(rows, positions, turn, q_weight, k_weight)
    if not fits(stream, qkv.dtype, qkv.device, turn.size // 2):
        given = rows, positions, turn.heads, turn.kv_heads, turn.cos, turn.sin, q_weight, k_weight
        return *_turned_by_torch(*given, turn.eps), v
    q = qkv.new_empty(tokens, turn.heads, turn.size)
    k = qkv.new_empty(tokens, turn.kv_heads, turn.size)
    call(*_turn_arguments("turn", qkv, positions, turn, q_weight, k_weight), q, k)
    return q, k, v


def _turn_arguments(
    name: str, qkv: Tensor, positions: Tensor, turn: Turn, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Any, ...]:
    """What `turn` and its gradient in C both take, their name first."""
    stream = qkv.dtype if q_weight is None else q_weight.dtype
    sizes = (qkv.shape[0], turn.heads, turn.kv_heads, turn.size)
    weights = (q_weight, k_weight, turn.eps)
    return f"{name}_{types_of(stream, qkv.dtype)}", *sizes, qkv, *weights, turn.cos, turn.sin, positions


@fused
def _turned_by_torch(
    rows: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    cos, sin = (table[positions][:, None].to(wide) for table in (cos, sin))  # [T, 1, D / 2]

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.to(wide)
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=eps) * weight
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(rows.dtype)

    return one(rows[:, :heads], q_weight), one(rows[:, heads : heads + kv_heads], k_weight)


@fused
def _turned_backward_by_torch(
    rows: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *grads: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the rows and of the weights, given those of q, k and v."""
    dq, dk, dv = grads
    wide = torch.promote_types(rows.dtype, torch.float32)
    cos, sin = (table[positions][:, None].to(wide) for table in (cos, sin))

    def one(x: Tensor, weight: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = grad.to(wide).chunk(2, dim=-1)
        grad = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
        if weight is None:
            return grad, None
        x = x.to(wide)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        x = x * rstd
        of_weight, grad = (grad * x).sum((0, 1)).to(weight.dtype), grad * weight
        return (grad - x * (grad * x).mean(-1, keepdim=True)) * rstd, of_weight

    of_q, of_q_weight = one(rows[:, :heads], q_weight, dq)
    of_k, of_k_weight = one(rows[:, heads : heads + kv_heads], k_weight, dk)
    return torch.cat([of_q.to(rows.dtype), of_k.to(rows.dtype), dv], dim=1), of_q_weight, of_k_weight


class _Turned(torch.autograd.Function):
    """Keeps the rows [T, Q + 2K, D] alone."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        positions: Tensor,
        turn: Turn,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, positions, q_weight, k_weight)
        ctx.turn = turn
        given = rows, positions, turn.heads, turn.kv_heads, turn.cos, turn.sin, q_weight, k_weight
        q, k = _turned_by_torch(*given, turn.eps)
        return q, k, rows[:, turn.heads + turn.kv_heads :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, positions, *weights), turn = ctx.saved_tensors, ctx.turn
        given = rows, positions, turn.heads, turn.kv_heads, turn.cos, turn.sin, *weights, turn.eps
        of_rows, *of_weights = _turned_backward_by_torch(*given, *grads)
        return of_rows, None, None, *of_weights


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Causal attention in C (see `fits`), without gradient: [T, Q, D] in q's type, and the log-sum-exp of
    the scores [T, Q] float32; 0 for tokens of no sequence."""
    q, k, v = _side_by_side(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    call(f"attend_forward_{SUFFIX[q.dtype]}", *_of_spans(spans, q, k, v), len(q), out, lse)
    return out, lse


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values alone may be a part of wider rows."""
    size = v.shape[2]
    return q.contiguous(), k.contiguous(), v if v.stride()[1:] == (size, 1) else v.contiguous()


def _of_spans(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    spans.check(len(q))
    sizes = (len(spans.own), q.shape[1], k.shape[1], q.shape[2])
    of_v = v.data_ptr(), v.stride(0)
    return *sizes, q, k, *of_v, spans.shared, spans.shared_columns, spans.own, spans.own_columns


class _SelfAttention(torch.autograd.Function):
    """Keeps the projections and the output; queries and keys are made again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        positions: Tensor,
        turn: Turn,
        spans: Spans,
    ) -> Tensor:
        out, lse = made(lambda: attend(*turned(qkv, positions, turn, q_weight, k_weight), spans))
        ctx.save_for_backward(qkv, q_weight, k_weight, positions, out, lse)
        ctx.turn, ctx.spans = turn, spans
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, positions, out, lse = ctx.saved_tensors
        turn, threads = ctx.turn, torch.get_num_threads()
        q, k, v = _side_by_side(*turned(qkv, positions, turn, q_weight, k_weight))
        dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
        call(
            f"attend_backward_{SUFFIX[q.dtype]}",
            *(*_of_spans(ctx.spans, q, k, v), out, lse, grad.contiguous()),
            *(torch.empty_like(lse), len(q), dq, dk, dv),
        )
        dqkv = torch.empty_like(qkv)
        dweights = torch.zeros(2, threads, turn.size)
        call(
            *_turn_arguments("turn_backward", qkv, positions, turn, q_weight, k_weight),
            *(dq, dk, dv, dqkv, dweights[0], dweights[1], threads),
        )
        if q_weight is None:
            return dqkv, None, None, None, None, None
        dq_weight, dk_weight = dweights.sum(1).to(q_weight.dtype)
        return dqkv, dq_weight, dk_weight, None, None, None


def self_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    turn: Turn,
    spans: Spans,
) -> Tensor:
    """Causal attention of `qkv` [T, (Q + 2K) D] in C (see `fits`): [T, Q D]."""
    if torch.is_grad_enabled() or current() is not None:
        return _SelfAttention.apply(qkv, q_weight, k_weight, positions, turn, spans)
    return attend(*turned(qkv, positions, turn, q_weight, k_weight), spans)[0].flatten(1)


@dataclass
class Cache:
    """Keys and values of rows that grow, of one layer. A block is 16 columns side by side."""

    keys: Tensor
    """[slots, K, blocks, D, 16]; in bfloat16 [slots, K, blocks, D / 2, 16, 2]."""
    values: Tensor
    """[slots, K, 16 blocks, D]; in bfloat16 on a processor with tiles as cache_tiles.c says."""

    @classmethod
    def of(cls, slots: int, columns: int, kv_heads: int, size: int, dtype: torch.dtype) -> Cache:
        blocks = -(-columns // (2 * LANES)) * 2
        return cls(
            torch.empty(slots, kv_heads, blocks, *words_of(size, dtype), dtype=dtype),
            torch.empty(slots, kv_heads, blocks * LANES, size, dtype=dtype),
        )

    @property
    def blocks(self) -> int:
        """Of each row."""
        return self.keys.shape[2]

    @property
    def columns(self) -> int:
        """Of each row that there is room for."""
        return self.values.shape[2]

    def grow(self, columns: int) -> None:
        """Makes room for so many columns of each row."""
        slots, kv_heads, filled, size = self.values.shape
        larger = Cache.of(slots, columns, kv_heads, size, self.values.dtype)
        larger.keys[:, :, : filled // LANES], larger.values[:, :, :filled] = self.keys, self.values
        self.keys, self.values = larger.keys, larger.values

    def append(self, k: Tensor, v: Tensor, slot: Tensor, column: Tensor) -> None:
        """Puts the key and value of each token, [T, K, D], into `column` of `slot`, both [T] int64; tokens
        beyond these two are left out."""
        (_, kv_heads, size), tokens = k.shape, len(slot)
        call(
            f"append_{SUFFIX[k.dtype]}",
            *(tokens, kv_heads, size, self.blocks, k, v.data_ptr(), v.stride(0)),
            *(self.keys, self.values, slot, column),
        )


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: Cache,
    prompt: Tensor,
    prompt_columns: Tensor,
    own: Cache,
    slot: Tensor,
    own_columns: Tensor,
) -> Tensor:
    """One query a row, `q` [B, Q, D], over the columns of its prompt and then its own: [B, Q D].

    There may be more rows than `slot` has, which get 0. Row r has the prompt in slot `prompt[r]` of
    `prompts`, of `prompt_columns[prompt[r]]` columns, and `own_columns[r]` in slot `slot[r]` of `own`, in the
    last of which its key and value are put first; `k` and `v` [B, K, D].
    """
    rows, out = slot.shape[0], torch.empty_like(q)
    out[rows:] = 0
    call(
        f"attend_cached_{SUFFIX[q.dtype]}",
        *(rows, q.shape[1], own.keys.shape[1], q.shape[2], q, k, v.data_ptr(), v.stride(0)),
        *(prompts.keys, prompts.values, prompts.blocks, prompt, prompt_columns),
        *(own.keys, own.values, own.blocks, slot, own_columns, out),
    )
    return out.flatten(1)
