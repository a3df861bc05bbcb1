"""The layers of a token step in one call of C (kernels/decode.c).

Asked operation by operation, a token step of a small model is half Python.

Shape legend: B rows, H hidden, Q and K query and key heads, D head size, I intermediate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_long, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.kernels import Cache, Strips, Tiles, add_norm, has_tiles
from seqrl.kernels.call import LANES, call
from seqrl.native.experts import Experts, in_c
from seqrl.native.weights import Dense, Layer, Linear, Weights


class _Linear(Structure):
    _fields_ = [("columns", c_void_p), ("bias", c_void_p), ("stretch", c_long)]


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, c_float) for name in ("attention_eps", "mlp_eps")),
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("width", c_long),
        *((name, c_void_p) for name in ("prompt_keys", "own_keys", "prompt_values", "own_values")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_long) for name in ("rows", "hidden", "heads", "kv_heads", "size", "stream_is_f32")),
        *((name, c_long) for name in ("pairs", "on_tiles")),
        ("head_eps", c_float),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_void_p) for name in ("positions", "prompt", "prompt_columns", "slot", "own_columns")),
        *((name, c_long) for name in ("prompt_blocks", "own_blocks")),
        *((name, c_void_p) for name in ("stream", "delta")),
        *((name, c_void_p) for name in ("normed", "qkv", "q", "k", "seen", "said", "gated", "inner")),
    ]


class LayersInC:
    """The layers of `weights` for at most `rows` rows, over a cache of prompts and one of the rows' own for
    each layer."""

    @staticmethod
    def fit(weights: Weights) -> bool:
        """Whether there is C for all of them, `fits` being true of the model."""
        tiled = has_tiles(weights.dtype, weights.embedding.device)
        kind = Tiles if tiled else Strips  # as the cache is laid out
        return all(_fits(layer, kind) for layer in weights.layers)

    def __init__(self, weights: Weights, rows: int, prompts: Sequence[Cache], own: Sequence[Cache]) -> None:
        self.weights, turn = weights, weights.turn
        layers = weights.layers
        hidden, inner = weights.embedding.shape[1], max(map(_width, layers))
        q_width, kv_width = turn.heads * turn.size, turn.kv_heads * turn.size
        self._kept: list[Tensor] = []
        """What the C reads and writes besides the weights and caches themselves."""

        def made(width: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            self._kept.append(torch.empty(rows, width, dtype=dtype))
            return self._kept[-1]

        self._normed, self._said = made(hidden), made(hidden)
        self._step = _Step(
            hidden=hidden,
            heads=turn.heads,
            kv_heads=turn.kv_heads,
            size=turn.size,
            stream_is_f32=weights.embedding.dtype == torch.float32,
            pairs=weights.dtype == torch.bfloat16,
            on_tiles=has_tiles(weights.dtype, weights.embedding.device),
            head_eps=turn.eps,
            cos=turn.cos.data_ptr(),
            sin=turn.sin.data_ptr(),
            prompt_blocks=prompts[0].blocks,
            own_blocks=own[0].blocks,
            normed=self._normed.data_ptr(),
            said=self._said.data_ptr(),
            qkv=made(q_width + 2 * kv_width).data_ptr(),
            q=made(q_width).data_ptr(),
            k=made(kv_width).data_ptr(),
            seen=made(q_width).data_ptr(),
            gated=made(2 * inner).data_ptr(),
            inner=made(inner).data_ptr(),
        )
        each = zip(layers, prompts, own, strict=True)
        self._layers = (_Layer * len(layers))(*(self._layer(*of_layer) for of_layer in each))
        self._stops = [i + 1 for i, x in enumerate(layers) if isinstance(x.mlp, Experts) or x is layers[-1]]
        """After which layers the C comes back: what experts say is asked for from here."""

    def _layer(self, layer: Layer, prompts: Cache, own: Cache) -> _Layer:
        dense = layer.mlp if isinstance(layer.mlp, Dense) else None
        return _Layer(
            attention_norm=layer.attention_norm.weight.data_ptr(),
            q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
            k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
            mlp_norm=layer.mlp_norm.weight.data_ptr(),
            attention_eps=layer.attention_norm.eps,
            mlp_eps=layer.mlp_norm.eps,
            qkv=self._linear(layer.qkv),
            out=self._linear(layer.out),
            gate_up=_Linear() if dense is None else self._linear(dense.gate_up),
            down=_Linear() if dense is None else self._linear(dense.down),
            width=_width(layer),
            prompt_keys=prompts.keys.data_ptr(),
            own_keys=own.keys.data_ptr(),
            prompt_values=prompts.values.data_ptr(),
            own_values=own.values.data_ptr(),
        )

    def _linear(self, linear: Linear) -> _Linear:
        assert isinstance(linear.weight, Tiles | Strips) and linear.weight.columns is not None
        bias = None
        if linear.bias is not None:
            bias = linear.bias.float()
            self._kept.append(bias)
        stretch = linear.weight.stretch if isinstance(linear.weight, Strips) else 0
        return _Linear(linear.weight.columns.data_ptr(), None if bias is None else bias.data_ptr(), stretch)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        prompt: Tensor,
        prompt_columns: Tensor,
        slot: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """What the head sees [B, H] of `tokens` [B] at `positions` [B]; the others as `attend_cached`'s."""
        step, rows, layers = self._step, len(tokens), self.weights.layers
        stream, first = F.embedding(tokens, self.weights.embedding), 0
        step.rows, step.stream, step.delta = rows, stream.data_ptr(), None
        step.positions, step.prompt, step.slot = positions.data_ptr(), prompt.data_ptr(), slot.data_ptr()
        step.prompt_columns, step.own_columns = prompt_columns.data_ptr(), columns.data_ptr()
        for stop in self._stops:
            address = ctypes.addressof(self._layers) + first * ctypes.sizeof(_Layer)
            call("decode_layers", address, stop - first, ctypes.addressof(step))
            mlp, first = layers[stop - 1].mlp, stop
            delta = mlp(self._normed[:rows]) if isinstance(mlp, Experts) else self._said[:rows]
            step.delta = delta.data_ptr()
        return add_norm(stream, delta, *self.weights.norm, self.weights.dtype)[1]


def _fits(layer: Layer, kind: type[Tiles | Strips]) -> bool:
    if isinstance(layer.mlp, Experts) and not in_c(layer.mlp.gate_up, layer.mlp.down):
        return False  # what torch says of a row depends on the others
    dense = layer.mlp if isinstance(layer.mlp, Dense) else None
    linears = [layer.qkv, layer.out, *([dense.gate_up, dense.down] if dense is not None else [])]
    return all(isinstance(x.weight, kind) for x in linears) and _width(layer) % LANES == 0


def _width(layer: Layer) -> int:
    """0 of experts."""
    return layer.mlp.width if isinstance(layer.mlp, Dense) else 0
