"""The models of the benchmarks: small Qwen3 and Qwen3-MoE with random weights, made on the spot.

Random weights hardly ever end a response. `write_model(mean_length=...)` sets a few of them by hand, so that
responses end by themselves at log-normal lengths, whatever generates them. Six hidden dimensions are reserved
for it; no layer writes to them, and but for the first two attentions none reads them.

- `SCALE` is the same in every token and larger than all else: the norms divide by nearly a constant, and all
  logits but that of the end of a response are close to 0. `MARK` is set in the token that opens a response.
- The first two attentions have queries of zero, so each takes the mean over the tokens before. The first
  makes a constant of `SCALE` (`ONE`), and 1/p after p tokens of `MARK` (`AGE`, and `COPY`, to be read again);
  the second makes of `COPY` the mean of 1/p since the mark (`MEAN`), roughly log(p)/p.
- The embedding of the end-of-sequence token is also its row of the head, which reads `ONE`, `AGE` and `MEAN`.
  A sum of the three comes close to the log-odds with which a log-normal of sigma 0.8 ends at each token, for
  prompts as long as those of chained arithmetic. (A mark that is drawn by chance makes a few longer.)

Adam moves a weight by the learning rate at each step: 5e-5 leaves such lengths as they are for a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqrl.tiny import ASSISTANT, make_tokenizer

_SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, int]] = {
    "dense-3m": {**_SMALL, "intermediate_size": 768},
    "dense-25m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1536,
    },
    "moe-8x2": {**_SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "moe-64x8": {**_SMALL, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 64},
}
"""3.2 M, 25 M, 7.2 M and 13.5 M parameters."""
SIGMA = 0.8
"""Of the logarithm of the lengths."""
PROMPT_TOKENS = 8
SCALE, MARK, ONE, AGE, COPY, MEAN = RESERVED = range(6)
LARGE = 16.0
"""`SCALE` in every token."""
QUIET = 2.5
"""The layers see the other dimensions so many times as large as they are: too few for them to grow."""
UNIT = 8.0
"""What stands for 1 in `AGE`, `COPY` and `MEAN`, so that the weights that read them are not much larger."""


def write_model(
    name: str, directory: Path, *, seed: int = 1, mean_length: float | None = None, limit: int = 256
) -> Path:
    """Writes a Hugging Face directory with random weights and the byte tokenizer of `seqrl.tiny`.

    With `mean_length`, in tokens, responses sampled at temperature 1 end by themselves at about log-normal
    lengths of that mean, as far as they are not cut at `limit`. Returns `directory`.
    """
    model, tokenizer = make_model(name, seed=seed), make_tokenizer()
    if mean_length is not None:
        _let_responses_end(model, tokenizer, _log_odds(mean_length, limit))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_model(
    name: str, dtype: torch.dtype = torch.float32, *, vocab_size: int | None = None, seed: int = 1
) -> Any:
    """The same in memory, in training mode as transformers makes it.

    `vocab_size` is that of the byte tokenizer unless given, and at least as large.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # written in a moment
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": vocab_size or len(tokenizer),
        "head_dim": 64,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **SHAPES[name],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "num_experts" in settings:
            model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, norm_topk_prob=True))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**settings))
    return model.to(dtype)


@torch.no_grad()
def _let_responses_end(model: Any, tokenizer: Any, log_odds: Sequence[float]) -> None:
    """Gives the end of a response the `log_odds` (see `_log_odds`) against all other tokens together."""
    reserved, root = list(RESERVED), math.sqrt(model.config.hidden_size)
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            weight.fill_(QUIET * LARGE / root)
            weight[reserved] = 0
        elif "o_proj" in name or "down_proj" in name:
            weight[..., reserved, :] = 0
    model.model.norm.weight[[SCALE, MARK, COPY]] = 0
    embedding = model.model.embed_tokens.weight
    embedding[:, reserved] = 0
    embedding[:, SCALE] = LARGE
    embedding[tokenizer.convert_tokens_to_ids(ASSISTANT), MARK] = LARGE

    # After its norm SCALE is `root`; beside a MARK as large, both are root / sqrt(2).
    values, out = _averaging_head(model.model.layers[0], reads=[SCALE, MARK])
    values[0, SCALE], values[0, MARK] = 1 / root, (math.sqrt(2) - 1) / root
    values[1, MARK] = 4 * UNIT * math.sqrt(2) / root
    out[ONE, 0], out[AGE, 1], out[COPY, 1] = 1, 1 / 4, 1 / 4
    values, out = _averaging_head(model.model.layers[1], reads=[COPY])
    values[0, COPY] = LARGE / root
    out[MEAN, 0] = 1

    constant, of_age, of_mean = log_odds
    per_logit = LARGE / root
    end = embedding[tokenizer.eos_token_id]
    end[ONE] = per_logit * (constant + math.log(len(tokenizer) - 1))
    end[AGE], end[MEAN] = per_logit * of_age / UNIT, per_logit * of_mean / UNIT


def _averaging_head(layer: Any, reads: list[int]) -> tuple[Tensor, Tensor]:
    """Makes the layer's attention a mean over the tokens, which may read the hidden dimensions `reads`.

    Returns what makes the first two values of its first head, [2, hidden], and what reads them,
    [hidden, 2]: views of the weights, all zero.
    """
    attention = layer.self_attn
    layer.input_layernorm.weight[reads] = 1
    attention.q_norm.weight.zero_()  # not q_proj: the norm would make the smallest query a large one
    values = attention.v_proj.weight
    values[:, reads] = 0
    values[:2] = 0
    out = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))  # [hidden, heads, head size]
    out[:, :, :2] = 0  # of all heads: some share these values
    return values[:2], out[:, 0, :2]


def _log_odds(mean_length: float, limit: int) -> tuple[float, float, float]:
    """The log-odds of the end after each token: a constant, and the factors of 1/p and of the mean of 1/p.

    Fitted to the hazard of a log-normal by least squares, each length counting by its probability.
    """
    length = torch.arange(limit + 1, dtype=torch.float64)
    log_median = math.log(mean_length) - SIGMA**2 / 2
    longer = torch.erfc((length.log() - log_median) / (SIGMA * math.sqrt(2))) / 2  # [limit + 1]
    share = longer[:-1] - longer[1:]
    wanted = (share / longer[:-1]).clamp(min=1e-9).logit()
    age = 1 / (PROMPT_TOKENS + length[:-1])
    seen = age.clone()
    seen[0] /= math.sqrt(2)  # the marked token's norm is the larger one
    features = torch.stack([torch.ones_like(age), age, seen.cumsum(0) * age], dim=1)
    weights = share.sqrt()[:, None]
    constant, of_age, of_mean = torch.linalg.lstsq(features * weights, wanted[:, None] * weights).solution
    return float(constant), float(of_age), float(of_mean)
