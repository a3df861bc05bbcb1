"""Each key by itself: the words it may be, the range of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import reduce
from typing import Any, cast

from seqrl.config.load import leaf_types
from seqrl.config.loss_keys import ACTOR, AGGREGATIONS
from seqrl.config.problems import Problem
from seqrl.config.schema import Config, SFTConfig

MODEL = "actor_rollout_ref.model"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
STRATEGIES = ("fsdp", "fsdp2", "megatron")
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
STRAIGHT_THROUGH = tuple(f"{name}+" for name in KL_ESTIMATORS)

# Allowed words in the sections that both commands have; the tables below say where the sections stand.
MODEL_WORDS = {"experts_implementation": ("sorted", "eager", "grouped_mm", "batched_mm")}
OPTIM_WORDS = {"optimizer": ("AdamW", "adam"), "lr_scheduler_type": ("constant", "cosine", "linear")}
FSDP_WORDS = {"model_dtype": ("fp32", "bf16", "float32", "bfloat16"), "dtype": ("float32", "bfloat16")}
TRAINER_WORDS = {"device": ("auto", "cpu", "cuda"), "logger": ("console", "tensorboard", "wandb")}


def _under(section: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": row for key, row in rows.items()}


TRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "data.truncation": ("error", "left", "right", "middle"),
    "data.on_error": ("fail", "skip"),
    **_under(MODEL, MODEL_WORDS),
    f"{ACTOR}.loss_agg_mode": AGGREGATIONS,
    f"{ACTOR}.kl_loss_type": (*KL_ESTIMATORS, *STRAIGHT_THROUGH, "full"),
    **_under(f"{ACTOR}.optim", OPTIM_WORDS),
    **_under(f"{ACTOR}.fsdp_config", FSDP_WORDS),
    f"{ACTOR}.strategy": STRATEGIES,
    f"{ACTOR}.megatron.dtype": ("bfloat16",),
    f"{ACTOR}.checkpoint.save_contents": ("model", "optimizer", "extra", "hf_model"),
    f"{REF}.strategy": STRATEGIES,
    f"{REF}.fsdp_config.model_dtype": FSDP_WORDS["model_dtype"],
    f"{ROLLOUT}.name": ("native", "vllm", "sglang"),
    f"{ROLLOUT}.dtype": ("bfloat16", "float16", "float32"),
    f"{ROLLOUT}.load_format": ("dummy", "auto", "safetensors"),
    "algorithm.kl_penalty": KL_ESTIMATORS,
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "algorithm.rollout_correction.rollout_is": ("token", "sequence"),
    "reward.reward_manager.name": ("naive", "dapo", "prime", "batch", "remote"),
    "reward.code.isolation": ("namespace", "process"),
    "reward.on_failure": ("mask", "zero", "fail"),
    "trainer.placement": ("strict", "local"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    **_under("trainer", TRAINER_WORDS),
}
SFT_WORDS: dict[str, tuple[str, ...]] = {
    "data.truncation": ("error", "right"),
    **_under("model", MODEL_WORDS),
    **_under("optim", OPTIM_WORDS),
    **_under("fsdp_config", FSDP_WORDS),
    **_under("trainer", TRAINER_WORDS),
}

Range = tuple[str, Callable[[Any], bool]]
POSITIVE: Range = ("write a number above 0", lambda x: x > 0)
NOT_NEGATIVE: Range = ("write 0 or a number above it", lambda x: x >= 0)
POSITIVE_OR_OFF: Range = ("write a number above 0, or -1 to switch it off", lambda x: x > 0 or x == -1)
SHARE: Range = ("write a number from 0 to 1", lambda x: 0 <= x <= 1)
POSITIVE_SHARE: Range = ("write a number above 0, up to 1", lambda x: 0 < x <= 1)
BELOW_HALF: Range = ("write a number between 0 and 0.5", lambda x: 0 < x < 0.5)
BELOW_ONE: Range = ("write a number from 0 to below 1", lambda x: 0 <= x < 1)
ABOVE_ONE: Range = ("write a number above 1", lambda x: x > 1)
BETAS: Range = (
    "write two numbers from 0 to below 1, as [0.9,0.999]",
    lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
)
EACH_POSITIVE: Range = ("write numbers above 0, as [1,2]", lambda x: len(x) > 0 and all(y > 0 for y in x))

OPTIM_RANGES = {
    "lr": NOT_NEGATIVE,
    "min_lr": NOT_NEGATIVE,
    "lr_warmup_steps_ratio": SHARE,
    "min_lr_ratio": SHARE,
    "betas": BETAS,
    "weight_decay": NOT_NEGATIVE,
}
SAMPLING_RANGES = {"n": POSITIVE, "top_p": POSITIVE_SHARE, "top_k": POSITIVE_OR_OFF}
MEGATRON_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
LOG_PROB_RANGES = {"log_prob_max_token_len_per_gpu": POSITIVE, "log_prob_micro_batch_size_per_gpu": POSITIVE}
TRAINER_RANGES = {
    "total_epochs": POSITIVE,
    "total_training_steps": POSITIVE,
    "test_freq": POSITIVE_OR_OFF,
    "seed": NOT_NEGATIVE,
}
TRAIN_RANGES: dict[str, Range] = {
    "data.max_prompt_length": POSITIVE,
    "data.max_response_length": POSITIVE,
    "data.train_batch_size": POSITIVE,
    "data.gen_batch_size": POSITIVE,
    "data.train_weights": EACH_POSITIVE,
    "data.train_max_samples": POSITIVE_OR_OFF,
    "data.val_max_samples": POSITIVE_OR_OFF,
    "data.seed": NOT_NEGATIVE,
    "actor_rollout_ref.nccl_timeout": POSITIVE,
    f"{ACTOR}.ulysses_sequence_parallel_size": POSITIVE,
    f"{ACTOR}.ppo_mini_batch_size": POSITIVE,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": POSITIVE,
    f"{ACTOR}.ppo_max_token_len_per_gpu": POSITIVE,
    f"{ACTOR}.ppo_epochs": POSITIVE,
    f"{ACTOR}.grad_clip": POSITIVE,
    f"{ACTOR}.clip_ratio": BELOW_ONE,
    f"{ACTOR}.clip_ratio_low": NOT_NEGATIVE,
    f"{ACTOR}.clip_ratio_high": NOT_NEGATIVE,
    f"{ACTOR}.clip_ratio_c": ABOVE_ONE,
    f"{ACTOR}.clip_target_fraction": BELOW_HALF,
    f"{ACTOR}.tau_pos": POSITIVE,
    f"{ACTOR}.tau_neg": POSITIVE,
    f"{ACTOR}.policy_loss.clip_cov_ratio": POSITIVE_SHARE,
    f"{ACTOR}.policy_loss.kl_cov_ratio": POSITIVE_SHARE,
    f"{ACTOR}.policy_loss.ppo_kl_coef": NOT_NEGATIVE,
    f"{ACTOR}.policy_loss.dro_beta": POSITIVE,
    f"{ACTOR}.loss_scale_factor": POSITIVE,
    f"{ACTOR}.kl_loss_coef": NOT_NEGATIVE,
    **_under(f"{ACTOR}.optim", OPTIM_RANGES),
    f"{ACTOR}.fsdp_config.fsdp_size": POSITIVE_OR_OFF,
    **_under(f"{ACTOR}.megatron", dict.fromkeys(MEGATRON_SIZES, POSITIVE)),
    f"{REF}.ulysses_sequence_parallel_size": POSITIVE,
    **_under(REF, LOG_PROB_RANGES),
    **_under(f"{REF}.megatron", dict.fromkeys(MEGATRON_SIZES, POSITIVE)),
    **_under(ROLLOUT, SAMPLING_RANGES),
    **_under(ROLLOUT, LOG_PROB_RANGES),
    # Log-probs are divided by it in training, so that 0 (greedy) is for validation alone.
    f"{ROLLOUT}.temperature": POSITIVE,
    f"{ROLLOUT}.max_num_seqs": POSITIVE,
    f"{ROLLOUT}.max_model_len": POSITIVE,
    f"{ROLLOUT}.tensor_model_parallel_size": POSITIVE,
    f"{ROLLOUT}.pipeline_model_parallel_size": POSITIVE,
    f"{ROLLOUT}.data_parallel_size": POSITIVE,
    f"{ROLLOUT}.expert_parallel_size": POSITIVE,
    f"{ROLLOUT}.gpu_memory_utilization": POSITIVE_SHARE,
    f"{ROLLOUT}.max_num_batched_tokens": POSITIVE,
    f"{ROLLOUT}.cudagraph_capture_sizes": EACH_POSITIVE,
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": POSITIVE,
    **_under(f"{ROLLOUT}.val_kwargs", SAMPLING_RANGES),
    f"{ROLLOUT}.val_kwargs.temperature": NOT_NEGATIVE,
    "algorithm.gamma": SHARE,
    "algorithm.kl_ctrl.kl_coef": NOT_NEGATIVE,
    "algorithm.kl_ctrl.horizon": POSITIVE,
    "algorithm.kl_ctrl.target_kl": POSITIVE,
    "algorithm.filter_groups.max_num_gen_batches": NOT_NEGATIVE,
    "reward.reward_kwargs.max_resp_len": POSITIVE,
    "reward.reward_kwargs.overlong_buffer_cfg.len": POSITIVE,
    "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": NOT_NEGATIVE,
    "reward.remote.max_concurrent": POSITIVE,
    "reward.remote.retries": NOT_NEGATIVE,
    "reward.remote.timeout": POSITIVE,
    "reward.num_workers": POSITIVE,
    "reward.time_limit": POSITIVE,
    "reward.memory_limit_mb": POSITIVE,
    **_under("trainer", TRAINER_RANGES),
    "trainer.nnodes": POSITIVE,
    "trainer.n_gpus_per_node": POSITIVE,
    "trainer.log_val_generations": NOT_NEGATIVE,
    "trainer.save_freq": POSITIVE_OR_OFF,
    "trainer.max_actor_ckpt_to_keep": POSITIVE,
}
SFT_RANGES: dict[str, Range] = {
    "data.max_length": POSITIVE,
    "data.max_response_length": POSITIVE,
    "data.train_batch_size": POSITIVE,
    "data.max_token_len_per_gpu": POSITIVE,
    **_under("optim", OPTIM_RANGES),
    **_under("trainer", TRAINER_RANGES),
    "trainer.target_accuracy": POSITIVE_SHARE,
}


def value_of(config: object, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def shown(value: Any) -> str:
    """A value as it would stand on the command line, on one line."""
    if isinstance(value, list):
        return f"[{','.join(shown(part) for part in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{shown(part)}' for name, part in value.items())}}}"
    return "null" if value is None else " ".join(str(value).split())


def key_problems(
    config: Config | SFTConfig, words: Mapping[str, tuple[str, ...]], ranges: Mapping[str, Range]
) -> Iterator[Problem]:
    """Files are given, numbers are finite and in range, words are known."""
    if not config.data.train_files:
        yield Problem(
            "data.train_files",
            "data.train_files is empty; write data.train_files=FILE (.parquet, .jsonl or a task)",
        )
    for key in leaf_types(cast(type, type(config))):
        value = value_of(config, key)
        parts = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            yield Problem(key, f"{key}={value} is not finite; write a number")
        elif key in ranges and not ranges[key][1](value):
            yield Problem(key, f"{key}={value} is out of range; {ranges[key][0]}")
        elif key in words:
            for word in dict.fromkeys(parts):
                if word not in words[key]:
                    yield Problem(key, _unknown_word(key, word, words[key]))


def _unknown_word(key: str, word: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.7)
    meant = next((name for name in known if near and name.lower() == near[0]), None)
    if len(known) == 1:
        return f"{key}={word} is not known; write {key}={known[0]}, the only one there is"
    hint = f"did you mean {meant}? " if meant else ""
    return f"{key}={word} is not known; {hint}there are {', '.join(known)}"
