"""The verifiers: one per data source, each `(solution, ground_truth, extra_info) -> Reward`.

A verifier judges any response without raising, whatever the model wrote. It raises UserError where
the row itself cannot be judged, and the caller adds which sample that was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from seqrl.config.schema import CustomRewardFunctionConfig
from seqrl.errors import UserError
from seqrl.rewards.base import finite
from seqrl.types import Prompt, Reward, Rollout

Verifier = Callable[[str, Any, Mapping[str, Any]], Reward]

NO_ANSWER = Reward(0.0, "no answer")


def chained_arithmetic(solution: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Reward:
    """`12+7=19;19-4=15;15`: what stands behind the last `;` is the answer."""
    _, semicolon, answer = solution.rpartition(";")
    return _right_or_wrong(answer.strip() == str(ground_truth)) if semicolon else NO_ANSWER


def gsm8k(solution: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Reward:
    """The number behind the last `####`, commas and dollar signs left out."""
    truth = _number(str(ground_truth))
    if truth is None:
        raise UserError(f"the ground truth {ground_truth!r} is not a number; correct the row")
    answers = re.findall(r"####\s*([-+$\d.,]+)", solution)
    answer = _number(answers[-1]) if answers else None
    return NO_ANSWER if answer is None else _right_or_wrong(answer == truth)


def reasoning_gym(solution: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Reward:
    """The task's own scorer, between 0 and 1, on the last `<answer>...</answer>`, or the whole response."""
    missing = [name for name in ("task", "config", "entry") if extra_info.get(name) is None]
    if missing:
        raise UserError(
            f"extra_info has no `{missing[0]}`, which reasoning_gym's scorer needs; name the task as a file, "
            "reasoning_gym:TASK?size=N"
        )
    score = _reasoning_gym_scorer(extra_info["task"], json.dumps(extra_info["config"], sort_keys=True))
    answers = re.findall(r"<answer>(.*?)</answer>", solution, flags=re.DOTALL)
    try:
        value = float(score((answers[-1] if answers else solution).strip(), extra_info["entry"]))
    except Exception:  # some scorers choke on a malformed answer; the run must not
        return Reward(0.0, "crashed")
    return Reward(value, "right" if value >= 1 else "wrong" if value <= 0 else "partly right")


VERIFIERS: dict[str, Verifier] = {
    "chained_arithmetic": chained_arithmetic,
    "openai/gsm8k": gsm8k,
    "reasoning_gym/*": reasoning_gym,
}
"""From data source to verifier; a name that ends in `/*` stands for every source below it."""


def verify(rollout: Rollout) -> Reward:
    """The verdict of the data source's verifier; raises UserError naming the sample that has none."""
    return _judge(rollout.prompt, rollout.text)


def check_sources(prompts: Sequence[Prompt], config: CustomRewardFunctionConfig) -> None:
    """Raises UserError, before any training, for the first prompt that no verifier can judge.

    Each prompt is tried with an empty response, so that a bad ground truth is found here too. A custom
    reward function takes every data source.
    """
    if config.path is None:
        for prompt in prompts:
            _judge(prompt, "")


def _judge(prompt: Prompt, solution: str) -> Reward:
    verifier = VERIFIERS.get(prompt.data_source) or VERIFIERS.get(prompt.data_source.partition("/")[0] + "/*")
    if verifier is None:
        raise UserError(
            f"sample {prompt.uid}: no verifier for data_source {prompt.data_source!r} (known: "
            f"{', '.join(VERIFIERS)}); correct it, or give a function by custom_reward_function.path"
        )
    try:
        reward = verifier(solution, prompt.ground_truth, prompt.extra_info)
    except UserError as error:
        raise UserError(f"sample {prompt.uid}: {error}") from error
    return Reward(
        finite(reward.value, uid=prompt.uid, origin=f"the verifier of {prompt.data_source}"), reward.why
    )


@lru_cache(maxsize=64)
def _reasoning_gym_scorer(task: str, config: str) -> Callable[[str, Mapping[str, Any]], float]:
    """`config` is JSON, so that it can be a key of the cache."""
    from reasoning_gym import create_dataset

    try:
        return create_dataset(task, **json.loads(config)).score_answer
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"reasoning_gym cannot make the task {task!r} with {config}: {error}") from error


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").replace("$", "").strip().rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _right_or_wrong(right: bool) -> Reward:
    return Reward(1.0, "right") if right else Reward(0.0, "wrong")
