"""From token ids to the last hidden states.

Tokens are one flat row: all but attention treats each by itself. Attention is brought by the caller, who
knows which token sees which: within the sequences of a micro-batch, or over a cache.

Shape legend: T tokens, H hidden, Q and K query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import add_norm, current, fits, made
from seqrl.native.blocks import Causal, attended, attends, fed, feeds
from seqrl.native.experts import Experts, in_c
from seqrl.native.weights import Dense, Layer, Weights

Attention = Callable[[int, Layer, Tensor], Tensor]
"""Takes a layer's index, the layer and its projections [T, (Q + 2K) D]; returns [T, Q D]."""


def hidden_states(w: Weights, tokens: Tensor, attention: Attention) -> Tensor:
    """What the head sees of `tokens` [T]: [T, H] in the type of the matrix products."""

    def run(index: int, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        layer = w.layers[index]
        if isinstance(attention, Causal) and attends(layer, x, w.dtype):
            x, y = attended(layer, x, delta, attention)
        else:
            x, y = add_norm(x, delta, *layer.attention_norm, w.dtype)
            delta = layer.out(attention(index, layer, layer.qkv(y)))
            x, y = add_norm(x, delta, *layer.mlp_norm, w.dtype)
        if isinstance(layer.mlp, Dense) and feeds(layer.mlp, w.dtype, x.device):
            return x, fed(layer.mlp, y)
        return x, layer.mlp(y)

    x, delta = F.embedding(tokens, w.embedding), None
    run_again = w.checkpointing and (torch.is_grad_enabled() or current() is not None)
    for index, layer in enumerate(w.layers):
        if run_again:
            x, delta = _RunAgain.apply(partial(run, index), x, delta, *_tensors(layer))
        else:
            x, delta = run(index, x, delta)
    return add_norm(x, delta, *w.norm, w.dtype)[1]


class _RunAgain(torch.autograd.Function):
    """A layer of which nothing is kept but what goes in: it runs again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        delta: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(x, delta, *weights)
        return made(lambda: run(x, delta))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, *weights = ctx.saved_tensors
        with torch.enable_grad():
            x, delta = (None if t is None else t.detach().requires_grad_() for t in (x, delta))
            out = ctx.run(x, delta)
        given = [x, delta, *weights]
        wanted = [t is not None and t.requires_grad for t in given]
        found = iter(torch.autograd.grad(out, [t for t, w in zip(given, wanted, strict=True) if w], grads))
        return None, *(next(found) if w else None for w in wanted)


def _tensors(layer: Any) -> list[Tensor]:
    """All in a tuple of tensors and such tuples."""
    if isinstance(layer, Tensor):
        return [layer]
    return [t for part in layer for t in _tensors(part)] if isinstance(layer, tuple) else []


def can_record(w: Weights) -> bool:
    """Whether `hidden_states` can be recorded and replayed (`kernels.Record`): all of it is in C."""
    stream = w.embedding

    def fit(mlp: Dense | Experts) -> bool:
        if isinstance(mlp, Dense):
            return fits(w.dtype, w.dtype, stream.device, mlp.width)
        return in_c(mlp.gate_up, mlp.down)

    return fits(stream.dtype, w.dtype, stream.device, stream.shape[1], w.turn.size // 2) and all(
        fit(layer.mlp) for layer in w.layers
    )
