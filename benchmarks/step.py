"""One GSPO iteration of seqrl against TRL's GRPOTrainer, turn by turn in one process.

An iteration is 32 prompts x 8 responses of up to 64 tokens, rewards, old log-probs, and 4 optimizer
steps. Both trainers start from the same weights, read the same prompts, draw at temperature 1, score
with the same function and train with the same loss, clip range and AdamW, in float32. TRL's own training loop drives:
after each of its iterations its clock stands still while seqrl does one.

    python -m benchmarks.step [--workload random cold-start] [--iterations 9]

Needs the `bench` extra; without TRL it says so and measures seqrl alone. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPTS, RESPONSES, MAX_TOKENS, MINI_BATCHES = 32, 8, 64, 4
CLIP_LOW, CLIP_HIGH, LEARNING_RATE = 3e-4, 4e-4, 5e-5
DATA = "chained_arithmetic:?size=3000&split=train"
STAGES = ("generation", "old log-probs", "update", "rest")
WORKLOADS = {
    "random": "untrained weights: most responses run to the limit",
    "cold-start": "after the quickstart's cold start: responses end by themselves",
}


@dataclass(frozen=True)
class Iteration:
    seconds: float
    response_length: float
    """Mean, tokens."""
    stages: Mapping[str, float]
    """Seconds by stage."""

    @classmethod
    def of(cls, seconds: float, response_length: float, stages: Mapping[str, float]) -> Iteration:
        return cls(seconds, response_length, {**stages, "rest": seconds - sum(stages.values())})


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
    """The share of digits: unlike right or wrong, it differs within the groups of any model."""
    return sum(character.isdigit() for character in solution_str) / (len(solution_str) or 1)


class Seqrl:
    """`seqrl train` with the quickstart recipe, one step at a time."""

    def __init__(self, model: Path, directory: Path) -> None:
        from seqrl.cli import build_trainer
        from seqrl.config.load import load
        from seqrl.config.schema import Config

        arguments = [
            "--config-name=quickstart",
            f"actor_rollout_ref.model.path={model}",
            f"data.train_files={DATA}",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_response_length={MAX_TOKENS}",
            f"actor_rollout_ref.rollout.n={RESPONSES}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // MINI_BATCHES}",
            f"actor_rollout_ref.actor.clip_ratio_low={CLIP_LOW}",
            f"actor_rollout_ref.actor.clip_ratio_high={CLIP_HIGH}",
            f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
            f"custom_reward_function.path={Path(__file__).resolve()}",
            f"trainer.default_local_dir={directory}",
            "trainer.device=cpu",
            "trainer.test_freq=-1",
        ]
        directory.mkdir()
        self.trainer = build_trainer(load(Config, arguments, default_name="ppo_trainer"))

    def iterate(self) -> Iteration:
        from seqrl.trainer.loop import Clock

        clock = Clock()
        start = time.perf_counter()
        _, metrics = self.trainer.train_step(clock)
        seconds = time.perf_counter() - start
        self.trainer.step += 1
        names = {"generation": "gen", "old log-probs": "old_log_prob", "update": "update_actor"}
        stages = {stage: clock.seconds[name] for stage, name in names.items()}
        return Iteration.of(seconds, metrics["response_length/mean"], stages)


def trl_trainer(model: Path, directory: Path, experts: str, iterations: int) -> Any:
    """TRL's GRPOTrainer as fast as its options make it on CPU, timing its own stages in `stages`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        stages: dict[str, float]

        @contextmanager
        def _timed(self, stage: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

        def _prepare_inputs(self, *args: Any) -> Any:
            with self._timed("prepare"):
                return super()._prepare_inputs(*args)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with self._timed("generation"):
                return super()._generate_single_turn(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            with self._timed("old log-probs"):
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def reward(completions: list[Any], ground_truth: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [compute_score("", text, truth, {}) for text, truth in zip(texts, ground_truth, strict=True)]

    config = GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * RESPONSES // MINI_BATCHES,
        steps_per_generation=MINI_BATCHES,
        num_generations=RESPONSES,
        num_iterations=1,
        max_steps=MINI_BATCHES * iterations,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.0,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        mask_truncated_completions=False,
        router_aux_loss_coef=0.0,  # seqrl has none either
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    import torch

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    policy.set_experts_implementation(experts)
    return TimedTrainer(
        policy,
        reward,
        args=config,
        train_dataset=Dataset.from_list(_problems()),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def take_turns(trainer: Any, theirs: list[Iteration], then: Callable[[], None]) -> None:
    """Runs TRL's loop; `then` after each of its iterations, outside its time."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % MINI_BATCHES:
                return
            seconds = time.perf_counter() - self.start
            spent = trainer.stages
            stages = {stage: spent[stage] for stage in ("generation", "old log-probs")}
            # All but the making of the batch: forward, backward, clipping, AdamW, the loop.
            stages["update"] = seconds - spent["prepare"]
            lengths = trainer._metrics["train"]["completions/mean_length"]
            theirs.append(Iteration.of(seconds, lengths[-1], stages))
            then()
            self._begin()

        def _begin(self) -> None:
            trainer.stages = {}
            self.start = time.perf_counter()

    trainer.add_callback(Turns())
    trainer.train()


def measure(model: Path, directory: Path, args: argparse.Namespace) -> dict[str, list[Iteration]]:
    """Iterations by trainer, those of the warm-up left out."""
    ours, theirs = Seqrl(model, directory / "seqrl"), []
    done: list[Iteration] = []

    def one_of_ours() -> None:
        done.append(ours.iterate())

    iterations = args.warmup + args.iterations
    if not _trl_missing():
        trainer = trl_trainer(model, directory / "trl", args.trl_experts, iterations)
        take_turns(trainer, theirs, one_of_ours)
        return {"seqrl": done[args.warmup :], "trl": theirs[args.warmup :]}
    for _ in range(iterations):
        one_of_ours()
    return {"seqrl": done[args.warmup :]}


def write_model(workload: str, directory: Path) -> Path:
    """The quickstart's model, as it is made or after its cold start."""
    from seqrl.cli import main as seqrl
    from seqrl.data.chained_arithmetic import worked_rows
    from seqrl.tiny import write_tiny_model

    model = directory / "model"
    write_tiny_model(model, seed=1)
    if workload == "random":
        return model
    solutions = directory / "solutions.jsonl"
    solutions.write_text("".join(json.dumps(row) + "\n" for row in worked_rows(size=16384, seed=1)))
    arguments = [
        f"model.path={model}",
        f"data.train_files={solutions}",
        f"trainer.default_local_dir={directory / 'sft'}",
        "trainer.logger=[]",
    ]
    if seqrl(["sft", "--config-name=quickstart_sft", *arguments]):
        raise SystemExit("the cold start failed")
    return directory / "sft" / "huggingface"


def summarize(runs: Mapping[str, list[Iteration]]) -> dict[str, Any]:
    """Medians by trainer, and TRL's time over seqrl's, turn by turn."""
    summary: dict[str, Any] = {}
    for name, turns in runs.items():
        summary[name] = {
            "seconds": statistics.median(turn.seconds for turn in turns),
            "response_length": statistics.mean(turn.response_length for turn in turns),
            "stages": {stage: statistics.median(turn.stages[stage] for turn in turns) for stage in STAGES},
        }
    if "trl" in runs:
        pairs = zip(runs["seqrl"], runs["trl"], strict=True)
        ratios = [theirs.seconds / ours.seconds for ours, theirs in pairs]
        summary["ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return summary


def to_markdown(setting: Mapping[str, Any], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    lines = [
        "# One GSPO iteration: seqrl and TRL",
        "",
        f"{PROMPTS} prompts x {RESPONSES} responses of up to {MAX_TOKENS} tokens, {MINI_BATCHES} optimizer "
        f"steps; {setting['dtype']}, {setting['threads']} threads; medians of {setting['iterations']} "
        f"iterations each, taken in turns after {setting['warmup']} to warm up.",
        "",
        f"{setting['date']}; {versions}; {setting['cpu']}, {setting['cores']} cores; load average "
        f"{setting['load_before']:.1f} before, {setting['load_after']:.1f} after. TRL's "
        f"experts_implementation: {setting['trl_experts']}.",
    ]
    for workload, summary in summaries.items():
        lines += ["", f"## {workload}", "", f"{WORKLOADS.get(workload, 'the given model')}", ""]
        lines += ["| | seconds | " + " | ".join(STAGES) + " | mean response, tokens |", "|---" * 7 + "|"]
        for name in ("seqrl", "trl"):
            if name in summary:
                side = summary[name]
                cells = [f"{side['seconds']:.2f}", *(f"{side['stages'][stage]:.2f}" for stage in STAGES)]
                lines.append(f"| {name} | {' | '.join(cells)} | {side['response_length']:.1f} |")
        if "ratio" in summary:
            ratio = summary["ratio"]
            lines += ["", f"**seqrl is {ratio['median']:.2f}x as fast** "]
            lines[-1] += f"(turn by turn from {ratio['least']:.2f} to {ratio['most']:.2f})."
    return "\n".join(lines) + "\n"


def _problems() -> list[dict[str, Any]]:
    """The training problems of `DATA`, as TRL wants them."""
    from seqrl.data.chained_arithmetic import rows

    return [
        {"prompt": row["prompt"], "ground_truth": row["reward_model"]["ground_truth"]}
        for row in rows(size=3000, split="train")
    ]


def _trl_missing() -> str | None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    packages = ["seqrl", "torch", "transformers", *([] if _trl_missing() else ["trl"])]
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "iterations": args.iterations,
        "warmup": args.warmup,
        "trl_experts": args.trl_experts,
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--model", type=Path, help="a model directory of your own, instead of --workload")
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl-experts", default="grouped_mm", choices=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    if why := _trl_missing():
        print(f"\n*** NO COMPARISON: TRL cannot be imported ({why}). ***", file=sys.stderr)
        print(
            "*** Install it with: pip install 'seqrl[bench]'. Measuring seqrl alone. ***\n", file=sys.stderr
        )
    setting = _setting(args)
    runs: dict[str, dict[str, list[Iteration]]] = {}
    for workload in ["given"] if args.model else args.workload:
        with tempfile.TemporaryDirectory() as scratch:
            model = args.model or write_model(workload, Path(scratch))
            runs[workload] = measure(model, Path(scratch), args)
    setting["load_after"] = os.getloadavg()[0]
    summaries = {workload: summarize(run) for workload, run in runs.items()}
    report = to_markdown(setting, summaries)
    print(report)
    turns = {w: {side: [asdict(t) for t in run] for side, run in sides.items()} for w, sides in runs.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(report)
    args.out.with_suffix(".json").write_text(
        json.dumps({"setting": setting, "summary": summaries, "turns": turns}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
