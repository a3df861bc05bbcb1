"""Tiny random models, prompts and a tokenizer for the rollout tests."""

from __future__ import annotations

from typing import Any

import torch

from seqrl.types import Prompt

VOCAB = 61
EOS = 1
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
    # Large weights: log-probs far from uniform, so that a wrong position or head shows.
    "initializer_range": 0.3,
}
PAGED = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_64")
"""Of heads too narrow for the C: keys and values in pages."""
CACHED = ("llama/64", "qwen2/32", "qwen3/32", "qwen3_moe/32", "qwen3_moe_64/64")
"""The same with heads of so many numbers: attention over the cache without padding, in C."""
NATIVE = (*PAGED, *CACHED)


class FakeTokenizer:
    """Token i is the word `wi`; end-of-sequence is special."""

    eos_token_id = EOS

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(f"w{i}" for i in row if not (skip_special_tokens and i == EOS)) for row in rows]


def build(name: str, **changes: Any) -> Any:
    """A model in evaluation mode, the same at each call; norms and biases are random too.

    `name` may end in the size of its heads, as in `qwen3/32`.
    """
    import transformers as tf

    moe = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    many = {"moe_intermediate_size": 8, "num_experts": 64, "num_experts_per_tok": 8}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 16}),
        "qwen3_moe": (
            tf.Qwen3MoeConfig,
            tf.Qwen3MoeForCausalLM,
            {
                **moe,
                "head_dim": 16,
                "mlp_only_layers": [1],
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
            },
        ),
        "qwen3_moe_64": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, {**many, "head_dim": 8}),
        "gpt_neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {}),
        "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, {"head_dim": 8, "sliding_window": 8}),
    }
    kind, _, size = name.partition("/")
    config_class, model_class, own = kinds[kind]
    if size:
        changes["head_dim"] = int(size)
    torch.manual_seed(0)
    model = model_class(config_class(**{**_COMMON, **own, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_prompts(lengths: list[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(f"test:{seed}.{i}", "t", (), "", {}, tuple(row)) for i, row in enumerate(rows)]


@torch.no_grad()
def forward_logits(model: Any, prompt: Prompt, response: torch.Tensor) -> torch.Tensor:
    """[R, V] logits that predict each response token, by a plain forward of the one whole sequence."""
    sequence = torch.cat([torch.tensor(prompt.tokens), response])
    logits = model(input_ids=sequence[None], use_cache=False).logits[0]
    return logits[len(prompt.tokens) - 1 : -1]
