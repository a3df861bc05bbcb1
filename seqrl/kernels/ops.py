"""The operations of a transformer between its matrix products, forward and backward.

On a CPU they are C (the files beside this one); elsewhere, and for types and sizes that the C does not have,
torch's own operations with the same meaning. `fits` says which. Norms, softmax and activations are computed
in float32 (in float64 of float64 tensors) whatever the tensors are held in.

Shape legend: T tokens, H hidden, I intermediate, Q and K query and key heads, D head size.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels.build import library
from seqrl.kernels.head import Sums, Tile, fold

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LANES = 16


def fits(stream: torch.dtype, compute: torch.dtype, device: torch.device, *widths: int) -> bool:
    """Whether there is C for a residual stream and products of these types and rows of these widths."""
    return (
        device.type == "cpu"
        and compute in _SUFFIX
        and stream in (torch.float32, compute)
        and all(width % _LANES == 0 for width in widths)
        and library() is not None
    )


def _call(name: str, *arguments: Any) -> None:
    """Calls the C function with tensors as pointers. Raises MemoryError where it found none."""
    said = [_address(x) if isinstance(x, Tensor) else x for x in arguments]
    if getattr(_loaded(), name)(*said):
        raise MemoryError(f"{name}: no memory for scratch space")


def _address(x: Tensor) -> int:
    assert x.is_contiguous(), "the C reads numbers side by side"
    return x.data_ptr()


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "asked without a look at `fits`"
    return loaded


def _types(stream: Tensor, compute: torch.dtype) -> str:
    return f"{_SUFFIX[stream.dtype]}_{_SUFFIX[compute]}"


# Matrix products


def _by_onednn(x: Tensor) -> bool:
    """MKL's float32 products are slow on processors of other makers; oneDNN's are not."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
    )


def recurring(rows: int, device: torch.device) -> int:
    """At least `rows`, and hardly more: one of few numbers of rows that come again and again.

    On a CPU oneDNN compiles a kernel for each shape it meets, which takes milliseconds, as long as many a
    product itself.
    """
    if device.type != "cpu":
        return rows
    if rows <= 8:
        return max(rows, 4)  # fewer rows are added up in another order
    step = max(4, 2 ** (rows.bit_length() - 5))
    return -(-rows // step) * step


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in] times the transpose of `weight` [out, in], plus `bias` [out]; without gradient."""
    if _by_onednn(x) and x.shape[0]:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            product(grad, weight.t()) if wants_x else None,
            grad.t() @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` with a gradient."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


# Norm and residual stream


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        out = x if delta is None else torch.empty_like(x)
        y, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
        _call(f"add_norm_{_types(x, dtype)}", rows, width, x, delta, weight, eps, out, y, rstd)
        ctx.save_for_backward(out, weight, rstd)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, carried: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        out, weight, rstd = ctx.saved_tensors
        if dy is None:
            assert carried is not None
            return carried, carried.to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None, None
        rows, width = out.shape
        dx, threads = torch.empty_like(out), torch.get_num_threads()
        dweight = torch.zeros(threads, width)
        _call(
            f"add_norm_backward_{_types(out, ctx.dtype)}",
            *(rows, width, out, weight, rstd, dy.contiguous()),
            *(None if carried is None else carried.contiguous(), dx, dweight, threads),
        )
        ddelta = dx.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, ddelta, dweight.sum(0).to(weight.dtype), None, None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual stream `x` [T, H] with `delta` [T, H] added, and its RMS norm in `dtype`.

    Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    if not fits(x.dtype, dtype, x.device, x.shape[1]):
        x = x if delta is None else x + delta
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, (F.rms_norm(wide, x.shape[1:], eps=eps) * weight).to(dtype)
    if torch.is_grad_enabled():
        return _AddNorm.apply(x, delta, weight, eps, dtype)
    out = x if delta is None else torch.empty_like(x)
    y = x.new_empty(x.shape, dtype=dtype)
    _call(f"add_norm_{_types(x, dtype)}", *x.shape, x, delta, weight, eps, out, y, None)
    return out, y


# Queries, keys and attention


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


def turned(
    qkv: Tensor, positions: Tensor, turn: Turn, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Q, D], k [T, K, D] and v [T, K, D] (a view) of `qkv` [T, (Q + 2K) D] at `positions` [T]."""
    rows = qkv.view(len(qkv), turn.heads + 2 * turn.kv_heads, turn.size)
    v = rows[:, turn.heads + turn.kv_heads :]
    stream = qkv.dtype if q_weight is None else q_weight.dtype
    if not fits(stream, qkv.dtype, qkv.device, turn.size // 2) or _wants_gradient(qkv):
        return *_turned_by_torch(rows, positions, turn, q_weight, k_weight), v
    q = qkv.new_empty(len(qkv), turn.heads, turn.size)
    k = qkv.new_empty(len(qkv), turn.kv_heads, turn.size)
    _call(
        f"turn_{_SUFFIX[stream]}_{_SUFFIX[qkv.dtype]}",
        *(len(qkv), turn.heads, turn.kv_heads, turn.size, qkv, q_weight, k_weight, turn.eps),
        *(turn.cos, turn.sin, positions, q, k, None, None, None),
    )
    return q, k, v


def _turned_wide(
    qkv: Tensor, positions: Tensor, turn: Turn, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of `turned` as float32, in C."""
    stream = qkv.dtype if q_weight is None else q_weight.dtype
    sizes = (turn.heads, turn.kv_heads, turn.kv_heads)
    q, k, v = (torch.empty(len(qkv), heads, turn.size) for heads in sizes)
    _call(
        f"turn_{_SUFFIX[stream]}_{_SUFFIX[qkv.dtype]}",
        *(len(qkv), turn.heads, turn.kv_heads, turn.size, qkv, q_weight, k_weight, turn.eps),
        *(turn.cos, turn.sin, positions, None, None, q, k, v),
    )
    return q, k, v


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _turned_by_torch(
    rows: Tensor, positions: Tensor, turn: Turn, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k = rows[:, : turn.heads], rows[:, turn.heads : turn.heads + turn.kv_heads]
    wide = torch.promote_types(rows.dtype, torch.float32)
    cos, sin = (table[positions][:, None].to(wide) for table in (turn.cos, turn.sin))  # [T, 1, D / 2]

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.to(wide)
        if weight is not None:
            x = F.rms_norm(x, (turn.size,), eps=turn.eps) * weight
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(rows.dtype)

    return one(q, q_weight), one(k, k_weight)


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Causal attention in C (see `fits`), without gradient: [T, Q, D] in q's type, and the log-sum-exp of
    the scores [T, Q] float32; 0 for tokens of no sequence."""
    dtype, (tokens, heads, _) = q.dtype, q.shape
    q, k, v = (x.float().contiguous() for x in (q, k, v))
    out, lse = torch.zeros_like(q), q.new_zeros(tokens, heads)
    _call("attend_forward", *_of_spans(spans, q, k, v), out, lse)
    return out.to(dtype), lse


def _of_spans(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    for first, columns in ((spans.shared, spans.shared_columns), (spans.own, spans.own_columns)):
        assert not len(first) or int((first + columns).max()) <= len(q), "a span ends behind the last token"
    sizes = (len(spans.own), q.shape[1], k.shape[1], q.shape[2])
    return *sizes, q, k, v, spans.shared, spans.shared_columns, spans.own, spans.own_columns


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
        with torch.no_grad():
            out, lse = attend(*_turned_wide(qkv, positions, turn, q_weight, k_weight), spans)
        out = out.to(qkv.dtype)
        ctx.save_for_backward(qkv, q_weight, k_weight, positions, out, lse)
        ctx.turn, ctx.spans = turn, spans
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, positions, out, lse = ctx.saved_tensors
        turn, threads = ctx.turn, torch.get_num_threads()
        q, k, v = _turned_wide(qkv, positions, turn, q_weight, k_weight)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        _call(
            "attend_backward",
            *(*_of_spans(ctx.spans, q, k, v), out.float(), lse, grad.float().contiguous()),
            *(torch.empty_like(lse), len(q), dq, dk, dv),
        )
        dqkv = torch.empty_like(qkv)
        dweights = torch.zeros(2, threads, turn.size)
        stream = qkv if q_weight is None else q_weight
        _call(
            f"turn_backward_{_types(stream, qkv.dtype)}",
            *(len(q), turn.heads, turn.kv_heads, turn.size, qkv, q_weight, k_weight, turn.eps),
            *(turn.cos, turn.sin, positions, dq, dk, dv, dqkv),
            *(dweights[0], dweights[1], threads),
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
    if torch.is_grad_enabled():
        return _SelfAttention.apply(qkv, q_weight, k_weight, positions, turn, spans)
    return attend(*_turned_wide(qkv, positions, turn, q_weight, k_weight), spans)[0].to(qkv.dtype).flatten(1)


# Gated feed-forward layers


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `gate_up` [T, 2 I] -> [T, I] (SwiGLU, arXiv 2002.05202)."""
    width = gate_up.shape[1] // 2
    if not fits(gate_up.dtype, gate_up.dtype, gate_up.device, width):
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up
    if _wants_gradient(gate_up):
        return _Gated.apply(gate_up)
    out = gate_up.new_empty(len(gate_up), width)
    _call(f"gate_{_SUFFIX[gate_up.dtype]}", len(gate_up), width, gate_up, out)
    return out


def gated_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient [T, 2 I] with respect to `gate_up`, given `grad` [T, I]."""
    if not fits(gate_up.dtype, gate_up.dtype, gate_up.device, grad.shape[1]):
        gate, up = gate_up.chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        of_gate = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        return torch.cat([of_gate, grad * gate * sigmoid], dim=1)
    result = torch.empty_like(gate_up)
    _call(f"gate_backward_{_SUFFIX[gate_up.dtype]}", *grad.shape, gate_up, grad.contiguous(), result)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(gate_up, grad)


# Mixtures of experts


def combined(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """y[t] = sum over j of weights[t, j] x[place[t, j]]: `x` [P, H], `place` [T, k] a permutation of P,
    `weights` [T, k] float32 (None: ones) -> [T, H]. Without gradient."""
    if not fits(x.dtype, x.dtype, x.device, x.shape[1]):
        by_token = x.index_select(0, place.flatten()).view(*place.shape, x.shape[1])
        return (by_token if weights is None else by_token * weights[..., None].to(x.dtype)).sum(1)
    out = x.new_empty(len(place), x.shape[1])
    _call(f"combine_{_SUFFIX[x.dtype]}", *place.shape, x.shape[1], x, place, weights, out)
    return out


def combined_backward(x: Tensor, place: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to `x` [P, H] and `weights` [T, k] of `combined`, given `grad` [T, H]."""
    if not fits(x.dtype, x.dtype, x.device, x.shape[1]):
        flat = place.flatten()
        wide = grad[:, None] * weights[..., None].to(x.dtype)  # [T, k, H]
        of_weights = (x.index_select(0, flat).view_as(wide) * grad[:, None]).sum(-1)
        return torch.empty_like(x).index_copy(0, flat, wide.flatten(0, 1)), of_weights.to(weights.dtype)
    dx, dweights = torch.empty_like(x), torch.empty_like(weights)
    _call(
        f"combine_backward_{_SUFFIX[x.dtype]}",
        *(*place.shape, x.shape[1], x, place, weights, grad.contiguous(), dx, dweights),
    )
    return dx, dweights


def expert_products(x: Tensor, token: Tensor | None, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r of the result [P, out] is `x[token[r]]` (x[r] where that is None) times the transpose of its
    expert's matrix in `weight` [E, out, in]. In C (see `fits`), without gradient.

    Expert e has the rows up to `ends[e]`, [E] int64, from where the expert before it ends.
    """
    experts, outs, ins = weight.shape
    out = torch.empty(len(x) if token is None else len(token), outs)
    _call("expert_forward", experts, ins, outs, x.float(), token, weight.float(), ends, out)
    return out.to(x.dtype)


def expert_products_backward(
    grad: Tensor, x: Tensor, token: Tensor | None, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the rows taken from `x`, [P, in], and to `weight`, given `grad` [P, out]."""
    (experts, outs, ins), wide = weight.shape, grad.float()
    dx, dweight = torch.empty(len(grad), ins), torch.empty(weight.shape)
    _call("expert_backward_x", experts, ins, outs, wide, weight.float(), ends, dx)
    _call("expert_backward_w", experts, ins, outs, wide, x.float(), token, ends, dweight)
    return dx.to(x.dtype), dweight.to(weight.dtype)


@dataclass(frozen=True)
class PackedExperts:
    """A matrix per expert, [E, out, in], laid out for `__call__`: [E, out / 16, in, 16]."""

    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedExperts:
        experts, outs, ins = weight.shape
        return cls(weight.view(experts, outs // _LANES, _LANES, ins).transpose(2, 3).contiguous())

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        """Row r of `x` [P, in] times the transpose of its expert's matrix: [P, out] in the matrix's type.
        Expert e has the rows up to `ends[e]`, [E] int64."""
        experts, blocks, ins, _ = self.weight.shape
        out = self.weight.new_empty(len(x), blocks * _LANES)
        _call(
            f"expert_products_{_SUFFIX[self.weight.dtype]}",
            *(experts, ins, blocks * _LANES, x.float(), self.weight, ends, out),
        )
        return out


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can lay out matrices of this type for many products."""
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and (
            dtype == torch.float32
            or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


# Decoding


@dataclass
class Cache:
    """Keys and values of rows that grow, of one layer. `keys` [slots, K, blocks, D, 16], a block being 16
    columns side by side; `values` [slots, K, 16 blocks, D]. Untouched columns take no memory."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, slots: int, columns: int, kv_heads: int, size: int, dtype: torch.dtype) -> Cache:
        blocks = -(-columns // _LANES)
        return cls(
            torch.empty(slots, kv_heads, blocks, size, _LANES, dtype=dtype),
            torch.empty(slots, kv_heads, blocks * _LANES, size, dtype=dtype),
        )

    def append(self, k: Tensor, v: Tensor, slot: Tensor, column: Tensor) -> None:
        """Puts the key and value of each token, [T, K, D], into `column` of `slot`, both [T] int64; tokens
        beyond these two are left out."""
        (_, kv_heads, size), tokens = k.shape, len(slot)
        _call(
            f"append_{_SUFFIX[k.dtype]}",
            *(tokens, kv_heads, size, self.keys.shape[2], k, v.data_ptr(), v.stride(0)),
            *(self.keys, self.values, slot, column),
        )


def attend_cached(
    q: Tensor,
    prompts: Cache,
    prompt: Tensor,
    prompt_columns: Tensor,
    own: Cache,
    slot: Tensor,
    own_columns: Tensor,
) -> Tensor:
    """One query a row, `q` [B, Q, D], over the columns of its prompt and then its own: [B, Q D].

    There may be more rows than `slot` has, which get 0. Row r has the prompt in slot `prompt[r]` of
    `prompts`, of `prompt_columns[prompt[r]]` columns, and `own_columns[r]` in slot `slot[r]` of `own`.
    """
    out = torch.zeros_like(q)
    _call(
        f"attend_cached_{_SUFFIX[q.dtype]}",
        *(len(slot), q.shape[1], own.keys.shape[1], q.shape[2], q),
        *(prompts.keys, prompts.values, prompts.keys.shape[2], prompt, prompt_columns),
        *(own.keys, own.values, own.keys.shape[2], slot, own_columns, out),
    )
    return out.flatten(1)


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of `logits` [B, V] float32 with one uniform each [B] float64, and its log-prob."""
    logits, tokens = logits.contiguous(), torch.empty(len(logits), dtype=torch.long)
    _call("draw", *logits.shape, logits, 1 / temperature, uniforms.contiguous(), tokens)
    # By the function of training, so that it says the same, bit for bit.
    sums = Sums.nothing_yet(len(tokens), torch.float32, logits.device)
    fold(Tile(logits, 0, tokens, 1 / temperature), sums)
    return tokens, sums.chosen - sums.log_total
