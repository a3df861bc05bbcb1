from __future__ import annotations

import json

import pytest
import torch
from reasoning_gym import create_dataset

from seqrl.config.schema import CustomRewardFunctionConfig
from seqrl.errors import UserError
from seqrl.rewards import check_sources, make_reward
from seqrl.rewards.verifiers import VERIFIERS
from seqrl.types import Prompt, Rollout


def prompt(data_source, ground_truth, extra_info=None):
    return Prompt("f.jsonl:4", data_source, (), ground_truth, extra_info or {}, (1,))


def rollout(text, of):
    return Rollout(of, 0, torch.tensor([1]), torch.zeros(1), text, finished=True, policy_version=0)


def judge(text, data_source, ground_truth, extra_info=None):
    reward = make_reward(CustomRewardFunctionConfig())
    (answer,) = reward([rollout(text, prompt(data_source, ground_truth, extra_info))])
    return answer.value, answer.why


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ("12+7=19;19-4=15;15", 1.0, "right"),
        ("12+7=19;19-4=15; 15\n", 1.0, "right"),
        ("12+7=18;18-3=15;15", 1.0, "right"),
        ("12+7=19;19-4=15;16", 0.0, "wrong"),
        ("12+7=19;15;", 0.0, "wrong"),
        ("12+7=19;115", 0.0, "wrong"),
        ("15", 0.0, "no answer"),
        ("", 0.0, "no answer"),
    ],
)
def test_chained_arithmetic(text, value, why):
    assert judge(text, "chained_arithmetic", "15") == (value, why)


@pytest.mark.parametrize(
    ("text", "truth", "value", "why"),
    [
        ("so 6*7\n#### 42", "42", 1.0, "right"),
        ("#### 41\n#### 42", "42", 1.0, "right"),
        ("#### 42\n#### 41", "42", 0.0, "wrong"),
        ("#### $1,234.", "1234", 1.0, "right"),
        ("#### 1234", "1,234", 1.0, "right"),
        ("#### -3.0", "-3", 1.0, "right"),
        ("#### 3", "-3", 0.0, "wrong"),
        ("####42", 42, 1.0, "right"),
        ("42", "42", 0.0, "no answer"),
        ("#### forty", "42", 0.0, "no answer"),
        ("#### 1.2.3", "42", 0.0, "no answer"),
    ],
)
def test_gsm8k(text, truth, value, why):
    assert judge(text, "openai/gsm8k", truth) == (value, why)


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "chain_sum", "gcd", "rearc"])
def test_reasoning_gym_uses_the_tasks_own_scorer(task):
    config = {"seed": 3, "size": 2}
    for entry in create_dataset(task, **config):
        row = (f"reasoning_gym/{task}", entry["answer"], {"task": task, "config": config, "entry": entry})
        assert judge(f" {entry['answer']}\n", *row) == (1.0, "right")
        assert judge(f"I think 3. <answer>7</answer> <answer>{entry['answer']}</answer>!", *row) == (
            1.0,
            "right",
        )
        wrong, why = judge("no idea", *row)
        assert wrong < 1.0 and why != "right"


def test_reasoning_gym_gives_the_scorers_partial_value():
    entry = create_dataset("leg_counting", seed=3, size=1)[0]
    info = {"task": "leg_counting", "config": {"seed": 3, "size": 1}, "entry": entry}
    text = f"legs: {entry['answer']}"
    value, why = judge(text, "reasoning_gym/leg_counting", entry["answer"], json.loads(json.dumps(info)))
    assert value == pytest.approx(len(entry["answer"]) / len(text)) and why == "partly right"


def test_a_scorer_that_chokes_on_an_answer_gives_nothing():
    entry = create_dataset("prime_factorization", seed=3, size=1)[0]
    info = {"task": "prime_factorization", "config": {"seed": 3, "size": 1}, "entry": entry}
    assert judge("two times two", "reasoning_gym/prime_factorization", entry["answer"], info) == (
        0.0,
        "crashed",
    )


def test_rewards_come_in_the_order_of_the_rollouts():
    of = prompt("chained_arithmetic", "5")
    rewards = make_reward(CustomRewardFunctionConfig())([rollout(t, of) for t in (";5", ";6", "5")])
    assert [r.value for r in rewards] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("data_source", "ground_truth", "extra_info", "says"),
    [
        ("mine/qa", "2", {}, r"data_source 'mine/qa' \(known: .*openai/gsm8k.*custom_reward_function.path"),
        ("openai/gsm8k", "two", {}, "ground truth 'two' is not a number"),
        ("reasoning_gym/gcd", "2", {"index": 1}, "extra_info has no `task`"),
        ("reasoning_gym/gdc", "2", {"task": "gdc", "config": {}, "entry": {}}, "cannot make the task 'gdc'"),
    ],
)
def test_a_prompt_nobody_can_judge_is_found_before_training(data_source, ground_truth, extra_info, says):
    bad = prompt(data_source, ground_truth, extra_info)
    good = prompt("chained_arithmetic", "2")
    with pytest.raises(UserError, match=says) as error:
        check_sources([good, bad], CustomRewardFunctionConfig())
    assert str(error.value).startswith("sample f.jsonl:4: ")
    check_sources([good], CustomRewardFunctionConfig())
    check_sources([bad], CustomRewardFunctionConfig(path="reward.py"))


def test_a_verifier_that_gives_nan_is_named(monkeypatch):
    from seqrl.types import Reward

    monkeypatch.setitem(VERIFIERS, "odd", lambda *_: Reward(float("nan"), "odd"))
    with pytest.raises(UserError, match=r"sample f.jsonl:4: the verifier of odd gave nan"):
        judge("x", "odd", "1")
