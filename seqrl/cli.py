"""The command line, and the only place that puts rooms together.

Nothing heavy is imported before a command is known: `seqrl --help` answers at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqrl.errors import UserError

if TYPE_CHECKING:
    from seqrl.config.schema import ActorConfig, Config, RefConfig, RolloutConfig, SFTConfig

HELP = """\
seqrl: sequence-level reinforcement learning for language models (GSPO, GRPO)

usage: seqrl COMMAND [--config-name NAME] [--config-path DIR] [key=value ...]

commands:
  quickstart   make a tiny model, teach it, improve it with GSPO, show the result
               (seed=N out=DIR; about two minutes on two cores)
  data         NAME: prepare a well-known set (gsm8k, math, dapo-math-17k ...);
               inspect FILE: counts, lengths, duplicates, what would be refused
  check        the arguments of train: what is wrong, what has no effect, the batch plan
  explain      KEY: what a key means, who reads it, verl's other names for it
  train        reinforcement learning; recipes: ppo_trainer (default), ppo_megatron_trainer,
               dapo, gspo_dapo, quickstart
  eval         the arguments of train: a model or checkpoint on the held-out prompts
  sft          supervised fine-tuning; recipes: sft_trainer (default), quickstart_sft
  report       DIR: write report.html anew from a run's files
  compare      train the quickstart's task with several losses and seeds, on one page
               (--losses gspo,vanilla --seeds N out=DIR cold_start=DIR key=value ...)
  lab          RUN_DIR: replay a saved step's batch through several losses, on one page
               (--step K --loss gspo,vanilla groups=N key=value ...)

keys are verl's: docs/keys.md. `python -m seqrl.trainer.main_ppo` is `seqrl train`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 (also when a signal ended it after a finished step), 2
    where the input is at fault, 130 when Ctrl-C broke it off, 141 when nobody reads its output any more."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from seqrl import __version__

        print(f"seqrl {__version__}")
        return 0
    logger = logging.getLogger("seqrl")
    if not logger.handlers:
        logger.addHandler(_Warnings())
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
            raise UserError(f"no command `{command}`; {hint}")
        if set(rest) & {"--help", "-h"}:
            print(HELP, end="")
            return 0
        return COMMANDS[command](rest) or 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"seqrl: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("seqrl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read what is printed has gone (`| head`); nor must the interpreter's last flush complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Warnings(logging.Handler):
    """Our own warnings as plain lines; other libraries keep their way of speaking."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"seqrl: warning: {record.getMessage()}", file=sys.stderr, flush=True)


def train(arguments: Sequence[str]) -> None:
    run_train(load_train(arguments), again=shlex.join(["seqrl", "train", *arguments]))


def load_train(arguments: Sequence[str]) -> Config:
    """The config these arguments ask for, as this machine can run it.

    What was put in its place, and which of verl's keys have no counterpart, is said. Raises UserError with a
    line for each thing that is wrong.
    """
    from seqrl.config.check import problems
    from seqrl.config.load import read
    from seqrl.config.place import place
    from seqrl.config.problems import raise_all
    from seqrl.config.schema import Config

    loaded = read(Config, arguments, default_name="ppo_trainer")
    placed = place(loaded.config)
    raise_all([*loaded.problems, *problems(placed.config, loaded.problems), *placed.problems])
    for line in [*placed.said, *loaded.notes]:
        logging.getLogger(__name__).warning(line)
    return placed.config


def sft(arguments: Sequence[str]) -> None:
    from seqrl.config.load import load
    from seqrl.config.schema import SFTConfig

    run_sft(load(SFTConfig, arguments, default_name="sft_trainer"))


def quickstart(arguments: Sequence[str]) -> None:
    from seqrl.quickstart import run

    run(arguments)


def report(arguments: Sequence[str]) -> None:
    from seqrl.report.page import report_from_run

    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise UserError("report takes one argument, the directory of a run")
    print(report_from_run(Path(arguments[0])))


def compare(arguments: Sequence[str]) -> None:
    from seqrl.compare import run

    run(arguments)


def lab(arguments: Sequence[str]) -> None:
    from seqrl.lab import run

    run(arguments)


def evaluate(arguments: Sequence[str]) -> None:
    from seqrl.evaluate import run

    run(arguments)


def data(arguments: Sequence[str]) -> None:
    from seqrl.data_command import run

    run(arguments)


def check(arguments: Sequence[str]) -> int:
    from seqrl.check_command import run

    return run(arguments)


def explain(arguments: Sequence[str]) -> None:
    from seqrl.explain_command import run

    run(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "quickstart": quickstart,
    "data": data,
    "check": check,
    "explain": explain,
    "train": train,
    "eval": evaluate,
    "sft": sft,
    "report": report,
    "compare": compare,
    "lab": lab,
}


def run_train(config: Config, *, again: str) -> bool:
    """Trains as `config` says; False where a signal ended it early. `again` is the command that goes on."""
    from seqrl import checkpoint
    from seqrl.config.check import check_train, no_effect
    from seqrl.config.load import save_resolved, to_dict
    from seqrl.report.trackers import make_trackers
    from seqrl.trainer.interrupt import StopRequest

    check_train(config)
    config.trainer.default_local_dir = os.path.expanduser(config.trainer.default_local_dir)
    if config.trainer.resume_from_path is not None:
        config.trainer.resume_from_path = os.path.expanduser(config.trainer.resume_from_path)
    if config.trainer.resume_mode != "auto":
        again += " trainer.resume_mode=auto trainer.resume_from_path=null"
    for line in no_effect(config):
        logging.getLogger(__name__).warning(line)
    run_dir = Path(config.trainer.default_local_dir)
    with checkpoint.RunLock(run_dir), StopRequest() as stop:
        checkpoint.seed_rng(config.trainer.seed)
        trainer = build_trainer(config)
        found = checkpoint.find(
            run_dir, mode=config.trainer.resume_mode, path=config.trainer.resume_from_path
        )
        if found is not None:
            trainer.resume(found)
        save_resolved(config, run_dir / "config.yaml")
        trackers = make_trackers(
            config.trainer,
            to_dict(config),
            run_dir,
            total_steps=trainer.total_steps,
            first_step=trainer.step + 1,
        )
        if found is not None:
            trackers.print(f"resumed from {found}")
        try:
            trainer.fit(trackers, stop)
        finally:
            trackers.close()
            trainer.parts.reward.close()
    finished = trainer.step == trainer.total_steps
    if config.trainer.val_only:
        print(f"validated at step {trainer.step}, and trained nothing; metrics: {run_dir / 'metrics.jsonl'}")
    elif finished:
        print(f"step {trainer.step} of {trainer.total_steps} is done; report: {run_dir / 'report.html'}")
    elif trainer.step == 0:
        print(f"{stop.received}: no step was taken yet; start again with: {again}")
    else:
        print(f"{stop.received}: step {trainer.step} is finished and saved; go on with: {again}")
    return finished


def build_trainer(config: Config) -> Any:
    """Cheap checks first, the model last, so that bad input is told before anything is loaded."""
    from seqrl.config.derived import drawn_at_once
    from seqrl.data.prompts import load_by_source, load_prompts, overlap
    from seqrl.data.sampler import Mixture, PromptSampler
    from seqrl.rewards import make_reward
    from seqrl.rewards.shaping import make_shaping
    from seqrl.trainer.advantages import AdvantageEstimator
    from seqrl.trainer.correction import RolloutCorrection
    from seqrl.trainer.loop import Trainer
    from seqrl.trainer.parts import Parts
    from seqrl.training.base import PolicyObjective
    from seqrl.training.model import DTYPES, choose_device, load_tokenizer

    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    # Made again by the trainer; here, what is not known is refused before anything is loaded.
    AdvantageEstimator(config.algorithm)
    RolloutCorrection(config.algorithm.rollout_correction)
    PolicyObjective(actor, data.max_response_length)
    device = choose_device(config.trainer.device)
    reward = make_reward(config.reward)
    tokenizer = load_tokenizer(config.actor_rollout_ref.model, key="actor_rollout_ref.model.path")
    seed = config.trainer.seed if data.seed is None else data.seed
    skipped = Path(config.trainer.default_local_dir) / "skipped_rows.jsonl"
    sources = load_by_source(
        data.train_files, tokenizer, data, key="data.train_files", seed=seed, skipped_to=skipped
    )
    train_prompts = [prompt for source in sources for prompt in source]
    val_prompts = load_prompts(
        data.val_files, tokenizer, data, key="data.val_files", held_out=True, seed=seed, skipped_to=skipped
    )
    reward.check([*train_prompts, *val_prompts])
    if shared := overlap(train_prompts, val_prompts):
        logging.getLogger(__name__).warning(
            "data.val_files: %d of %d held-out prompts are also training prompts", shared, len(val_prompts)
        )
    mixture = None
    if data.train_weights is not None:
        mixture = Mixture(tuple(map(len, sources)), tuple(data.train_weights))
    sampler = PromptSampler(
        len(train_prompts),
        drawn_at_once(config),
        shuffle=data.shuffle,
        seed=seed,
        mixture=mixture,
    )
    total_steps = config.trainer.total_training_steps or config.trainer.total_epochs * sampler.steps_per_epoch
    updates = data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    training, engine = build_engines(
        config.actor_rollout_ref.model,
        actor.fsdp_config,
        tokenizer,
        device,
        key="actor_rollout_ref.model.path",
        max_num_seqs=rollout.max_num_seqs,
        optim=actor.optim,
        total_steps=total_steps * updates,
        grad_clip=actor.grad_clip,
        temperature=rollout.temperature,
        max_tokens=actor.ppo_max_token_len_per_gpu,
        micro_batch_size=None
        if actor.use_dynamic_bsz
        else actor.ppo_micro_batch_size_per_gpu or actor.ppo_mini_batch_size * rollout.n,
        with_reference=actor.use_kl_loss or config.algorithm.use_kl_in_reward,
        logprob_split=_split(actor, rollout),
        reference_split=_split(actor, config.actor_rollout_ref.ref),
        reference_dtype=DTYPES[
            config.actor_rollout_ref.ref.fsdp_config.model_dtype or actor.fsdp_config.model_dtype
        ],
    )
    shaping = make_shaping(config.reward.reward_kwargs, max_response_length=data.max_response_length)
    parts = Parts(training, engine, reward, shaping, sampler, train_prompts, val_prompts)
    return Trainer(config, parts, total_steps=total_steps)


def _split(actor: ActorConfig, config: RolloutConfig | RefConfig) -> Any:
    """How batches are cut for log-probs, of the policy or of the reference."""
    from seqrl.training.packing import Split

    dynamic = config.log_prob_use_dynamic_bsz
    if actor.use_dynamic_bsz if dynamic is None else dynamic:
        return Split(config.log_prob_max_token_len_per_gpu or actor.ppo_max_token_len_per_gpu)
    return Split(
        actor.ppo_max_token_len_per_gpu,
        config.log_prob_micro_batch_size_per_gpu or actor.ppo_micro_batch_size_per_gpu,
    )


def run_sft(config: SFTConfig) -> Path | None:
    """Fine-tunes as `config` says; returns the result's directory, None where a signal ended it early."""
    from seqrl import checkpoint
    from seqrl.config.check import check_sft, sft_no_effect
    from seqrl.config.load import save_resolved, to_dict
    from seqrl.config.schema import DataConfig, RewardConfig
    from seqrl.data.prompts import load_prompts
    from seqrl.data.sampler import PromptSampler
    from seqrl.data.sft import load_examples
    from seqrl.report.trackers import make_trackers
    from seqrl.rewards import make_reward
    from seqrl.trainer.interrupt import StopRequest
    from seqrl.trainer.sft import SFTTrainer, to_batch
    from seqrl.training.model import choose_device, load_tokenizer

    check_sft(config)
    for line in sft_no_effect(config):
        logging.getLogger(__name__).warning(line)
    config.trainer.default_local_dir = os.path.expanduser(config.trainer.default_local_dir)
    data, run_dir = config.data, Path(config.trainer.default_local_dir)
    device = choose_device(config.trainer.device)
    reward = make_reward(RewardConfig(custom_reward_function=config.custom_reward_function))
    tokenizer = load_tokenizer(config.model, key="model.path")
    examples = load_examples(data.train_files, tokenizer, data)
    held_out = DataConfig(prompt_key=data.prompt_key, max_prompt_length=data.max_length)
    val_prompts = load_prompts(data.val_files, tokenizer, held_out, key="data.val_files", held_out=True)
    reward.check(val_prompts)
    sampler = PromptSampler(len(examples), data.train_batch_size, shuffle=True, seed=config.trainer.seed)
    total_steps = config.trainer.total_training_steps or config.trainer.total_epochs * sampler.steps_per_epoch
    training, engine = build_engines(
        config.model,
        config.fsdp_config,
        tokenizer,
        device,
        key="model.path",
        max_num_seqs=1024,
        optim=config.optim,
        total_steps=total_steps,
        grad_clip=1.0,
        temperature=1.0,
        max_tokens=data.max_token_len_per_gpu,
        micro_batch_size=None,
        with_reference=False,
    )
    with checkpoint.RunLock(run_dir), StopRequest() as stop:
        save_resolved(config, run_dir / "config.yaml")
        trackers = make_trackers(
            config.trainer, to_dict(config), run_dir, total_steps=total_steps, first_step=1
        )
        trainer = SFTTrainer(
            config,
            training=training,
            rollout=engine,
            reward=reward,
            examples=to_batch([(e.prompt_tokens, e.answer_tokens) for e in examples]),
            sampler=sampler,
            val_prompts=val_prompts,
            total_steps=total_steps,
        )
        try:
            directory = trainer.fit(trackers, stop)
        finally:
            trackers.close()
            reward.close()
    if not trainer.finished:
        print(f"{stop.received}: stopped early; the model so far: {directory}")
        return None
    print(f"model: {directory}")
    return directory


def build_engines(
    model_config: Any,
    precision: Any,
    tokenizer: Any,
    device: Any,
    *,
    key: str,
    max_num_seqs: int,
    **training: Any,
) -> tuple[Any, Any]:
    """The training engine, and a rollout engine that reads the same tensors."""
    from seqrl.config.derived import product_dtype
    from seqrl.rollout.base import make_engine
    from seqrl.training.local import LocalEngine
    from seqrl.training.model import DTYPES, check_flat_forward, load_model

    dtype = DTYPES[product_dtype(precision)]
    model = load_model(model_config, precision, device, key=key)
    check_flat_forward(model)
    return (
        LocalEngine(model, tokenizer, compute_dtype=dtype, **training),
        make_engine(model, tokenizer, max_num_seqs=max_num_seqs, dtype=dtype),
    )


if __name__ == "__main__":
    sys.exit(main())
