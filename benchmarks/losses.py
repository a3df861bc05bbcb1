"""Losses and advantages: their share of a training step, and their time and memory beside verl's.

    OMP_NUM_THREADS=1 python -m benchmarks.losses [--turns 9] [--no-step]

Compares where verl is installed (`make test-peers` makes an environment that has it) and says so where it is
not. Same numbers on both sides: seqrl's flat over the tokens, verl's padded to the longest response. Time is
taken turn by turn in one process; memory in a process for each, as the peak above what the inputs take.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

SEQUENCES, GROUP, LONGEST, MEAN, SIGMA = 512, 8, 8192, 2000, 0.8
"""Lengths in tokens; SIGMA is the spread of their logarithm."""
MODE = "seq-mean-token-mean"
SETTINGS: dict[str, dict[str, float]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "clip_c": math.inf},  # verl's has no dual clip
    "vanilla": {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0},
    "geo_mean": {"clip_low": 0.4, "clip_high": 0.4},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "cispo": {"clip_low": 1.0, "clip_high": 0.2},
}
ADVANTAGE = "grpo advantage"
WORK = (*SETTINGS, ADVANTAGE)


@dataclass(frozen=True)
class Numbers:
    """T response tokens of N sequences; in groups of `GROUP`, one after the other."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    """[T]."""
    lengths: Tensor
    reward: Tensor
    """[N]."""

    @classmethod
    def random(cls, sequences: int = SEQUENCES) -> Numbers:
        """Log-normal lengths and log ratios of about 0.1, both the same each time."""
        generator = torch.Generator().manual_seed(0)
        spread = SIGMA * torch.randn(sequences, generator=generator) + math.log(MEAN) - SIGMA**2 / 2
        lengths = spread.exp().clamp(1, LONGEST).long()
        logprobs = -2 * torch.rand(int(lengths.sum()), generator=generator)
        old_logprobs = logprobs + 0.1 * torch.randn(logprobs.numel(), generator=generator)
        advantages = torch.randn(sequences, generator=generator).repeat_interleave(lengths)
        return cls(logprobs, old_logprobs, advantages, lengths, torch.rand(sequences, generator=generator))


def seqrl_side(numbers: Numbers) -> dict[str, Callable[[], Tensor]]:
    """By name, what gives the gradient [T] of a loss, or the advantages [T]."""
    from seqrl.algos.advantages import grpo
    from seqrl.algos.aggregate import AGGREGATIONS
    from seqrl.algos.losses import LOSSES
    from seqrl.types import to_offsets

    offsets = to_offsets(numbers.lengths)
    group = torch.arange(len(numbers.lengths)) // GROUP
    counts = {"tokens": numbers.logprobs.numel(), "sequences": len(numbers.lengths), "scale": LONGEST}
    leaf = numbers.logprobs.clone().requires_grad_()

    def gradient(name: str) -> Tensor:
        surrogate = LOSSES[name](leaf, numbers.old_logprobs, numbers.advantages, offsets, **SETTINGS[name])
        # verl's functions give these metrics, too.
        (surrogate.clipped_low | surrogate.clipped_high).float().mean().item()
        surrogate.clipped_dual.float().mean().item()
        (numbers.old_logprobs - leaf.detach()).mean().item()
        return torch.autograd.grad(AGGREGATIONS[MODE](surrogate.values, offsets, **counts), leaf)[0]

    def advantage() -> Tensor:
        return grpo(numbers.reward, group, norm_by_std=True).repeat_interleave(numbers.lengths)

    return {**{name: lambda name=name: gradient(name) for name in SETTINGS}, ADVANTAGE: advantage}


def verl_side(numbers: Numbers) -> dict[str, Callable[[], Tensor]]:
    """The same of verl, padded [N, L]."""
    import numpy as np
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig

    kept = torch.arange(int(numbers.lengths.max())) < numbers.lengths[:, None]
    mask = kept.long()  # as it comes from the attention mask

    def padded(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(kept, values)

    leaf = padded(numbers.logprobs).requires_grad_()
    old_logprobs, advantages = padded(numbers.old_logprobs), padded(numbers.advantages)
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), numbers.lengths - 1] = numbers.reward
    group = np.arange(len(mask)) // GROUP

    def gradient(name: str) -> Tensor:
        given = {"clip_low": 0.2, "clip_high": 0.2, "clip_c": 3.0} | SETTINGS[name]
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=GROUP,
            use_dynamic_bsz=True,
            clip_ratio_low=given["clip_low"],
            clip_ratio_high=given["clip_high"],
            clip_ratio_c=given["clip_c"],
        )
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old_logprobs,
            log_prob=leaf,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=MODE,
            config=config,
        )
        return torch.autograd.grad(loss, leaf)[0]

    def advantage() -> Tensor:
        return core_algos.get_adv_estimator_fn("grpo")(rewards, mask, group)[0]

    return {**{name: lambda name=name: gradient(name) for name in SETTINGS}, ADVANTAGE: advantage}


SIDES = {"seqrl": seqrl_side, "verl": verl_side}


def time_in_turns(turns: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by name and side; checks first that both give the same numbers."""
    numbers = Numbers.random()
    kept = torch.arange(int(numbers.lengths.max())) < numbers.lengths[:, None]
    sides = {side: make(numbers) for side, make in SIDES.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in WORK:
        ours, theirs = (sides[side][name]() for side in SIDES)
        torch.testing.assert_close(ours, theirs[kept], rtol=1e-4, atol=1e-9)
        seconds[name] = {side: [] for side in SIDES}
        for _ in range(turns):
            for side, times in seconds[name].items():
                start = time.perf_counter()
                sides[side][name]()
                times.append(time.perf_counter() - start)
    return seconds


def peak_memory(side: str, name: str) -> int:
    """Bytes above what is held once the inputs are made; in this process, on Linux."""
    SIDES[side](Numbers.random(GROUP))[name]()  # what is imported and set up once is not counted
    run = SIDES[side](Numbers.random())[name]
    status = Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before)


def memory_in_processes() -> dict[str, dict[str, int]]:
    """Bytes by name and side. What is freed goes back to the system at once, so that nothing which the making
    of the inputs has left behind is used again uncounted."""

    def measured(side: str, name: str) -> int:
        command = [sys.executable, "-m", "benchmarks.losses", "--memory", side, name]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return int(answer.stdout.splitlines()[-1])

    return {name: {side: measured(side, name) for side in SIDES} for name in WORK}


def share_of_step(turns: int) -> dict[str, float]:
    """Seconds of a step of 32 prompts x 8 responses of up to 64 tokens on an untrained mixture of
    8 experts, and of its advantages and losses alone (forward, backward down to the log-probs, diagnostics).
    """
    from benchmarks.step import WORKLOADS, Seqrl, make_model
    from seqrl.trainer.clock import Clock
    from seqrl.training.objective import Counts

    with tempfile.TemporaryDirectory() as scratch:
        workload = WORKLOADS["up-to-64"]
        model = make_model("moe-8x2", workload, Path(scratch))
        trainer = Seqrl(model, Path(scratch) / "run", limit=workload.limit, dtype="float32").trainer
        steps, parts, lengths = [], [], []
        for _ in range(turns + 1):
            start = time.perf_counter()
            batch, _ = trainer.train_step(Clock(), lambda line: None)
            trainer.step += 1
            steps.append(time.perf_counter() - start)
            size = trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size * 8
            leaves = [
                (part, part.old_logprobs[part.response_mask].clone().requires_grad_())
                for part in (batch.select(range(i, i + size)) for i in range(0, len(batch), size))
            ]
            start = time.perf_counter()
            trainer.advantages(batch, [], [], kl_coef=0.0, baseline=None, sum_pi_squared=None)
            for part, logprobs in leaves:
                prepared = trainer.objective.prepared(part)
                entropy = torch.zeros_like(logprobs)
                trainer.objective(logprobs, entropy, prepared, Counts.of(part))[0].backward()
            parts.append(time.perf_counter() - start)
            lengths.append(float(batch.response_lengths.float().mean()))
    shares = [part / step for part, step in zip(parts, steps, strict=True)][1:]
    return {
        "step, seconds": median(steps[1:]),
        "losses and advantages, seconds": median(parts[1:]),
        "share": median(shares),
        "response, tokens": sum(lengths) / len(lengths),
    }


def to_markdown(results: Mapping[str, Any]) -> str:
    lines = ["# Losses and advantages\n", *(f"- {k}: {v}" for k, v in results["setting"].items())]
    if step := results.get("step"):
        lines += [
            "\n## Share of a training step\n",
            "32 prompts x 8 responses of up to 64 tokens, 8 experts, untrained.\n",
            "| step, s | losses and advantages, s | share | response, tokens |\n|---|---|---|---|",
            f"| {step['step, seconds']:.2f} | {step['losses and advantages, seconds']:.4f} "
            f"| {100 * step['share']:.2f}% | {step['response, tokens']:.1f} |",
        ]
    if seconds := results.get("seconds"):
        numbers = Numbers.random()
        lines += [
            "\n## Beside verl's padded functions\n",
            f"{SEQUENCES} sequences of {int(numbers.lengths.min())} to {int(numbers.lengths.max())} tokens, "
            f"log-normal, mean {numbers.lengths.float().mean():.0f}: forward, backward, `{MODE}`, clip "
            "fractions. Medians over turns; memory is the peak above the inputs.\n",
            "| | seqrl, ms | verl, ms | verl takes, times | in a turn | seqrl, MiB | verl, MiB | times |",
            "|---" * 8 + "|",
        ]
        for name, sides in seconds.items():
            ratios = sorted(b / a for a, b in zip(sides["seqrl"], sides["verl"], strict=True))
            ours, theirs = (1000 * median(sides[side]) for side in SIDES)
            held, verls = (results["bytes"][name][side] / 2**20 for side in SIDES)
            lines.append(
                f"| {name} | {ours:.1f} | {theirs:.1f} | **{median(ratios):.1f}** "
                f"| {ratios[0]:.1f} to {ratios[-1]:.1f} | {held:.0f} | {verls:.0f} | **{verls / held:.1f}** |"
            )
    return "\n".join(lines) + "\n"


def describe(turns: int, with_verl: bool) -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x] if cpuinfo.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.machine()
    packages = ["seqrl", "torch", *(["verl"] if with_verl else [])]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "processor": f"{processor}, {torch.get_num_threads()} thread, float32",
        "turns": f"{turns} each, in alternation",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--no-step", action="store_true", help="leave out the share of a training step")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(peak_memory(*args.memory))
        return
    with_verl, load = importlib.util.find_spec("verl") is not None, os.getloadavg()[0]
    results: dict[str, Any] = {"setting": describe(args.turns, with_verl)}
    if not args.no_step:
        results["step"] = share_of_step(args.turns)
    if with_verl:
        results |= {"seconds": time_in_turns(args.turns), "bytes": memory_in_processes()}
    else:
        print("*** NO COMPARISON: verl is not installed; `make test-peers` does it. ***", file=sys.stderr)
    results["setting"]["load average"] = f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(report := to_markdown(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(report)
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
