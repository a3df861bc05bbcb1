"""One GSPO iteration of seqrl against TRL's GRPOTrainer, turn by turn, each in a process of its own.

An iteration is 32 prompts x 8 responses, rewards, old log-probs and 4 optimizer steps. Both start from the
same weights and have the same prompts, temperature, reward, loss, clip range and AdamW. TRL's own loop
drives: after each of its iterations its clock stands still while seqrl, elsewhere and by its own clock, does
one in each dtype.

    python -m benchmarks.step [--workload spread up-to-64] [--model dense-3m moe-8x2] [--dtype float32]

Needs the `bench` extra; without TRL it says so and measures seqrl alone. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.measure import RESULTS, Elsewhere, Ratio, setting, table, write_results
from benchmarks.models import SHAPES, write_model

PROBLEMS, PROMPTS, RESPONSES, MINI_BATCHES = 3000, 32, 8, 4
CLIP_LOW, CLIP_HIGH, LEARNING_RATE = 3e-4, 4e-4, 5e-5
STAGES = ("generation", "old log-probs", "update", "rest")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Workload:
    about: str
    limit: int
    """Most tokens of a response."""
    mean_length: float | None = None
    """Tokens, where responses end by themselves at log-normal lengths; see `benchmarks.models`."""


WORKLOADS = {
    "spread": Workload("Responses end by themselves at log-normal lengths, up to 256 tokens.", 256, 64.0),
    "up-to-64": Workload("Untrained weights: most responses run to the limit of 64 tokens.", 64),
    "up-to-256": Workload("Untrained weights: many responses run to the limit of 256 tokens.", 256),
    "cold-start": Workload("After the quickstart's cold start: responses end by themselves, early.", 64),
}


@dataclass(frozen=True)
class Iteration:
    seconds: float
    processor_seconds: float
    """Of all threads together; unlike `seconds`, other programs on the machine hardly change it."""
    response_length: float
    """Mean, tokens."""
    clipped: float
    """Share of the responses' tokens whose gradient the clip takes."""
    stages: Mapping[str, float]
    """Seconds by stage."""


Turns = Mapping[str, list[Iteration]]
"""By side, as `TRL float32`."""


class Stopwatch:
    def __init__(self) -> None:
        self.start, self.processor_start = time.perf_counter(), time.process_time()

    def iteration(self, response_length: float, clipped: float, stages: Mapping[str, float]) -> Iteration:
        seconds, processor = time.perf_counter() - self.start, time.process_time() - self.processor_start
        stages = {**stages, "rest": seconds - sum(stages.values())}
        return Iteration(seconds, processor, response_length, clipped, stages)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
    """The share of digits: unlike right or wrong, it differs within the groups of any model."""
    return sum(character.isdigit() for character in solution_str) / (len(solution_str) or 1)


class Seqrl:
    """`seqrl train` with the quickstart recipe, a step at a time; weights in float32, products in `dtype`."""

    def __init__(self, model: Path, directory: Path, *, limit: int, dtype: str) -> None:
        from seqrl.cli import build_trainer
        from seqrl.config.load import load
        from seqrl.config.schema import Config

        directory.mkdir(parents=True)
        arguments = [
            "--config-name=quickstart",
            f"actor_rollout_ref.model.path={model}",
            f"data.train_files=chained_arithmetic:?size={PROBLEMS}&split=train",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_response_length={limit}",
            f"actor_rollout_ref.rollout.n={RESPONSES}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // MINI_BATCHES}",
            f"actor_rollout_ref.actor.clip_ratio_low={CLIP_LOW}",
            f"actor_rollout_ref.actor.clip_ratio_high={CLIP_HIGH}",
            f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
            f"actor_rollout_ref.actor.fsdp_config.dtype={dtype}",
            f"custom_reward_function.path={Path(__file__).resolve()}",
            f"trainer.default_local_dir={directory}",
            "trainer.device=cpu",
            "trainer.test_freq=-1",
        ]
        self.trainer = build_trainer(load(Config, arguments, default_name="ppo_trainer"))

    def iterate(self) -> Iteration:
        from seqrl.trainer.clock import Clock

        clock, watch = Clock(), Stopwatch()
        _, metrics = self.trainer.train_step(clock, lambda line: None)
        self.trainer.step += 1
        names = ("gen", "old_log_prob", "update_actor")
        stages = {stage: clock.seconds[name] for stage, name in zip(STAGES, names, strict=False)}
        return watch.iteration(metrics["response_length/mean"], metrics["actor/pg_clipfrac"], stages)


def seqrl_side(model: Path, directory: Path, limit: int, dtype: str) -> Callable[[], Iteration]:
    return Seqrl(model, directory, limit=limit, dtype=dtype).iterate


def trl_trainer(
    model: Path, directory: Path, *, limit: int, dtype: str, experts: str, iterations: int
) -> Any:
    """TRL's GRPOTrainer as fast as its options make it on CPU; seconds by stage go to its `stages`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from seqrl.data.chained_arithmetic import rows

    class TimedTrainer(GRPOTrainer):
        stages: dict[str, float]

        @contextmanager
        def _timed(self, stage: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            self.stages[stage] = time.perf_counter() - start + self.stages.get(stage, 0.0)

        def _prepare_inputs(self, *args: Any) -> Any:
            with self._timed("batch"):
                return super()._prepare_inputs(*args)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with self._timed("generation"):
                return super()._generate_single_turn(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            with self._timed("new log-probs" if torch.is_grad_enabled() else "old log-probs"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [compute_score("", completion[0]["content"], "", {}) for completion in completions]

    # Its defaults: one pass over a batch, temperature 1, no KL, cut responses count, norm clipped at 1.
    config = GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * RESPONSES // MINI_BATCHES,
        steps_per_generation=MINI_BATCHES,
        num_generations=RESPONSES,
        max_steps=MINI_BATCHES * iterations,
        max_completion_length=limit,
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        router_aux_loss_coef=0.0,  # seqrl has no such loss, so TRL is spared it
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    if hasattr(policy.config, "num_experts"):
        policy.set_experts_implementation(experts)
    trainer = TimedTrainer(
        policy,
        reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows(size=PROBLEMS)]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    # accelerate keeps one state for all trainers of a process.
    assert trainer.accelerator.mixed_precision == {"float32": "no", "bfloat16": "bf16"}[dtype]
    return trainer


def drive(trainer: Any, then: Callable[[], None]) -> list[Iteration]:
    """Runs TRL's loop to its end, with `then` after each iteration, outside its time."""
    from transformers import PrinterCallback, TrainerCallback

    iterations: list[Iteration] = []

    class Turns(TrainerCallback):
        watch = Stopwatch()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % MINI_BATCHES:
                return
            stages = {stage: trainer.stages[stage] for stage in ("generation", "old log-probs")}
            # All but the making of the batch: forward, backward, clipping, AdamW, the loop itself.
            stages["update"] = time.perf_counter() - self.watch.start - trainer.stages["batch"]
            logged = trainer._metrics["train"]
            length, clipped = logged["completions/mean_length"][-1], logged["clip_ratio/region_mean"]
            iterations.append(self.watch.iteration(length, mean(clipped[-MINI_BATCHES:]), stages))
            then()
            trainer.stages, self.watch = {}, Stopwatch()

    trainer.stages = {}
    trainer.add_callback(Turns())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return iterations


def make_model(name: str, workload: Workload, directory: Path) -> Path:
    """A Hugging Face directory: one of `SHAPES`, or `quickstart`, that model after its cold start."""
    if name != "quickstart":
        return write_model(name, directory / "model", mean_length=workload.mean_length, limit=workload.limit)
    from seqrl.cli import main as seqrl
    from seqrl.data.chained_arithmetic import worked_rows
    from seqrl.tiny import write_tiny_model

    model, solutions = directory / "model", directory / "solutions.jsonl"
    write_tiny_model(model, seed=1)
    solutions.write_text("".join(json.dumps(row) + "\n" for row in worked_rows(size=16384, seed=1)))
    files = [f"model.path={model}", f"data.train_files={solutions}"]
    run = [f"trainer.default_local_dir={directory / 'sft'}", "trainer.logger=[]"]
    if seqrl(["sft", "--config-name=quickstart_sft", *files, *run]):
        raise SystemExit("the cold start failed")
    return directory / "sft" / "huggingface"


def measure(
    model: Path,
    directory: Path,
    workload: Workload,
    theirs: str | None,
    elsewhere: Elsewhere,
    args: argparse.Namespace,
) -> Turns:
    """The turns of TRL in the dtype `theirs` (None: without it), in this process, and of seqrl in every
    dtype, elsewhere, warmed up."""
    ours, count = {}, args.warmup + args.iterations
    for dtype in args.dtype:
        made = elsewhere.side(seqrl_side, model, directory / dtype, workload.limit, dtype)
        ours[f"seqrl {dtype}"] = made
    turns: dict[str, list[Iteration]] = {name: [] for name in ours}

    def iterate() -> None:
        for name, side in ours.items():
            turns[name].append(side())

    if theirs is None:
        for _ in range(count):
            iterate()
    else:
        same = {"limit": workload.limit, "dtype": theirs, "experts": args.trl_experts, "iterations": count}
        trainer = trl_trainer(model, directory / "trl", **same)
        turns |= {f"TRL {theirs}": drive(trainer, then=iterate)}
    elsewhere.forget()
    return {name: iterations[args.warmup :] for name, iterations in turns.items()}


def median_seconds(turns: Sequence[Iteration]) -> float:
    return median(turn.seconds for turn in turns)


def compare(runs: Sequence[Turns]) -> dict[str, Ratio]:
    """TRL's time over seqrl's, turn by turn in one run: the fastest of each, and each dtype with its like."""

    def fastest(run: Turns, sides: str) -> str:
        names = [side for side in run if side.startswith(sides)]
        return min(names, key=lambda side: median_seconds(run[side]))

    def ratio(run: Turns, ours: str) -> Ratio:
        both = run[fastest(run, "TRL")], run[ours]
        return Ratio.of(*([turn.seconds for turn in turns] for turns in both))

    best = min(runs, key=lambda run: median_seconds(run[fastest(run, "TRL")]))
    theirs, ours = fastest(best, "TRL"), fastest(best, "seqrl")
    ratios = {f"each at its best: {theirs}, {ours}": ratio(best, ours)}
    for run in runs:
        dtype = fastest(run, "TRL").removeprefix("TRL ")
        ratios[f"both in {dtype}"] = ratio(run, fastest(run, f"seqrl {dtype}"))
    return ratios


def section(title: str, about: str, runs: Sequence[Turns]) -> str:
    """Medians by side, a table for each run, and the ratios."""
    columns = ("", "iteration", *STAGES, "processor", "response, tokens", "clipped")
    lines = [f"## {title}", about]
    for run in runs:
        rows = []
        for side, turns in run.items():
            stages = [median(turn.stages[stage] for turn in turns) for stage in STAGES]
            cells = [median_seconds(turns), *stages, median(turn.processor_seconds for turn in turns)]
            length = mean(turn.response_length for turn in turns)
            clipped = mean(turn.clipped for turn in turns)
            rows.append((side, *(f"{x:.2f}" for x in cells), f"{length:.1f}", f"{clipped:.2f}"))
        lines.append(table(columns, rows))
    if any(side.startswith("TRL") for side in runs[0]):
        lines.append(table(("", "TRL takes, times as long"), compare(runs).items()))
    return "\n\n".join(lines)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.compare = importlib.util.find_spec("trl") is not None
    if not args.compare:
        print("*** NO COMPARISON: TRL is not installed, seqrl alone is measured. ***", file=sys.stderr)
        print("*** It comes with: pip install 'seqrl[bench]' ***", file=sys.stderr)
    here = setting(
        *(["trl"] if args.compare else []),
        turns=f"{args.iterations} each, in alternation, after {args.warmup} to warm up",
        **({"TRL's_experts_implementation": args.trl_experts} if args.compare else {}),
    )
    sections, numbers = [], {}
    with Elsewhere() as elsewhere:
        for name in args.workload:
            workload = WORKLOADS[name]
            for model in ["quickstart"] if name == "cold-start" else args.model:
                with tempfile.TemporaryDirectory() as scratch:
                    # Elsewhere, too: a cold start is seqrl's.
                    path = elsewhere.run(make_model, model, workload, Path(scratch))
                    runs = [
                        measure(path, Path(scratch) / f"beside-{theirs}", workload, theirs, elsewhere, args)
                        for theirs in (args.dtype if args.compare else [None])
                    ]
                numbers[f"{model}, {name}"] = runs
                sections.append(section(f"{model}, {name}", workload.about, runs))
                print(sections[-1], file=sys.stderr)
    title = (
        f"# One GSPO iteration: seqrl and TRL\n\n{PROMPTS} prompts x {RESPONSES} responses, {MINI_BATCHES} "
        "optimizer steps. Seconds, medians over turns; processor seconds are those of all threads together; "
        "ratios with the smallest and the largest of a turn. `clipped`: the share of tokens whose gradient "
        "the clip takes; seqrl leaves out the backward pass of such sequences, TRL does not."
    )
    write_results(args.name, here, "\n\n".join([title, *sections]), numbers, directory=args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=[*SHAPES], default=["dense-3m", "moe-8x2"])
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=["spread", "up-to-64"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES], help="of both sides")
    parser.add_argument("--iterations", type=int, default=5, help="counted turns")
    parser.add_argument("--warmup", type=int, default=1, help="turns before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl-experts", default="grouped_mm", choices=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--name", default="step", help="of the files written")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    return parser.parse_args()


if __name__ == "__main__":
    main()
