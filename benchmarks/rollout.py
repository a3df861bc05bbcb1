"""Tokens per second of the native rollout engine against transformers' `generate`, on one random model.

The two take turns in one process, so that whatever else the machine does falls on both; the ratio is
taken within each turn. No end-of-sequence token is drawn: every response has its full length.

    python benchmarks/rollout.py [--experts 64 --top-k 8] [--threads 2] [--turns 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from seqrl.rollout.base import make_engine
from seqrl.types import Prompt, SamplingParams

VOCAB = 270


class NoText:
    """A tokenizer that decodes nothing: text is not what is measured."""

    eos_token_id = VOCAB  # outside the vocabulary, so never drawn

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [""] * len(rows)


def build_model(experts: int, top_k: int, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    moe = {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    config = Qwen3MoeConfig(num_hidden_layers=4, **sizes, **heads, **moe)
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"experts": 8, "top-k": 2, "prompts": 32, "n": 8, "new-tokens": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    dtype = getattr(torch, args.dtype)
    model = build_model(args.experts, args.top_k, dtype)
    lengths = [10 + i % 5 for i in range(args.prompts)]
    rows = [tuple(torch.randint(VOCAB, (length,)).tolist()) for length in lengths]
    prompts = [Prompt(f"p:{i}", "", (), "", {}, row) for i, row in enumerate(rows)]
    sampling = SamplingParams(max_new_tokens=args.new_tokens, n=args.n)
    engine = make_engine(model, NoText(), max_num_seqs=args.prompts * args.n, dtype=dtype)

    padded = torch.tensor([[0] * (max(lengths) - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (max(lengths) - len(row)) + [1] * len(row) for row in rows])
    inputs = {
        "input_ids": padded.repeat_interleave(args.n, 0),
        "attention_mask": mask.repeat_interleave(args.n, 0),
    }
    generation = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.new_tokens, pad_token_id=0)

    def native() -> None:
        engine.generate(prompts, sampling, seed=0, policy_version=0)

    def transformers() -> None:
        model.generate(
            **inputs, generation_config=generation, past_key_values=DynamicCache(config=model.config)
        )

    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    turns = [(seconds(native), seconds(transformers)) for _ in range(args.turns + 1)][
        1:
    ]  # the first warms up
    for name, times in zip(("native", "transformers generate"), zip(*turns, strict=True), strict=True):
        step = statistics.median(times) / args.new_tokens
        print(f"{name}: {args.prompts * args.n / step:.0f} tokens/s, {1e3 * step:.2f} ms per step")
    ratios = [theirs / ours for ours, theirs in turns]
    print(f"ratio: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
