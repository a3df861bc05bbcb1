"""The loop: which stage follows which, what each is given, and when it validates and saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqrl.trainer import loop
from seqrl.types import SamplingParams

ACTOR = "actor_rollout_ref__actor__"
VALIDATION = ["generate", "reward"]
STEP = ["generate", "reward", "old_log_prob", "update", "update"]
# Once in a process a few log-probs are computed again, in other micro-batches.
FIRST_STEP = ["generate", "reward", "old_log_prob", "old_log_prob", "update", "update"]
FIRST_STEP_WITH_REFERENCE = [*STEP[:3], "ref", "old_log_prob", "update", "update"]


def test_the_order_of_stages(make_run: Callable[..., Any]) -> None:
    run = make_run(trainer__test_freq=2, trainer__save_freq=3)
    run.fit()
    assert run.diary.events == [
        *VALIDATION,
        *FIRST_STEP,
        *STEP,
        *VALIDATION,
        *STEP,
        "save",
        *STEP,
        *VALIDATION,
        *STEP,
        *VALIDATION,
        "save",
    ]


@pytest.mark.parametrize("switch", [f"{ACTOR}use_kl_loss", "algorithm__use_kl_in_reward"])
def test_the_reference_is_asked_where_it_is_needed(make_run: Callable[..., Any], switch: str) -> None:
    run = make_run(trainer__val_before_train=False, **{switch: True})
    run.fit()
    assert run.diary.events[:7] == FIRST_STEP_WITH_REFERENCE


def test_mini_batches_hold_whole_groups_in_order(make_run: Callable[..., Any]) -> None:
    run = make_run()
    run.fit()
    assert [part.group.tolist() for part in run.diary.mini_batches] == [[0, 0, 1, 1], [2, 2, 3, 3]] * 5
    assert [part.policy_version.tolist() for part in run.diary.mini_batches] == [
        [2 * step] * 4 for step in range(5) for _ in range(2)
    ]


def sequences(part: Any) -> list[tuple[int, ...]]:
    return [tuple(tokens.tolist()) for tokens in part.tokens.split(part.lengths.tolist())]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ppo_epochs_pass_over_the_same_batch(make_run: Callable[..., Any], shuffle: bool) -> None:
    run = make_run(**{f"{ACTOR}ppo_epochs": 3, f"{ACTOR}shuffle": shuffle}, trainer__val_before_train=False)
    run.fit()
    assert run.diary.events[:10] == [*FIRST_STEP, *["update"] * 4]
    parts = run.diary.mini_batches
    epochs = [[*sequences(parts[i]), *sequences(parts[i + 1])] for i in range(0, 30, 2)]  # 3 in each step
    for step in range(5):
        first, *others = epochs[3 * step : 3 * step + 3]
        assert all(sorted(other) == sorted(first) for other in others), "each response once an epoch"
        assert all((other == first) is not shuffle for other in others)
    if shuffle:
        orders = {
            tuple(parts[i].group.tolist() + parts[i + 1].group.tolist()) for i in range(0, len(parts), 2)
        }
        assert len(orders) > 5, "each step and each epoch has an order of its own"


def test_advantages_by_hand(make_run: Callable[..., Any]) -> None:
    """Two responses to a prompt: (r1 - r2) / 2 over a sample deviation of |r1 - r2| / sqrt(2)."""
    run = make_run()
    run.fit()
    met = set()
    for part in run.diary.mini_batches:
        assert part.advantages is not None
        assert not part.advantages[~part.response_mask].any()
        lengths = part.lengths.tolist()
        pairs = zip(part.tokens.split(lengths), part.advantages.split(lengths), strict=True)
        for i, (tokens, advantages) in enumerate(pairs):
            digits = int(tokens[2:].sum())  # what FakeReward gives; the prompt has two tokens
            assert float(part.reward[i]) == digits
            other = float(part.reward[i ^ 1])
            expected = 0.0 if digits == other else 2**-0.5 if digits > other else -(2**-0.5)
            assert advantages[2:].tolist() == pytest.approx([expected] * (len(tokens) - 2), abs=1e-5)
            met.add(round(expected, 3))
    assert met == {0.0, 0.707, -0.707}


def test_kl_is_taken_off_the_reward_before_the_advantage(make_run: Callable[..., Any]) -> None:
    """Every token costs log p - log q = 0.5, times the coefficient: the longer response pays more."""
    coefficient = 3.0
    plain = make_run("plain")
    run = make_run(
        "kl",
        algorithm__use_kl_in_reward=True,
        algorithm__kl_penalty="kl",
        algorithm__kl_ctrl__kl_coef=coefficient,
        algorithm__norm_adv_by_std_in_grpo=False,
    )
    plain.fit()
    run.fit()
    part, unpaid = run.diary.mini_batches[0], plain.diary.mini_batches[0]
    assert torch.equal(part.tokens, unpaid.tokens)
    paid = unpaid.reward - coefficient * 0.5 * part.response_lengths
    torch.testing.assert_close(part.reward, paid)
    deviation = paid - paid.view(2, 2).mean(1).repeat_interleave(2)
    torch.testing.assert_close(part.advantages[part.offsets[1:] - 1], deviation)
    first = run.rows[1]
    assert first["critic/score/mean"] == plain.rows[1]["critic/score/mean"], "the score is the verifier's"
    lengths = first["response_length/mean"]
    assert first["critic/rewards/mean"] == pytest.approx(first["critic/score/mean"] - 1.5 * lengths, rel=1e-5)


def test_each_rollout_has_its_seed_and_its_policy_version(make_run: Callable[..., Any]) -> None:
    run, other = make_run(trainer__seed=1, trainer__test_freq=2), make_run("other", trainer__seed=2)
    run.fit()
    other.fit()
    training = [call for call in run.diary.generated if call["prompts"][0].startswith("train")]
    assert [call["policy_version"] for call in training] == [0, 2, 4, 6, 8]
    seeds = {call["seed"] for call in training}
    assert len(seeds) == 5 and not seeds & {call["seed"] for call in other.diary.generated}
    validation = [call for call in run.diary.generated if call["prompts"][0].startswith("val")]
    assert [call["policy_version"] for call in validation] == [0, 4, 8, 10]
    assert [call["prompts"] for call in validation] == [["val:0", "val:1", "val:2"]] * 4
    first, second = run.trained_on()[:2]
    assert len({*first, *second}) == 8, "no prompt twice in an epoch"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SamplingParams(4, 1, 0.0, 1.0, -1)),
        (
            {"do_sample": True, "n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
            SamplingParams(4, 3, 0.7, 0.9, 5),
        ),
    ],
)
def test_held_out_prompts_are_answered_greedily_unless_asked(
    make_run: Callable[..., Any], settings: dict[str, Any], expected: SamplingParams
) -> None:
    val = {f"actor_rollout_ref__rollout__val_kwargs__{name}": value for name, value in settings.items()}
    run = make_run(actor_rollout_ref__rollout__temperature=1.5, actor_rollout_ref__rollout__top_k=9, **val)
    run.fit()
    assert run.diary.generated[0]["sampling"] == expected
    assert run.diary.generated[1]["sampling"] == SamplingParams(4, 2, 1.5, 1.0, 9)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 5]),
        ({"trainer__val_before_train": False}, [5]),
        ({"trainer__test_freq": 2}, [0, 2, 4, 5]),
        ({"trainer__test_freq": 5}, [0, 5]),
        ({"trainer__test_freq": 1, "trainer__val_before_train": False}, [1, 2, 3, 4, 5]),
    ],
)
def test_when_it_validates(make_run: Callable[..., Any], settings: dict[str, Any], steps: list[int]) -> None:
    run = make_run(**settings)
    run.fit()
    assert [row["step"] for row in run.rows if "val/accuracy" in row] == steps
    assert [row["step"] for row in run.rows if row["step"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [5]),
        ({"trainer__save_freq": 2}, [2, 4, 5]),
        ({"trainer__save_freq": 1}, [1, 2, 3, 4, 5]),
        ({"trainer__save_freq": 2, "trainer__max_actor_ckpt_to_keep": 2}, [4, 5]),
    ],
)
def test_when_it_saves(make_run: Callable[..., Any], settings: dict[str, Any], steps: list[int]) -> None:
    run = make_run(**settings)
    run.fit()
    assert run.saved == steps
    assert (run.run_dir / "latest_checkpointed_iteration.txt").read_text() == "5"


def test_metrics_of_a_step(make_run: Callable[..., Any]) -> None:
    run = make_run()
    run.fit()
    rewards = torch.cat([part.reward for part in run.diary.mini_batches[:2]])
    row = run.rows[1]
    assert row["critic/rewards/mean"] == pytest.approx(float(rewards.mean()))
    assert row["training/global_step"] == 1 and row["training/epoch"] == 0
    assert row["actor/lr"] == pytest.approx(0.1 / 2), "that of the last update"
    assert row["actor/ppo_kl"] == pytest.approx(-0.015, abs=2e-3), "over both updates: -0.01 and -0.02"
    assert [row["training/epoch"] for row in run.rows[1:]] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("apart", "asked_for"),
    [(0.0, [2, 1, 2, 2, 2, 2]), (1e-6, [2, 8, 4, *[2, 8] * 4]), (torch.nan, [2, 8, 4, *[2, 8] * 4])],
)
def test_old_logprobs_are_the_rollouts_where_the_engines_agree_bit_for_bit(
    make_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    apart: float,
    asked_for: list[int],
) -> None:
    """The fake policy says -1 of every token. Responses whose log-probs it is asked for: of a step's eight
    a probe of two, then all where these differed; and once some for the noise floor."""
    monkeypatch.setattr(loop, "PROBED_FOR_MISMATCH", 2)
    run = make_run(trainer__val_before_train=False)
    run.trainer.rollout.logprob += apart
    asked, logprobs = [], run.training.logprobs

    def counted(batch: Any) -> torch.Tensor:
        asked.append(len(batch))
        return logprobs(batch)

    monkeypatch.setattr(run.training, "logprobs", counted)
    run.fit()
    assert asked == asked_for
    for part in run.diary.mini_batches:
        assert part.old_logprobs[part.response_mask].unique().tolist() == [-1.0]
