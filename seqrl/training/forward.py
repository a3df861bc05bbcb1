"""A micro-batch through the model, down to the last hidden states.

Models the native forward knows go through it; all others through their own transformers forward, with our
attention (`packing.flat_attention`). Both see flat tokens, the prompt of a group once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqrl.kernels import filled_up, fits, is_flash, sent, turned
from seqrl.native.blocks import Causal
from seqrl.native.forward import Attention, hidden_states
from seqrl.native.weights import Layer, Weights, read_weights, why_unreadable
from seqrl.training.experts import EXPERTS_NAME, hooked_routing
from seqrl.training.packing import Layout, padded_attention, varlen_attention
from seqrl.types import Batch


def response_hidden(model: Any, tokens: Tensor, layout: Layout, positions: Tensor) -> Tensor:
    """What the head would see of `tokens` [T'] at `positions` [R], indices into them: [R, H]."""
    if is_native(model):
        return native_hidden(native_weights(model, layout), tokens, layout).index_select(0, positions)
    return _by_transformers(model, tokens, layout, positions)


def is_native(model: Any) -> bool:
    """Whether the native forward stands in for the model's own: it knows it, and nobody asked for experts
    of another kind."""
    return why_unreadable(model) is None and (
        model.config._experts_implementation in (EXPERTS_NAME, None) or model.config.model_type != "qwen3_moe"
    )


def reads_prompts_in_place(model: Any, dtype: torch.dtype) -> bool:
    """Whether attention in `dtype` reads a group's prompt where it lies. Else it has it side by side with
    each response, and what a micro-batch takes of memory does not follow the tokens that are computed."""
    if not is_native(model):
        return False
    stream, size = model.get_input_embeddings().weight, model.model.layers[0].self_attn.head_dim
    return fits(stream.dtype, dtype, stream.device, size // 2)


def response_routing(model: Any, layers: Sequence[Any], part: Batch) -> list[Tensor]:
    """The experts each response token of `part` is sent to by `layers` (`experts.expert_layers`), layer by
    layer: [R, k] each, on the CPU. Without gradient."""
    on_host = Layout.of_batch(part)
    response = on_host.source[part.response_mask]
    layout, tokens = on_host.to(model.device), sent(part.tokens[on_host.computed], model.device)
    asked: list[Tensor] = []
    if is_native(model):
        native_hidden(native_weights(model, layout, asked), tokens, layout)
    else:
        asked = hooked_routing(layers, lambda: _base(model, tokens, layout))
    return [chosen.cpu()[response] for chosen in asked]


def native_weights(model: Any, layout: Layout, asked: list[Tensor] | None = None) -> Weights:
    """In the type of autocast, where it is on; `asked` takes the experts of each token, layer by layer."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    with torch.autocast(device, enabled=False):  # types are chosen here, operation by operation
        return read_weights(model, dtype, length=layout.longest, asked=asked)


def native_hidden(w: Weights, tokens: Tensor, layout: Layout) -> Tensor:
    """[T', H] of `tokens` [T'] and, behind them, rows that nobody sees."""
    tokens, positions = filled_up(tokens), filled_up(layout.positions)
    with torch.autocast(tokens.device.type, enabled=False):
        return hidden_states(w, tokens, _attention(w, layout, positions))


def _attention(w: Weights, layout: Layout, positions: Tensor) -> Attention:
    size, stream = w.turn.size, w.embedding.dtype
    if fits(stream, w.dtype, positions.device, size // 2):
        return Causal(positions, w.turn, layout.spans)

    def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
        q, k, v = turned(qkv, positions, w.turn, layer.q_norm, layer.k_norm)
        if is_flash(qkv, qkv.dtype, size):
            return varlen_attention(q, k, v, layout).flatten(1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = padded_attention(q, k, v, layout)[0].flatten(1)
        return F.pad(out, (0, 0, 0, len(qkv) - len(out)))

    return attention


def _by_transformers(model: Any, tokens: Tensor, layout: Layout, positions: Tensor) -> Tensor:
    """The model's own call of its head sees one row."""
    seen: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        # Transformers' own `logits_to_keep` indexes instead, whose backward adds up row by row on a CPU.
        seen.append(hidden.index_select(1, positions)[0])
        return hidden[:, :1]

    with _head_input(model.get_output_embeddings(), take):
        own_logits(model, tokens, layout)
    return seen[0]


def _base(model: Any, tokens: Tensor, layout: Layout) -> Any:
    """The model without its head."""
    return model.base_model(
        input_ids=tokens[None],
        position_ids=layout.positions[None],
        use_cache=False,
        layout=layout,
    )


def own_logits(model: Any, tokens: Tensor, layout: Layout) -> Tensor:
    """[T', V] of the model's own forward of `tokens` [T']; fewer rows where its head sees fewer."""
    return model(
        input_ids=tokens[None],
        position_ids=layout.positions[None],
        use_cache=False,
        layout=layout,
    ).logits[0]


@contextmanager
def _head_input(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For this time `head` sees what `change` makes of its input [1, T', H]."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
    try:
        yield
    finally:
        hook.remove()


def response_logits(model: Any, tokens: Tensor, layout: Layout, positions: Tensor) -> Tensor:
    """The logits [R, V] at `positions`, by the model's own head and whatever it does after it."""
    with _head_input(model.get_output_embeddings(), lambda hidden: hidden.index_select(1, positions)):
        return own_logits(model, tokens, layout)
