"""From token ids to the last hidden states.

Tokens are one flat row: all but attention treats each by itself. Attention is brought by the caller, who
knows which token sees which: within the sequences of a micro-batch, or over a cache.

Shape legend: T tokens, H hidden, Q and K query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqrl.kernels import PackedExperts, add_norm, fits
from seqrl.native.experts import Experts
from seqrl.native.weights import Dense, Layer, Weights

Attention = Callable[[int, Layer, Tensor], Tensor]
"""Takes a layer's index, the layer and its projections [T, (Q + 2K) D]; returns [T, Q D]."""


def hidden_states(w: Weights, tokens: Tensor, attention: Attention) -> Tensor:
    """What the head sees of `tokens` [T]: [T, H] in the type of the matrix products."""

    def run(index: int, layer: Layer, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = add_norm(x, delta, *layer.attention_norm, w.dtype)
        delta = layer.out(attention(index, layer, layer.qkv(y)))
        x, y = add_norm(x, delta, *layer.mlp_norm, w.dtype)
        return x, layer.mlp(y)

    x, delta = F.embedding(tokens, w.embedding), None
    for index, layer in enumerate(w.layers):
        if w.checkpointing and torch.is_grad_enabled():
            x, delta = checkpoint(run, index, layer, x, delta, use_reentrant=False, preserve_rng_state=False)
        else:
            x, delta = run(index, layer, x, delta)
    return add_norm(x, delta, *w.norm, w.dtype)[1]


def can_record(w: Weights) -> bool:
    """Whether `hidden_states` can be recorded and replayed (`kernels.Record`): all is in C, and no layer is
    run again for its gradient."""
    stream = w.embedding

    def fit(mlp: Dense | Experts) -> bool:
        if isinstance(mlp, Dense):
            return fits(w.dtype, w.dtype, stream.device, mlp.down.weight.shape[1])
        matrices = (mlp.gate_up, mlp.down)
        return all(isinstance(x, Tensor) and PackedExperts.fit(x) for x in matrices)

    return (
        not w.checkpointing
        and fits(stream.dtype, w.dtype, stream.device, stream.shape[1], w.turn.size // 2)
        and all(fit(layer.mlp) for layer in w.layers)
    )
