"""What the rollout says of a token is what training says of it, bit for bit, in float32 and in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqrl.config.schema import OptimConfig
from seqrl.kernels import library, product
from seqrl.reward import Reward
from seqrl.rollout.base import make_engine
from seqrl.training import experts
from seqrl.training.local import LocalEngine
from seqrl.training.packing import ATTENTION_NAME, register
from seqrl.types import Batch, Prompt, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


class NoText:
    eos_token_id = 1

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [""] * len(rows)


def make_model(kind: str) -> Any:
    import transformers as tf

    register()
    experts.register()
    torch.manual_seed(0)
    classes = {"llama": (tf.LlamaConfig, tf.LlamaForCausalLM), "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM)}
    config, model = classes.get(kind, (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM))
    more = MOE if kind == "qwen3_moe" else {}
    made = model(config(**SIZES, **more, attn_implementation=ATTENTION_NAME))
    if more:
        made.set_experts_implementation(experts.EXPERTS_NAME)
    return made


def products_depend_on_their_number(dtype: torch.dtype) -> bool:
    """Whether this machine's library adds up otherwise for fewer rows."""
    x, weight = torch.randn(100, 64).to(dtype), torch.randn(96, 64).to(dtype)
    return not torch.equal(product(x, weight)[:12], product(x[:12].contiguous(), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_training_say_the_same(kind: str, dtype: torch.dtype, temperature: float) -> None:
    if library() is None or products_depend_on_their_number(dtype):
        pytest.skip("needs the C kernels, and products that do not depend on the number of rows")
    model = make_model(kind)
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 40, 1, 70]
    rows = [torch.randint(2, 90, (length,), generator=generator).tolist() for length in lengths]
    prompts = [Prompt(f"p{i}", "", (), "", {}, tuple(row)) for i, row in enumerate(rows)]
    # Rows join late and leave early, so that the number of rows in a step is of all sizes.
    rollout = make_engine(model, NoText(), max_num_seqs=13, dtype=dtype)
    sampling = SamplingParams(max_new_tokens=90, n=5, temperature=temperature)
    rollouts = rollout.generate(prompts, sampling, seed=0, policy_version=0)
    assert len({len(r.tokens) for r in rollouts}) > 3
    batch = Batch.of(rollouts, [Reward(0.0, "")] * len(rollouts))
    training = LocalEngine(
        model,
        None,
        optim=OptimConfig(),
        total_steps=1,
        grad_clip=1.0,
        temperature=temperature,
        compute_dtype=dtype,
        max_tokens=500,
        micro_batch_size=None,
        with_reference=False,
    )
    mask = batch.response_mask
    assert torch.equal(training.logprobs(batch)[mask], batch.rollout_logprobs[mask])
