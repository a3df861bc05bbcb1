"""The two blocks of a layer, each in one call forward and one backward, on a processor with a matrix unit
(kernels/blocks.c).

Asked operation by operation, a twelfth of an update is Python, which finds its own things far from the
processor after each.

Shape legend: T tokens, H hidden, Q and K query and key heads, D head size, I intermediate.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64, c_long, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import Spans, Tiles, Turn, current, fits, made, self_attention
from seqrl.kernels.call import address, call
from seqrl.native.weights import Dense, Layer, Linear

_PARTS = 3
"""Of a matrix, at most: queries, keys and values."""


class _Matrix(Structure):
    _fields_ = [
        *((name, c_long) for name in ("outs", "ins", "is_f32", "parts")),
        *((name, c_int64 * _PARTS) for name in ("ends", "sources", "gradients")),
        *((name, c_void_p) for name in ("columns", "bias")),
    ]


class _AttentionBlock(Structure):
    _fields_ = [
        *((name, c_long) for name in ("rows", "hidden", "heads", "kv_heads", "size")),
        *((name, c_long) for name in ("stream_is_f32", "threads", "sequences")),
        *((name, c_void_p) for name in ("cos", "sin", "positions")),
        *((name, c_void_p) for name in ("shared", "shared_columns", "own", "own_columns")),
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm", "next_norm")),
        *((name, c_float) for name in ("eps", "head_eps", "next_eps")),
        *((name, _Matrix) for name in ("qkv", "out")),
        *((name, c_void_p) for name in ("x", "delta", "stream", "next_stream")),
        *((name, c_void_p) for name in ("normed", "projected", "seen", "next_normed")),
        *((name, c_void_p) for name in ("rstd", "lse", "next_rstd")),
        *((name, c_void_p) for name in ("of_next_stream", "of_next_normed", "of_x")),
        *((name, c_void_p) for name in ("of_norm", "of_q_norm", "of_k_norm", "of_next_norm")),
        *((name, c_void_p) for name in ("of_delta", "of_said", "of_projected")),
    ]


class _GatedBlock(Structure):
    _fields_ = [
        *((name, c_long) for name in ("rows", "width")),
        *((name, _Matrix) for name in ("gate_up", "down")),
        *((name, c_void_p) for name in ("y", "projected", "activation", "said")),
        *((name, c_void_p) for name in ("of_said", "of_activation", "of_projected", "of_y")),
    ]


@dataclass(frozen=True)
class Causal:
    """Attention over spans of the tokens themselves, in C."""

    positions: Tensor
    """[T]"""
    turn: Turn
    spans: Spans

    def __post_init__(self) -> None:
        self.spans.check(len(self.positions))

    def __call__(self, index: int, layer: Layer, qkv: Tensor) -> Tensor:
        return self_attention(qkv, layer.q_norm, layer.k_norm, self.positions, self.turn, self.spans)


class _Attended(NamedTuple):
    """What the attention block of a layer makes, all of it with a row for each token."""

    stream: Tensor
    """[T, H], what came in added up."""
    rstd: Tensor
    """[T], of its norm."""
    normed: Tensor
    """[T, H]"""
    projected: Tensor
    """[T, (Q + 2K) D]"""
    seen: Tensor
    """[T, Q D], by attention."""
    lse: Tensor
    """[T, Q], of its scores."""
    next_stream: Tensor
    next_rstd: Tensor
    next_normed: Tensor
    """The first three behind the block, as the next one takes them up."""


def attends(layer: Layer, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a block for the layer's attention from the residual stream `x` on."""
    return fits(x.dtype, dtype, x.device, x.shape[1]) and all(map(_is_read, (layer.qkv, layer.out)))


def attended(layer: Layer, x: Tensor, delta: Tensor | None, at: Causal) -> tuple[Tensor, Tensor]:
    """The residual stream `x` [T, H] with `delta` [T, H] and the layer's attention added, and its norm."""
    if torch.is_grad_enabled() or current() is not None:
        weights = (*_norms(layer), *_tensors(layer.qkv), *_tensors(layer.out))
        return _AttentionFunction.apply(layer, at, x, delta, *weights)
    made = _attend(layer, x, delta, at)
    return made.next_stream, made.next_normed


def _attend(layer: Layer, x: Tensor, delta: Tensor | None, at: Causal) -> _Attended:
    tokens, dtype, turn = len(x), torch.bfloat16, at.turn
    made = _Attended(
        stream=x if delta is None else torch.empty_like(x),
        rstd=x.new_empty(tokens, dtype=torch.float32),
        normed=torch.empty_like(x, dtype=dtype),
        projected=x.new_empty(tokens, (turn.heads + 2 * turn.kv_heads) * turn.size, dtype=dtype),
        seen=x.new_empty(tokens, turn.heads * turn.size, dtype=dtype),
        lse=x.new_empty(tokens, turn.heads, dtype=torch.float32),
        next_stream=torch.empty_like(x),
        next_rstd=x.new_empty(tokens, dtype=torch.float32),
        next_normed=torch.empty_like(x, dtype=dtype),
    )
    block = _attention_block(layer, at, made)
    block.x, block.delta = address(x), address(delta)
    call("attention_block", ctypes.addressof(block))
    return made


def _attention_block(layer: Layer, at: Causal, made: _Attended) -> _AttentionBlock:
    turn, spans = at.turn, at.spans
    return _AttentionBlock(
        rows=made.stream.shape[0],
        hidden=made.stream.shape[1],
        heads=turn.heads,
        kv_heads=turn.kv_heads,
        size=turn.size,
        stream_is_f32=made.stream.dtype == torch.float32,
        threads=torch.get_num_threads(),
        sequences=len(spans.own),
        cos=address(turn.cos),
        sin=address(turn.sin),
        positions=address(at.positions),
        shared=address(spans.shared),
        shared_columns=address(spans.shared_columns),
        own=address(spans.own),
        own_columns=address(spans.own_columns),
        norm=address(layer.attention_norm.weight),
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
        next_norm=address(layer.mlp_norm.weight),
        eps=layer.attention_norm.eps,
        head_eps=turn.eps,
        next_eps=layer.mlp_norm.eps,
        qkv=_matrix(layer.qkv),
        out=_matrix(layer.out),
        **{name: address(x) for name, x in made._asdict().items()},
    )


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layer, at: Causal, x: Tensor, delta: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if delta is not None and (record := current()) is not None:
            record.forget(delta)
        attended = _Attended(*made(lambda: _attend(layer, x, delta, at)))
        ctx.layer, ctx.at = layer, at
        ctx.save_for_backward(*attended)
        return attended.next_stream, attended.next_normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
        made, layer, wants_delta = _Attended(*ctx.saved_tensors), ctx.layer, ctx.needs_input_grad[3]
        block = _attention_block(layer, ctx.at, made)
        of_stream, of_normed = of_stream.contiguous(), of_normed.contiguous()
        of_x, of_said, of_projected = (torch.empty_like(x) for x in (of_stream, of_normed, made.projected))
        same_type = of_x.dtype == of_said.dtype
        of_delta = None if not wants_delta else of_x if same_type else torch.empty_like(of_said)
        of_norms = [None if weight is None else torch.empty_like(weight) for weight in _norms(layer)]
        block.of_next_stream, block.of_next_normed = address(of_stream), address(of_normed)
        block.of_x, block.of_delta = address(of_x), None if same_type else address(of_delta)
        block.of_said, block.of_projected = address(of_said), address(of_projected)
        block.of_norm, block.of_next_norm, block.of_q_norm, block.of_k_norm = map(address, of_norms)
        of_qkv, of_out = _gradients(block.qkv, layer.qkv), _gradients(block.out, layer.out)
        call("attention_block_backward", ctypes.addressof(block))
        of_qkv_bias, of_out_bias = _of_bias(layer.qkv, of_projected), _of_bias(layer.out, of_said)
        return None, None, of_x, of_delta, *of_norms, of_qkv_bias, *of_qkv, of_out_bias, *of_out


class _Fed(NamedTuple):
    """What the gated block of a layer makes."""

    said: Tensor | None
    """[T, H]; None where it is not asked for again."""
    projected: Tensor
    """[T, 2 I]"""
    activation: Tensor
    """[T, I]"""


def feeds(dense: Dense, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a block for the layer."""
    return all(map(_is_read, (dense.gate_up, dense.down))) and fits(dtype, dtype, device, dense.width)


def fed(dense: Dense, y: Tensor) -> Tensor:
    """What the gated feed-forward layer says of `y` [T, H]: [T, H]."""
    if torch.is_grad_enabled() or current() is not None:
        return _GatedFunction.apply(dense, y, *_tensors(dense.gate_up), *_tensors(dense.down))
    said = _feed(dense, y).said
    assert said is not None
    return said


def _feed(dense: Dense, y: Tensor) -> _Fed:
    width = dense.width
    made = _Fed(torch.empty_like(y), y.new_empty(len(y), 2 * width), y.new_empty(len(y), width))
    block = _gated_block(dense, y, made)
    call("gated_block", ctypes.addressof(block))
    return made


def _gated_block(dense: Dense, y: Tensor, made: _Fed) -> _GatedBlock:
    return _GatedBlock(
        rows=len(y),
        width=dense.width,
        gate_up=_matrix(dense.gate_up),
        down=_matrix(dense.down),
        y=address(y),
        **{name: address(x) for name, x in made._asdict().items()},
    )


class _GatedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Dense, y: Tensor, *weights: Tensor | None) -> Tensor:
        fed = _Fed(*made(lambda: _feed(dense, y)))
        ctx.dense = dense
        ctx.save_for_backward(y, fed.projected, fed.activation)
        return torch.empty_like(y) if fed.said is None else fed.said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y, projected, activation), dense = ctx.saved_tensors, ctx.dense
        grad = grad.contiguous()
        block = _gated_block(dense, y, _Fed(None, projected, activation))
        of_activation, of_projected, of_y = (torch.empty_like(x) for x in (activation, projected, y))
        block.of_said, block.of_activation = address(grad), address(of_activation)
        block.of_projected, block.of_y = address(of_projected), address(of_y)
        of_gate_up, of_down = _gradients(block.gate_up, dense.gate_up), _gradients(block.down, dense.down)
        call("gated_block_backward", ctypes.addressof(block))
        of_gate_up_bias, of_down_bias = _of_bias(dense.gate_up, of_projected), _of_bias(dense.down, grad)
        return None, of_y, of_gate_up_bias, *of_gate_up, of_down_bias, *of_down


def _norms(layer: Layer) -> tuple[Tensor | None, ...]:
    return layer.attention_norm.weight, layer.mlp_norm.weight, layer.q_norm, layer.k_norm


def _tensors(linear: Linear) -> tuple[Tensor | None, ...]:
    return linear.bias, *_sources(linear)


def _sources(linear: Linear) -> tuple[Tensor, ...]:
    assert isinstance(linear.weight, Tiles)
    return linear.weight.sources


def _is_read(linear: Linear) -> bool:
    """Whether `_matrix` can say it."""
    return isinstance(linear.weight, Tiles) and all(x.is_contiguous() for x in linear.weight.sources)


def _matrix(linear: Linear) -> _Matrix:
    """Without gradients."""
    tiles = linear.weight
    assert isinstance(tiles, Tiles)
    result = _Matrix(outs=tiles.outs, ins=tiles.ins, parts=len(tiles.sources))
    result.is_f32 = tiles.sources[0].dtype == torch.float32
    result.columns, result.bias = address(tiles.columns), address(linear.bias)
    end = 0
    for part, source in enumerate(tiles.sources):
        end += len(source)
        result.ends[part], result.sources[part] = end, source.data_ptr()
    return result


def _gradients(matrix: _Matrix, linear: Linear) -> list[Tensor] | list[None]:
    """Of the sources, where `matrix` has them put; None of those that are not trained."""
    sources = _sources(linear)
    if not any(x.requires_grad for x in sources):
        return [None] * len(sources)
    made = [torch.empty_like(x) for x in sources]
    for part, gradient in enumerate(made):
        matrix.gradients[part] = gradient.data_ptr()
    return made


def _of_bias(linear: Linear, grad: Tensor) -> Tensor | None:
    return None if linear.bias is None else grad.sum(0)
