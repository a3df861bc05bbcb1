"""The weights of a Llama, Qwen2, Qwen3 or Qwen3-MoE as the native engine reads them from the module.

They are the trainer's own tensors, by reference, but for two copies made at each call: the query, key
and value projections of a layer are joined into one, and matrices are cast where the compute type
differs from theirs. Norms, embedding and residual stream keep the type of the weights, as under autocast.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe"})
_READ = re.compile(
    r"(model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|gate_proj|up_proj|down_proj)))|lm_head)\.(weight|bias)"
    r"|model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)"
)
"""The parameters native decoding reads. A model with any other (adapters, sinks) is not native's."""


class Linear(NamedTuple):
    weight: Tensor
    """[out, in], in the compute type."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Dense(NamedTuple):
    """A gated feed-forward layer."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Experts(NamedTuple):
    """A mixture of E gated feed-forward layers, `top_k` for each token."""

    router: Linear
    gate_up: Tensor
    """[E, 2 I, H]"""
    down: Tensor
    """[E, H, I]"""
    top_k: int
    normalise: bool
    """Scale the `top_k` routing weights to sum to 1."""
    activation: Callable[[Tensor], Tensor]


class Norm(NamedTuple):
    weight: Tensor
    """[D], or [heads, D] for the norms of several heads at once."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Layer(NamedTuple):
    attention_norm: Norm
    qkv: Linear
    qk_norm: Norm | None
    out: Linear
    mlp_norm: Norm
    mlp: Dense | Experts


@dataclass(frozen=True)
class Weights:
    embedding: Tensor
    layers: list[Layer]
    norm: Norm
    lm_head: Linear
    rotary: Any
    """The module's own rotary embedding."""
    heads: int
    kv_heads: int
    head_dim: int


def why_unreadable(model: Any) -> str | None:
    """Why native decoding cannot stand in for `model`, in a few words; None where it can."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type}"
    unread = next((name for name, _ in model.named_parameters() if not _READ.fullmatch(name)), None)
    if unread is not None:
        return f"parameter {unread}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "sliding-window layers"
    if config.model_type == "qwen3_moe" and config.sliding_window is not None:
        return "sliding-window layers"
    rotary = model.model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):  # its angles change with the length of the batch
        return f"rope type {rotary.rope_type}"
    if 2 * rotary.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        return "rotary embedding over a part of the head"
    return None


def read_weights(model: Any, dtype: torch.dtype) -> Weights:
    """The weights of `model` as they are now, matrices in `dtype`."""

    def linear(*modules: Any) -> Linear:
        weight = modules[0].weight if len(modules) == 1 else torch.cat([m.weight for m in modules])
        if modules[0].bias is None:
            return Linear(weight.to(dtype), None)
        bias = modules[0].bias if len(modules) == 1 else torch.cat([m.bias for m in modules])
        return Linear(weight.to(dtype), bias.to(dtype))

    def norm(module: Any) -> Norm:
        return Norm(module.weight, module.variance_epsilon)

    def mlp(module: Any) -> Dense | Experts:
        if not hasattr(module, "experts"):
            return Dense(
                linear(module.gate_proj), linear(module.up_proj), linear(module.down_proj), module.act_fn
            )
        experts, gate = module.experts, module.gate
        return Experts(
            router=Linear(gate.weight.to(dtype), None),
            gate_up=experts.gate_up_proj.to(dtype),
            down=experts.down_proj.to(dtype),
            top_k=gate.top_k,
            normalise=gate.norm_topk_prob,
            activation=experts.act_fn,
        )

    def layer(module: Any) -> Layer:
        attention = module.self_attn
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            per_head = [q.weight.expand(heads, -1), k.weight.expand(kv_heads, -1)]
            qk_norm = Norm(torch.cat(per_head), q.variance_epsilon)
        return Layer(
            attention_norm=norm(module.input_layernorm),
            qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj),
            qk_norm=qk_norm,
            out=linear(attention.o_proj),
            mlp_norm=norm(module.post_attention_layernorm),
            mlp=mlp(module.mlp),
        )

    config, inner = model.config, model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Weights(
        embedding=inner.embed_tokens.weight,
        layers=[layer(module) for module in inner.layers],
        norm=norm(inner.norm),
        lm_head=linear(model.lm_head),
        rotary=inner.rotary_emb,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=inner.layers[0].self_attn.head_dim,
    )
