"""A mini-batch's forward, backward and optimizer step: seqrl and plain transformers with padding, in turns.

    python -m benchmarks.update [--model dense-25m] [--sequences 64 256]

Each in a process of its own, both take the same GSPO loss of the same sequences (groups of 8 with one prompt
each) and the same fused AdamW; their gradient norms are compared first. transformers pads on the right,
micro-batches of 64 sequences as they come, with scaled dot-product attention and, under bfloat16, autocast,
as seqrl.

MFU is useful arithmetic over time and over the matrix peak, which is measured beside each turn, for a matrix
unit may be quick in one second and slow in the next. The peak is the best of many products of milliseconds
within 1.5 seconds: a neighbour who takes the unit away for a part of every second does not show in it, but in
an update of half a second he does. So there are two: MFU of the turns' updates, and of the quickest of those
that fit into as much time, directly after the peak. Useful are 2 operations per weight and token in the
forward pass and 4 in the backward, attention where it is causal (half of a square), the head over response
tokens. What need not be computed does not count: padding, a group's prompt more than once, the last token of
a response, which predicts nothing, and anything computed twice. It is the same number for both sides, so
their MFUs differ as their times do. The optimizer step, a matter of memory and not of arithmetic, has a
column of its own and no part in MFU.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import (
    PEAK_WINDOW,
    RESULTS,
    Elsewhere,
    Ratio,
    in_fresh_process,
    matrix_peak,
    peak_memory,
    setting,
    table,
    take_turns,
    write_results,
)
from benchmarks.models import SHAPES, SIGMA, make_model
from seqrl.config.schema import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, PolicyLossConfig
from seqrl.training.local import LocalEngine
from seqrl.training.model import load_model
from seqrl.training.objective import PolicyObjective
from seqrl.types import Batch, to_offsets

GROUP, PROMPT, MEAN, LIMIT = 8, 16, 64, 256
"""Responses a prompt; tokens of a prompt, of responses on average, and of the longest."""
CLIP = 0.2
"""Wide enough that rounding clips nothing."""
EQUAL_DENSE = "dense as moe-64x8"
"""A dense model with as many active weights as moe-64x8: its 8 experts of 64 side by side."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    model: str
    dtype: str
    lengths: str
    sequences: int

    def batch(self) -> Batch:
        lengths = torch.full((self.sequences,), MEAN)
        return random_batch(log_normal(self.sequences) if self.lengths == "log-normal" else lengths)


@dataclass(frozen=True)
class Update:
    grad_norm: float
    step_seconds: float
    """Of the optimizer alone."""


Side = Callable[[], Update]
"""Does one."""


def log_normal(sequences: int) -> Tensor:
    """Response lengths [N] whose mean is `MEAN`, the same each time."""
    spread = torch.randn(sequences, generator=torch.Generator().manual_seed(0)) * SIGMA
    lengths = (spread + math.log(MEAN) - SIGMA**2 / 2).exp()
    return (lengths * MEAN / lengths.mean()).long().clamp(2, LIMIT)


def random_batch(responses: Tensor, *, group: int = GROUP, prompt: int = PROMPT) -> Batch:
    """Sequences of random tokens: `responses` are their lengths [N], each `group` of them share a prompt."""
    generator, n = torch.Generator().manual_seed(1), len(responses)
    prompts = torch.randint(255, (-(-n // group), prompt), generator=generator).repeat_interleave(group, 0)
    answers = [torch.randint(255, (int(length),), generator=generator) for length in responses]
    lengths = torch.stack([torch.full_like(responses, prompt), responses], 1)  # [N, 2]
    mask = torch.tensor([False, True]).repeat(n).repeat_interleave(lengths.flatten())
    advantages = torch.randn(n, generator=generator).repeat_interleave(lengths.sum(1))
    return Batch(
        tokens=torch.cat([x for pair in zip(prompts, answers, strict=False) for x in pair]),
        response_mask=mask,
        offsets=to_offsets(lengths.sum(1)),
        group=torch.arange(n) // group,
        policy_version=torch.zeros(n, dtype=torch.long),
        reward=torch.zeros(n),
        rollout_logprobs=torch.zeros(len(mask)),
        advantages=torch.where(mask, advantages, 0.0),
    )


def useful_flops(config: Any, batch: Batch) -> tuple[int, int]:
    """Of forward and backward, in all and attention's share of them; see the top of the file."""
    responses = batch.response_lengths
    prompts = (batch.lengths - responses)[batch.group.diff(prepend=torch.tensor([-1])) != 0]  # [G]
    read = responses - 1  # their last token is not
    starts = batch.lengths - responses
    tokens = int(prompts.sum() + read.sum())
    seen = int((prompts * (prompts + 1) // 2).sum() + (read * starts + read * (read + 1) // 2).sum())

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = config.hidden_size * config.head_dim * 2 * (heads + kv_heads)
    if hasattr(config, "num_experts"):
        active = config.num_experts_per_tok * 3 * config.moe_intermediate_size
        weights += config.hidden_size * (active + config.num_experts)
    else:
        weights += config.hidden_size * 3 * config.intermediate_size
    head = config.hidden_size * config.vocab_size * int(responses.sum())
    attention = 2 * heads * config.head_dim * seen * config.num_hidden_layers
    return 6 * (weights * config.num_hidden_layers * tokens + head + attention), 6 * attention


def write_checkpoint(name: str, directory: Path) -> Path:
    if name == EQUAL_DENSE:
        model = make_model("dense-3m")
        shape = SHAPES["moe-64x8"]
        model.config.intermediate_size = shape["num_experts_per_tok"] * shape["moe_intermediate_size"]
        model = type(model)(model.config)
    else:
        model = make_model(name)
    model.save_pretrained(directory)
    return directory


def local_engine(directory: Path, dtype: torch.dtype) -> LocalEngine:
    """seqrl's, with a learning rate of 0, so that every turn has the same to do."""
    config = ModelConfig(path=str(directory), enable_gradient_checkpointing=False)
    return LocalEngine(
        load_model(config, FSDPConfig(), torch.device("cpu"), key="model.path"),
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


def gspo() -> PolicyObjective:
    loss = PolicyLossConfig(loss_mode="gspo")
    return PolicyObjective(ActorConfig(clip_ratio_low=CLIP, clip_ratio_high=CLIP, policy_loss=loss), LIMIT)


def timed(update: Callable[[], float], optimizer: torch.optim.Optimizer) -> Side:
    """`update`, which gives back the gradient norm, with a clock at its one optimizer step."""
    start = seconds = 0.0

    def begin(*_: Any) -> None:
        nonlocal start
        start = time.perf_counter()

    def end(*_: Any) -> None:
        nonlocal seconds
        seconds = time.perf_counter() - start

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    return lambda: Update(update(), seconds)


def seqrl_side(directory: Path, dtype: torch.dtype, batch: Batch) -> Side:
    engine, objective = local_engine(directory, dtype), gspo()
    batch = replace(batch, old_logprobs=engine.logprobs(batch))
    return timed(lambda: engine.update(batch, objective).grad_norm, engine.optimizer)


def transformers_side(directory: Path, dtype: torch.dtype, batch: Batch) -> Side:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    parts = [PaddedPart.of(batch.select(index)) for index in torch.arange(len(batch)).split(64)]

    def logprobs(part: PaddedPart) -> Tensor:
        """[N, L-1]"""
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with autocast:
            logits = model(input_ids=part.tokens, attention_mask=part.attention_mask, use_cache=False).logits
        return logits[:, :-1].float().log_softmax(-1).gather(2, part.tokens[:, 1:, None])[..., 0]

    with torch.no_grad():
        old_logprobs = [logprobs(part) for part in parts]

    def update() -> float:
        for part, old in zip(parts, old_logprobs, strict=True):
            mask = part.response_mask[:, 1:]
            ratio = (((logprobs(part) - old) * mask).sum(1) / mask.sum(1)).exp()  # [N]
            surrogate = torch.min(ratio * part.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * part.advantages)
            (-surrogate.sum() / len(batch)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return timed(update, optimizer)


@dataclass(frozen=True)
class PaddedPart:
    """N sequences side by side, [N, L]."""

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    advantages: Tensor
    """[N]"""

    @classmethod
    def of(cls, part: Batch) -> PaddedPart:
        def padded(values: Tensor) -> Tensor:
            return pad_sequence(values.split(part.lengths.tolist()), batch_first=True)

        assert part.advantages is not None
        return cls(
            padded(part.tokens),
            padded(torch.ones_like(part.tokens)),
            padded(part.response_mask),
            part.advantages[part.offsets[1:] - 1],
        )


SIDES = {"seqrl": seqrl_side, "transformers": transformers_side}


def update_memory(side: str, directory: Path, dtype: torch.dtype, batch: Batch) -> int:
    """Bytes of two updates, from the loading of the weights on, in a process that has done one before."""

    def updates(batch: Batch) -> None:
        update = SIDES[side](directory, dtype, batch)
        update(), update()

    updates(batch.select(range(GROUP)))
    return peak_memory(lambda: updates(batch))[1]


@dataclass(frozen=True)
class Measured:
    seconds: dict[str, list[float]]
    """Of whole updates, by side."""
    peaks: list[float]
    """FLOP/s of the processor's matrix products, beside each turn."""
    step_seconds: dict[str, list[float]]
    """Of the optimizer's part in them."""
    quickest: list[float]
    """Seconds of seqrl's forward and backward, at the shortest after each of the peaks."""
    flops: int
    peak_bytes: dict[str, int]

    def apart(self, side: str) -> tuple[float, float]:
        """Medians: seconds of forward and backward, and of the optimizer step."""
        pairs = list(zip(self.seconds[side], self.step_seconds[side], strict=True))
        return median(whole - step for whole, step in pairs), median(step for _, step in pairs)

    def mfu(self, side: str) -> float:
        """Median of the turns."""
        turns = zip(self.seconds[side], self.step_seconds[side], self.peaks, strict=True)
        return median(self.flops / (whole - step) / peak for whole, step, peak in turns)

    def mfu_at_the_quickest(self) -> float:
        """Of seqrl, the median likewise."""
        turns = zip(self.quickest, self.peaks, strict=True)
        return median(self.flops / passes / peak for passes, peak in turns)


def measure(work: Work, turns: int, processes: Mapping[str, Elsewhere]) -> Measured:
    """`processes` has that of each side."""
    batch, dtype = work.batch(), DTYPES[work.dtype]
    steps: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_checkpoint(work.model, Path(scratch))
        sides = {name: processes[name].side(make, directory, dtype, batch) for name, make in SIDES.items()}
        ours, theirs = (side().grad_norm for side in sides.values())  # which warms them up
        if not math.isclose(ours, theirs, rel_tol=1e-3 if dtype == torch.float32 else 0.1):
            raise AssertionError(f"{work}: gradient norms {ours} and {theirs} are not of the same work")

        def turn(name: str) -> Callable[[], None]:
            return lambda: steps[name].append(sides[name]().step_seconds)

        def peak() -> None:
            peaks.append(processes["seqrl"].run(matrix_peak, dtype))
            quickest.append(quickest_passes(sides["seqrl"], PEAK_WINDOW))

        peaks: list[float] = []
        quickest: list[float] = []
        seconds = take_turns({**{name: turn(name) for name in sides}, "peak": peak}, turns, warmup=0)
        del seconds["peak"]
        config = make_config(directory)
        for process in processes.values():
            process.forget()
        memory = {name: in_fresh_process(update_memory, name, directory, dtype, batch) for name in seconds}
    steps = {name: steps[name] for name in seconds}  # of those that came to the end
    return Measured(seconds, peaks, steps, quickest, useful_flops(config, batch)[0], memory)


def quickest_passes(side: Side, window: float) -> float:
    """Seconds of forward and backward of the quickest update of those that begin within so many seconds."""
    shortest, stop = math.inf, time.perf_counter() + window
    while (start := time.perf_counter()) < stop:
        step = side().step_seconds
        shortest = min(shortest, time.perf_counter() - start - step)
    return shortest


def make_config(directory: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)


def to_rows(runs: Sequence[tuple[Work, Measured]]) -> Iterator[list[str]]:
    for work, measured in runs:
        cells = [work.model, work.lengths, str(work.sequences), work.dtype]
        for side in SIDES:
            if side not in measured.seconds:
                cells += ["failed"] * 4
                continue
            passes, step = measured.apart(side)
            memory = measured.peak_bytes[side] / 2**20
            cells += [f"{passes:.3f}", f"{step:.3f}", f"{100 * measured.mfu(side):.0f}%", f"{memory:.0f}"]
        cells.append(f"{100 * measured.mfu_at_the_quickest():.0f}%")
        cells.append(f"{median(measured.peaks) / 1e9:.0f}")
        both = len(measured.seconds) == len(SIDES)
        cells.append(f"**{Ratio.of(*(measured.seconds[x] for x in reversed(SIDES)))}**" if both else "")
        yield cells


def experts_against_dense(dtype: str, sequences: int, turns: int, process: Elsewhere) -> list[str]:
    """A line of the table that holds seqrl's update of moe-64x8 against that of a dense model, both in
    seqrl's `process`."""
    batch = Work("moe-64x8", dtype, "log-normal", sequences).batch()
    with tempfile.TemporaryDirectory() as scratch:
        sides, flops = {}, []
        for name in ("moe-64x8", EQUAL_DENSE):
            directory = write_checkpoint(name, Path(scratch) / name.replace(" ", "-"))
            sides[name] = process.side(seqrl_side, directory, DTYPES[dtype], batch)
            flops.append(useful_flops(make_config(directory), batch)[0])
        seconds = take_turns(sides, turns)
        process.forget()
    moe, dense = (seconds[name] for name in sides)
    cells = [dtype, str(sequences), f"{median(moe):.3f}", f"{median(dense):.3f}"]
    return [*cells, f"**{Ratio.of(moe, dense)}**", f"{flops[0] / flops[1]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models = ["dense-25m", "moe-64x8"]
    parser.add_argument("--model", nargs="*", choices=[*SHAPES], default=models)
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--sequences", nargs="+", type=int, default=[32])
    parser.add_argument("--lengths", nargs="+", choices=["log-normal", "equal"], default=["log-normal"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = setting(turns=args.turns)
    works = [
        Work(model, dtype, lengths, sequences)
        for model in args.model
        for lengths in args.lengths
        for sequences in args.sequences
        for dtype in args.dtype
    ]
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Elsewhere()) for name in SIDES}
        runs = [(work, measure(work, args.turns, processes)) for work in works]
        against = [
            experts_against_dense(dtype, sequences, args.turns, processes["seqrl"])
            for sequences in args.sequences
            for dtype in args.dtype
        ]
    of_side = ["passes, s", "optimizer, s", "MFU", "MiB"]
    columns = ["model", "lengths", "sequences", "dtype", *(f"{x}: {c}" for x in SIDES for c in of_side)]
    columns += ["seqrl: MFU at its quickest", "peak, GFLOP/s", "seqrl is faster"]
    versus = ["dtype", "sequences", "moe-64x8, s", "dense, s", "MoE takes, times", "its FLOPs, times"]
    markdown = f"""# Update: seqrl and padded transformers

Prompts of {PROMPT} tokens, one for {GROUP} responses of {MEAN} tokens on average, of {LIMIT} at most.
Medians over turns. Passes are forward and backward; MiB are the peak of an update with weights, gradients and
optimizer state.

{table(columns, to_rows(runs))}

## Experts against a dense model of equal active weights

Both through seqrl, log-normal lengths.

{table(versus, against)}"""
    numbers = {"runs": [{**asdict(work), **asdict(measured)} for work, measured in runs]}
    write_results("update", here, markdown, numbers | {"experts": against}, directory=args.out)


if __name__ == "__main__":
    main()
