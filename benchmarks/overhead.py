"""What a training step spends beside its work, and where the memory of a whole run goes.

    python -m benchmarks.overhead [--steps 12]

Overhead is what is left of a step's seconds (`timing_s/*` of its metrics) without generation, forward and
backward passes and verifier: data, advantages, metrics, their files, checkpoints. The forward passes that
measure how far the experts' choices move (`routing`, mixtures only) are no part of it, and of a second number
they are: nothing but that metric asks for them. The first step, which has the self-test, and validation,
which is no training, are left out. The quickstart's model is the one after its cold start (made anew, about a
minute), whose responses are short. The others have the reward of `benchmarks.step`, the share of digits:
their answers are all wrong, and without a difference nobody has a gradient.

Memory is the most that the process of `seqrl train` held at any time. Weights, gradients, the optimizer's
state and the KV cache are counted from their shapes, the cache as the rows that a step decodes times the
longest sequence; the interpreter and its libraries are what a process holds that has only imported them; the
rest are activations and whatever else. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import step
from benchmarks.measure import RESULTS, setting, table, write_results
from benchmarks.models import write_model
from benchmarks.update import make_config
from seqrl import quickstart
from seqrl.report.files import METRICS, read_rows

WORK = ("gen", "old_log_prob", "ref", "update_actor", "reward", "routing")
NO_PART = ("step", "testing")
PROMPTS, RESPONSES = 32, 8
DIGITS = f"custom_reward_function.path={Path(step.__file__).resolve()}"
PROMPT_LIMIT = 32
"""The quickstart's, in tokens."""


@dataclass(frozen=True)
class Run:
    """Of one `seqrl train`."""

    rows: list[dict[str, Any]]
    """A line of metrics for each step."""
    peak_bytes: int


def quickstart_model(directory: Path) -> Path:
    """After its cold start."""
    quickstart.write_model(directory, seed=1)
    path = quickstart.teach(directory, seed=1)
    if path is None:
        raise SystemExit("the cold start did not finish")
    return path


def train(model: Path, directory: Path, steps: int, limit: int, dtype: str, arguments: Sequence[str]) -> Run:
    """The quickstart's recipe on `model`, with responses of up to `limit` tokens."""
    command = [
        *(sys.executable, "-m", "seqrl.cli", "train", "--config-name=quickstart"),
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.actor.fsdp_config.dtype={dtype}",
        f"data.max_response_length={limit}",
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        f"trainer.default_local_dir={directory}",
        f"trainer.total_training_steps={steps}",
        "trainer.device=cpu",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        *arguments,
    ]
    peak = peak_of(command)
    return Run(read_rows(directory / METRICS), peak)


_ASIDE = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""
"""Says a child's peak. Linux counts what its parent holds, too, so the parent is one that holds nothing."""


def peak_of(command: Sequence[str]) -> int:
    """Bytes that the process of `command` held at most. Raises CalledProcessError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    aside = [sys.executable, "-S", "-c", _ASIDE, *command]
    done = subprocess.run(aside, stdout=subprocess.PIPE, env=environment, check=True)
    return int(done.stdout) * 1024


def seconds_by_part(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over all steps but the first: each stage's seconds, what is left of the step, and the share of
    that which is overhead."""
    prefix = "timing_s/"
    steps = [{k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)} for row in rows[1:]]

    def middle(name: str) -> float:
        return median(step.get(name, 0.0) for step in steps)

    def whole(step: Mapping[str, float]) -> float:
        return step["step"] - step.get("testing", 0.0)

    def work(step: Mapping[str, float], but: str = "") -> float:
        return sum(step.get(name, 0.0) for name in WORK if name != but)

    stages = sorted({name for step in steps for name in step} - {*NO_PART, *WORK})
    unnamed = median(whole(step) - work(step) - sum(step.get(x, 0.0) for x in stages) for step in steps)
    return {
        "step": median(map(whole, steps)),
        **{name: middle(name) for name in (*WORK, *stages)},
        "unnamed": unnamed,
        "overhead, share": median(1 - work(step) / whole(step) for step in steps),
        "with routing, share": median(1 - work(step, "routing") / whole(step) for step in steps),
    }


def bytes_by_part(model: Path, limit: int, dtype: str, peak: int) -> dict[str, int]:
    """Of a float32 model under AdamW; the last is what none of the others explains."""
    from transformers import AutoModelForCausalLM

    config = make_config(model)
    weights = 4 * sum(x.numel() for x in AutoModelForCausalLM.from_pretrained(model).parameters())
    number = 4 if dtype == "float32" else 2
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "KV cache": PROMPTS * RESPONSES * (PROMPT_LIMIT + limit) * token,
        "interpreter": peak_of(
            [sys.executable, "-c", "import seqrl.cli, seqrl.training.local, transformers"]
        ),
    }
    return {**parts, "activations and the rest": peak - sum(parts.values())}


def ratio(parts: Mapping[str, int]) -> float:
    """The peak over what has to be there at the least."""
    least = sum(parts[name] for name in ("weights", "gradients", "optimizer", "KV cache"))
    return sum(parts.values()) / least


def time_table(runs: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(name for parts in runs.values() for name in parts))
    cells = {
        run: [
            f"**{100 * parts[name]:.1f}%**" if name.endswith("share") else f"{parts.get(name, 0.0):.4f}"
            for name in columns
        ]
        for run, parts in runs.items()
    }
    return table(["seconds", *columns], [[run, *line] for run, line in cells.items()])


def memory_table(runs: Mapping[str, Mapping[str, int]]) -> str:
    columns = list(next(iter(runs.values())))
    return table(
        ["MiB", "peak", *columns, "peak over weights, gradients, optimizer and KV cache"],
        [
            [run, *(f"{x / 2**20:.0f}" for x in (sum(p.values()), *p.values())), f"**{ratio(p):.2f}**"]
            for run, p in runs.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="of each run whose time is taken")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument(
        "--limit", nargs="+", type=int, default=[64, 256], help="tokens, of the memory's runs"
    )
    parser.add_argument(
        "--micro-batch", nargs="+", type=int, default=[4096, 16384], help="tokens, of the memory's runs"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = setting(steps=args.steps)
    seconds: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        tiny = quickstart_model(root)
        small = write_model("dense-3m", root / "dense-3m", mean_length=64.0, limit=256)
        large = write_model("dense-25m", root / "dense-25m")
        for dtype in args.dtype:
            for name, model, limit, arguments in (
                ("quickstart", tiny, 32, []),
                ("dense-3m, spread-out lengths", small, 256, [DIGITS]),
            ):
                run = train(
                    model, root / f"{model.name}-{limit}-{dtype}", args.steps, limit, dtype, arguments
                )
                seconds[f"{name}, {dtype}"] = seconds_by_part(run.rows)
            for limit, tokens in product(args.limit, args.micro_batch):
                arguments = [DIGITS, f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}"]
                directory = root / f"memory-{limit}-{tokens}-{dtype}"
                run = train(large, directory, 2, limit, dtype, arguments)
                name = f"up to {limit} response tokens, micro-batches of {tokens:,}, {dtype}"
                memory[name] = bytes_by_part(large, limit, dtype, run.peak_bytes)
    markdown = f"""# Overhead of a step, and memory of a run

{PROMPTS} prompts x {RESPONSES} responses, 4 optimizer steps, the quickstart's recipe. Medians over steps.

{time_table(seconds)}

## Memory of a run with dense-25m

{memory_table(memory)}"""
    write_results("overhead", here, markdown, {"seconds": seconds, "bytes": memory}, directory=args.out)


if __name__ == "__main__":
    main()
