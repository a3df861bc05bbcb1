"""Time and peak memory of seqrl as sequences and batches double.

    python -m benchmarks.scaling [--model dense-3m] [--dtype float32]

Lengths: an update of `TOKENS` tokens in all, as 32 sequences of 256 tokens up to one of 8192. Time per token
ought to stay, but for attention, whose arithmetic grows with the length: its share of all arithmetic stands
beside, and time per operation, which has it counted, ought to stay as it is.

Batches: rollout and update of 32 to 1,024 responses of `NEW_TOKENS` tokens. Time per token ought to stay, and
falls as long as larger matrices are faster ones.

The exponent e is that of the power law through all points, time per token ~ size^e by least squares of the
logarithms: 0 is a straight line, 1 would be quadratic. Sizes take turns; memory is that of a process of its
own for each, above what it held after a small run, weights and optimizer state among it.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch

from benchmarks.measure import (
    RESULTS,
    in_fresh_process,
    peak_memory,
    setting,
    table,
    take_turns,
    write_results,
)
from benchmarks.models import SHAPES
from benchmarks.update import (
    DTYPES,
    GROUP,
    PROMPT,
    gspo,
    local_engine,
    make_config,
    random_batch,
    useful_flops,
    write_checkpoint,
)
from seqrl.types import Batch

TOKENS, NEW_TOKENS = 8192, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BATCHES = (32, 64, 128, 256, 512, 1024)
Run = Callable[[], Any]


class NoText:
    """A tokenizer that decodes nothing: text is not what is measured."""

    eos_token_id = 0

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [""] * len(rows)


def batch_of_length(length: int) -> Batch:
    """`TOKENS` in sequences of `length`, each with a prompt of its own."""
    return random_batch(torch.full((TOKENS // length,), length - PROMPT), group=1)


def batch_of_size(responses: int) -> Batch:
    return random_batch(torch.full((responses,), NEW_TOKENS))


def updates(directory: Path, dtype: torch.dtype, batches: Mapping[int, Batch]) -> dict[int, Run]:
    """By size, one optimizer step on that batch; all on one model."""
    engine, objective = local_engine(directory, dtype), gspo()

    def of(batch: Batch) -> Run:
        batch = replace(batch, old_logprobs=engine.logprobs(batch))
        return lambda: engine.update(batch, objective)

    return {size: of(batch) for size, batch in batches.items()}


def rollouts(directory: Path, dtype: torch.dtype, sizes: Sequence[int]) -> dict[int, Run]:
    """By size, the generation of so many responses, in groups, all of `NEW_TOKENS` tokens."""
    from transformers import AutoModelForCausalLM

    from seqrl.config.schema import RolloutConfig
    from seqrl.rollout.base import make_engine
    from seqrl.types import Prompt, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    engine = make_engine(model, NoText(), max_num_seqs=RolloutConfig().max_num_seqs, dtype=dtype)
    sampling = SamplingParams(NEW_TOKENS, n=GROUP, ignore_eos=True)

    def of(size: int) -> Run:
        rows = torch.randint(255, (size // GROUP, PROMPT)).tolist()
        prompts = [Prompt(f"p:{i}", "", (), "", {}, tuple(row)) for i, row in enumerate(rows)]
        return lambda: engine.generate(prompts, sampling, seed=0, policy_version=0)

    return {size: of(size) for size in sizes}


def run_of(kind: str, directory: Path, dtype: torch.dtype, sizes: Sequence[int]) -> dict[int, Run]:
    """`kind` is one of `KINDS`."""
    if kind == "rollout":
        return rollouts(directory, dtype, sizes)
    make = batch_of_length if kind == "length" else batch_of_size
    return updates(directory, dtype, {size: make(size) for size in sizes})


KINDS = {"length": LENGTHS, "rollout": BATCHES, "update": BATCHES}


def memory_of(kind: str, directory: Path, dtype: torch.dtype, size: int) -> int:
    """Bytes of a run, in a process that has done a small one before."""
    smallest = LENGTHS[0] if kind == "length" else GROUP
    runs = run_of(kind, directory, dtype, sorted({smallest, size}))
    runs[smallest]()
    return peak_memory(runs[size])[1]


def measure(
    kind: str, sizes: Sequence[int], directory: Path, dtype: torch.dtype, turns: int
) -> dict[str, Any]:
    """Seconds by size and turn, and bytes by size."""
    runs = run_of(kind, directory, dtype, sizes)
    seconds = take_turns({str(size): run for size, run in runs.items()}, turns)
    del runs
    memory = {str(size): in_fresh_process(memory_of, kind, directory, dtype, size) for size in sizes}
    return {"seconds": seconds, "bytes": memory}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> str:
    """e of values ~ size^e."""
    if len(sizes) < 2:
        return "-"
    return f"{linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope:+.2f}"


def length_table(measured: Mapping[str, Any], sizes: Sequence[int], config: Any) -> str:
    times = [median(measured["seconds"][str(size)]) for size in sizes]
    flops = [useful_flops(config, batch_of_length(size)) for size in sizes]
    bytes_ = [measured["bytes"][str(size)] for size in sizes]
    per_token = [seconds / TOKENS for seconds in times]
    per_flop = [seconds / whole for seconds, (whole, _) in zip(times, flops, strict=True)]
    shares = [attention / whole for whole, attention in flops]
    rows: list[list[Any]] = [
        [size, f"{1e6 * t:.1f}", f"{100 * share:.0f}%", f"{1e12 * f:.2f}", f"{b / 2**20:.0f}"]
        for size, t, share, f, b in zip(sizes, per_token, shares, per_flop, bytes_, strict=True)
    ]
    fitted = [exponent(sizes, per_token), "", exponent(sizes, per_flop), exponent(sizes, bytes_)]
    columns = ["tokens a sequence", "µs a token", "attention's arithmetic", "ps an operation", "peak, MiB"]
    return table(columns, [*rows, ["**exponent**", *fitted]])


def batch_table(rollout: Mapping[str, Any], update: Mapping[str, Any], sizes: Sequence[int]) -> str:
    def per_token(measured: Mapping[str, Any]) -> list[float]:
        return [median(measured["seconds"][str(size)]) / (size * NEW_TOKENS) for size in sizes]

    def peaks(measured: Mapping[str, Any]) -> list[int]:
        return [measured["bytes"][str(size)] for size in sizes]

    columns: list[Sequence[float]] = [per_token(rollout), per_token(update), peaks(rollout), peaks(update)]
    rows: list[list[Any]] = [
        [size, f"{1e6 * r:.1f}", f"{1e6 * u:.1f}", f"{a / 2**20:.0f}", f"{b / 2**20:.0f}"]
        for size, r, u, a, b in zip(sizes, *columns, strict=True)
    ]
    names = ["rollout, µs a token", "update, µs a token", "rollout, peak MiB", "update, peak MiB"]
    return table(["responses", *names], [*rows, ["**exponent**", *(exponent(sizes, c) for c in columns)]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*SHAPES], default="dense-3m")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32")
    parser.add_argument(
        "--largest", type=int, default=max(*LENGTHS, *BATCHES), help="leave out what is larger"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = setting(model=args.model, dtype=args.dtype, turns=args.turns)
    sizes = {kind: [x for x in all_sizes if x <= args.largest] for kind, all_sizes in KINDS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_checkpoint(args.model, Path(scratch))
        measured = {
            kind: measure(kind, of_kind, directory, DTYPES[args.dtype], args.turns)
            for kind, of_kind in sizes.items()
        }
        of_lengths = length_table(measured["length"], sizes["length"], make_config(directory))
    of_batches = batch_table(measured["rollout"], measured["update"], sizes["update"])
    markdown = f"""# Scaling: sequences and batches that double

Medians over turns, memory above that of a small run. The exponent is that of the size; 0 is a straight line.

## An update of {TOKENS} tokens

{of_lengths}

## Responses of {NEW_TOKENS} tokens

{of_batches}"""
    write_results("scaling", here, markdown, measured, directory=args.out)


if __name__ == "__main__":
    main()
