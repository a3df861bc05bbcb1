"""How fast each way to compute mixture-of-experts layers trains: forward and backward of a mini-batch.

    python -m benchmarks.experts [--turns 5]

Turn by turn on the same weights and tokens, so that a busy machine slows all alike. The default of
`actor_rollout_ref.model.experts_implementation` follows from it (docs/performance.md).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import RESULTS, Ratio, setting, table, take_turns, write_results
from benchmarks.update import DTYPES, local_engine, random_batch, write_checkpoint
from seqrl.training.experts import EXPERTS_NAME
from seqrl.training.objective import Likelihood

IMPLEMENTATIONS = (EXPERTS_NAME, "grouped_mm", "eager")
"""Without `batched_mm`, which copies each token's experts and takes tens of times as long on CPU."""
MODELS = {"moe-8x2": "8 experts, top-2", "moe-64x8": "64 experts, top-8"}
SEQUENCES, RESPONSE = 64, 64


def measure(model: str, dtype: torch.dtype, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn's update, by implementation."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = local_engine(write_checkpoint(model, Path(scratch)), dtype)
    batch, objective = random_batch(torch.full((SEQUENCES,), RESPONSE)), Likelihood()

    def update_with(implementation: str) -> Callable[[], None]:
        def run() -> None:
            engine.model.set_experts_implementation(implementation)
            engine.update(batch, objective)

        return run

    return take_turns({name: update_with(name) for name in IMPLEMENTATIONS}, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = setting(turns=args.turns)
    runs = {(m, d): measure(m, DTYPES[d], args.turns) for m in args.model for d in DTYPES}
    ours, *others = IMPLEMENTATIONS
    columns = ["", *(f"{name}, s" for name in IMPLEMENTATIONS), *(f"{name} takes, times" for name in others)]
    rows = [
        [
            f"{MODELS[model]}, {dtype}",
            *(f"{median(seconds[x]):.3f}" if x in seconds else "failed" for x in IMPLEMENTATIONS),
            *(Ratio.of(seconds[x], seconds[ours]) if x in seconds else "" for x in others),
        ]
        for (model, dtype), seconds in runs.items()
    ]
    markdown = f"# Experts: an update of {SEQUENCES} sequences\n\n{table(columns, rows)}"
    numbers = {f"{model}, {dtype}": seconds for (model, dtype), seconds in runs.items()}
    write_results("experts", here, markdown, numbers, directory=args.out)


if __name__ == "__main__":
    main()
