"""Small models that the native forward knows, of a size the C takes, and one that it does not take."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 40
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, one key head": ("qwen3", {"num_key_value_heads": 1, "head_dim": 64}),
    "qwen3, narrow heads": ("qwen3", {"head_dim": 8}),
    "qwen3_moe, one layer dense": ("qwen3_moe", {**_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_moe, weights as they are": ("qwen3_moe", {**_EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe, 64 experts": (
        "qwen3_moe",
        {**_EXPERTS, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
}


def build_native(kind: str, **changes: Any) -> Any:
    """The same model at each call, in training mode; norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, own = KINDS[kind]
    config = AutoConfig.for_model(family, **{**_SIZES, **own, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
