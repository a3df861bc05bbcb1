"""How fast each way to compute mixture-of-experts layers trains: forward and backward of a mini-batch.

    python -m benchmarks.experts [--turns 5]

Turn by turn on the same weights and tokens, so that a busy machine slows all alike. The default of
`actor_rollout_ref.model.experts_implementation` follows from it (docs/performance.md).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from seqrl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from seqrl.tiny import write_tiny_model
from seqrl.trainer.sft import to_batch
from seqrl.training.local import LocalEngine
from seqrl.training.model import load_model
from seqrl.training.objective import Likelihood
from seqrl.types import Batch

IMPLEMENTATIONS = ("eager", "grouped_mm", "sorted")
"""Without `batched_mm`, which copies each token's experts and takes tens of times as long on CPU."""
MODELS = {
    "quickstart (8 experts, top-2)": {},
    "64 experts, top-8": {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 64},
}


def batch(sequences: int) -> Batch:
    """Sequences of 9 prompt tokens and 17 answer tokens, as in the quickstart."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 255, (sequences, 26), generator=generator).tolist()
    return to_batch([(row[:9], row[9:]) for row in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    for name, overrides in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            seconds = measure(overrides, dtype, turns)
            base = statistics.median(seconds["grouped_mm"])
            line = ", ".join(
                f"{impl} {statistics.median(times) * 1000:.0f} ms ({statistics.median(times) / base:.2f}x)"
                for impl, times in seconds.items()
            )
            print(f"{name}, {str(dtype).removeprefix('torch.')}: {line}", flush=True)


def measure(overrides: dict[str, int], dtype: torch.dtype, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn's update of 64 sequences, by implementation."""
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_model(Path(directory), seed=0, **overrides)
        config = ModelConfig(path=directory, enable_gradient_checkpointing=False)
        model = load_model(config, FSDPConfig(), torch.device("cpu"), key="model.path")
    engine = LocalEngine(
        model,
        None,
        optim=OptimConfig(lr=0.0),
        total_steps=1,
        grad_clip=1.0,
        temperature=1.0,
        compute_dtype=dtype,
        max_tokens=16384,
        micro_batch_size=None,
        with_reference=False,
    )
    data, objective = batch(64), Likelihood()
    seconds: dict[str, list[float]] = {impl: [] for impl in IMPLEMENTATIONS}
    for turn in range(turns + 1):
        for impl, times in seconds.items():
            model.set_experts_implementation(impl)
            start = time.perf_counter()
            engine.update(data, objective)
            if turn > 0:  # the first warms up
                times.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
