"""vLLM for `benchmarks.rollout`, run by the interpreter of vLLM's own environment.

    PYTHON vllm_worker.py MODEL DTYPE MAX_MODEL_LEN CORES [--compile]

One engine a process. It says {"ready": true} on standard output once it is loaded, and then answers each line
of standard input, a request in JSON, with a line of JSON; what vLLM logs goes to standard error.

    {"prompts": [[1, 2]], "new_tokens": 64, "greedy": false, "stop": [0]}    ->    {"tokens": 64}
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

ROWS = 256
"""Decoded at once."""


def kv_cache_gib(model: Path, dtype: str, max_model_len: int) -> int:
    """Room for `ROWS` of the longest sequences: nothing has to wait, and no more is taken."""
    config = json.loads((model / "config.json").read_text())
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return math.ceil(ROWS * max_model_len * token * {"float32": 4, "bfloat16": 2}[dtype] / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("dtype")
    parser.add_argument("max_model_len", type=int)
    parser.add_argument("cores", help="as VLLM_CPU_OMP_THREADS_BIND takes them: 0,1")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed, by child processes too
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = args.cores
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib(Path(args.model), args.dtype, args.max_model_len))
    os.environ["HF_HUB_OFFLINE"] = "1"

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=args.model,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        enforce_eager=not args.compile,
        max_model_len=args.max_model_len,
        max_num_seqs=ROWS,
    )

    def answer(request: dict[str, Any]) -> dict[str, int]:
        sampling = SamplingParams(
            temperature=0.0 if request["greedy"] else 1.0,
            max_tokens=request["new_tokens"],
            stop_token_ids=request["stop"],
            ignore_eos=True,  # `stop` names it
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return {"tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


if __name__ == "__main__":  # vLLM's child processes import this file
    main()
