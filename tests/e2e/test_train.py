"""`seqrl train` and `seqrl sft` from end to end in this process, on every kind of data and under the
settings that change what is computed; two steps each, judged by their metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqrl.cli import main
from seqrl.report.files import METRICS, read_rows

ACTOR = "actor_rollout_ref__actor__"


@pytest.fixture
def train(
    train_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    """Runs it, and gives the rows of its metrics, each at the index of its step."""

    def run(name: str = "run", **overrides: object) -> list[dict[str, Any]]:
        assert main(train_arguments(tmp_path / name, **overrides)) == 0, capsys.readouterr().err
        rows = read_rows(tmp_path / name / METRICS)
        return rows if rows[0]["step"] == 0 else [{}, *rows]

    return run


def problem(index: int) -> dict[str, Any]:
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {index}+{index}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * index)},
        "extra_info": {"index": index},
    }


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(problem(i)) + "\n" for i in range(8)))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([problem(i) for i in range(8)]), path)


def test_jsonl_and_parquet_train_alike(
    train: Callable[..., list[dict[str, Any]]], tmp_path: Path, reward_file: Path
) -> None:
    """The reward is a function of one's own, so that there is something to learn from random letters."""
    ends = []
    for suffix, write in (("jsonl", write_jsonl), ("parquet", write_parquet)):
        file = tmp_path / f"problems.{suffix}"
        write(file)
        prompts = {"data__train_files": file, "data__val_files": file, "data__max_prompt_length": 64}
        rows = train(suffix, custom_reward_function__path=reward_file, **prompts)
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert rows[1]["prompt_length/mean"] == len("?What is 1+1?^?"), "bytes, and three marks"
        ends.append(rows)
    for rows in ends:
        assert 0 < rows[1]["critic/rewards/mean"] < 1
        assert rows[1]["actor/grad_norm"] > 0.01
        assert {name for name in rows[0] if name.startswith("val-core/")} == {
            "val-core/openai/gsm8k/acc/mean@1"
        }


def test_gsm8k_rows_are_judged_by_their_verifier(
    train: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "problems.jsonl")
    rows = train(data__train_files=tmp_path / "problems.jsonl", data__max_prompt_length=64)
    assert rows[-1]["critic/score/max"] == 0, "random letters answer nothing"
    assert rows[-1]["rollout/degenerate_groups"] == 1
    assert rows[-1]["actor/grad_norm"] == 0 and rows[-1]["actor/pg_loss"] == 0


def test_a_reasoning_gym_task(train: Callable[..., list[dict[str, Any]]]) -> None:
    rows = train(
        data__train_files="reasoning_gym:chain_sum?size=8&seed=1",
        data__val_files="reasoning_gym:chain_sum?size=4&seed=2",
        data__max_prompt_length=128,
    )
    assert "val-core/reasoning_gym/chain_sum/acc/mean@1" in rows[0]
    assert 0 <= rows[1]["critic/score/mean"] < 0.5 and rows[1]["prompt_length/mean"] > 30


def test_rollout_and_training_agree_and_the_first_update_is_on_policy(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path
) -> None:
    """One mini-batch a step: every ratio is 1 when the update begins."""
    rows = train(custom_reward_function__path=reward_file, **{f"{ACTOR}ppo_mini_batch_size": 4})
    for row in rows[1:]:
        assert row["rollout_corr/log_prob_diff_max"] < 1e-4
        assert row["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
        assert row["actor/seq_ratio_min"] == pytest.approx(1, abs=1e-5)
        assert row["actor/seq_clipfrac"] == 0
        assert row["actor/pg_loss"] == pytest.approx(0, abs=1e-4), "advantages of a group sum to nothing"


def test_gspo_clips_at_the_papers_range_and_vanilla_hardly_at_its_own(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path
) -> None:
    paper = {f"{ACTOR}clip_ratio_low": 3e-4, f"{ACTOR}clip_ratio_high": 4e-4}
    gspo = train("gspo", custom_reward_function__path=reward_file, **paper)
    vanilla = train(
        "vanilla", custom_reward_function__path=reward_file, **{f"{ACTOR}policy_loss__loss_mode": "vanilla"}
    )
    fractions = [
        [sum(row[f"actor/{name}"] for row in rows[1:]) / 2 for name in ("pg_clipfrac", "seq_clipfrac")]
        for rows in (gspo, vanilla)
    ]
    assert fractions[0][0] > 10 * max(fractions[1][0], 1e-3), fractions
    assert 0.05 < fractions[0][1] <= 0.5, "of sequences, half of which are of a first mini-batch"
    assert gspo[1]["critic/rewards/mean"] == vanilla[1]["critic/rewards/mean"], "the same first rollout"


def test_kl_in_the_loss_and_in_the_reward(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path
) -> None:
    shared = {"custom_reward_function__path": reward_file, f"{ACTOR}optim__lr": 1e-2}
    none = train("none", **shared)
    in_loss = train("loss", **shared, **{f"{ACTOR}use_kl_loss": "true", f"{ACTOR}kl_loss_coef": 10})
    in_reward = train(
        "reward",
        **shared,
        algorithm__use_kl_in_reward="true",
        algorithm__kl_penalty="low_var_kl",
        algorithm__kl_ctrl__kl_coef=1.0,
    )
    assert [row["actor/kl_loss"] for row in none[1:]] == [0, 0]
    assert 0 < in_loss[1]["actor/kl_loss"] < in_loss[2]["actor/kl_loss"], "it moves away from the reference"
    assert in_loss[1]["critic/score/mean"] == none[1]["critic/score/mean"]
    assert in_loss[2]["actor/grad_norm"] != none[2]["actor/grad_norm"]
    score, paid = (in_reward[2][f"critic/{name}/mean"] for name in ("score", "rewards"))
    assert in_reward[1]["critic/rewards/mean"] == pytest.approx(in_reward[1]["critic/score/mean"], abs=1e-6)
    assert paid < score - 1e-4, "from the second step on, what strays is paid for"


def test_bfloat16_compute_stays_close_to_float32(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path
) -> None:
    rows = train(custom_reward_function__path=reward_file, **{f"{ACTOR}fsdp_config__dtype": "bfloat16"})
    exact = train("exact", custom_reward_function__path=reward_file)
    assert 0 < rows[1]["rollout_corr/log_prob_diff_mean"] < 0.02
    assert rows[1]["actor/entropy"] == pytest.approx(exact[1]["actor/entropy"], abs=0.01)
    assert rows[1]["actor/entropy"] != exact[1]["actor/entropy"]
    assert all(math.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in rows[1:])


def test_how_micro_batches_are_made_changes_nothing(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path
) -> None:
    ways: list[dict[str, object]] = [
        {},
        {f"{ACTOR}ppo_micro_batch_size_per_gpu": 3},
        {f"{ACTOR}use_dynamic_bsz": "true", f"{ACTOR}ppo_max_token_len_per_gpu": 60},
        {"actor_rollout_ref__model__enable_gradient_checkpointing": "false"},
    ]
    first, *others = [
        train(f"way {i}", custom_reward_function__path=reward_file, **way) for i, way in enumerate(ways)
    ]
    for rows in others:
        for name in ("actor/grad_norm", "actor/pg_loss", "actor/entropy", "critic/rewards/mean"):
            assert rows[1][name] == pytest.approx(first[1][name], rel=1e-3, abs=1e-5), name


def test_tensorboard_gets_what_the_metrics_file_gets(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(custom_reward_function__path=reward_file, trainer__logger="[tensorboard]")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("critic/rewards/mean")]
    assert points == [(row["step"], pytest.approx(row["critic/rewards/mean"])) for row in rows[1:]]


def test_what_lies_in_a_finished_runs_directory(
    train: Callable[..., list[dict[str, Any]]],
    train_arguments: Callable[..., list[str]],
    reward_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(custom_reward_function__path=reward_file)
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} == {
        "config.yaml",
        "curves.svg",
        "global_step_2",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
    }
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(train_arguments(run_dir, custom_reward_function__path=reward_file)) == 0
    after = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    same = before.keys() - {".lock", "report.html"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}, "it was done"
    # The resolved config is a recipe that asks for the same run.
    resolved = [
        "train",
        "--config-path",
        str(run_dir),
        "--config-name",
        "config",
        "trainer.resume_mode=disable",
    ]
    assert main([*resolved, f"trainer.default_local_dir={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "global_step_2" / "model.safetensors").read_bytes() == (
        run_dir / "global_step_2" / "model.safetensors"
    ).read_bytes()
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.endswith(f"{run_dir / 'report.html'}\n")


def test_a_key_without_effect_is_said_aloud(
    train: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(**{f"{ACTOR}kl_loss_coef": 0.5})
    line = "seqrl: warning: actor_rollout_ref.actor.kl_loss_coef=0.5 has no effect: use_kl_loss=false\n"
    assert capsys.readouterr().err == line


def test_held_out_prompts_that_are_trained_on_are_said_aloud(
    train: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(data__val_files="chained_arithmetic:?size=3")
    line = "seqrl: warning: data.val_files: 3 of 3 held-out prompts are also training prompts\n"
    assert capsys.readouterr().err == line


# A share, so that it matters neither how long an answer is nor how many characters a token has.
SHARE_OF_SEVENS = """\
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return solution_str.count("7") / max(len(solution_str), 1)
"""


def test_fine_tuned_and_then_trained_a_model_learns(
    train: Callable[..., list[dict[str, Any]]],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The quickstart in miniature: worked solutions first, then to write as many sevens as can be."""
    from seqrl.data.chained_arithmetic import worked_rows

    solutions = tmp_path / "solutions.jsonl"
    solutions.write_text("".join(json.dumps(row) + "\n" for row in worked_rows(size=512)))
    tune = [
        "sft",
        f"model.path={model}",
        f"data.train_files={solutions}",
        "data.val_files=chained_arithmetic:?size=8&split=test",
        "data.train_batch_size=64",
        "data.max_response_length=12",
        "optim.lr=1e-2",
        "trainer.total_training_steps=24",
        f"trainer.default_local_dir={tmp_path / 'sft'}",
    ]
    assert main(tune) == 0
    tuned = tmp_path / "sft" / "huggingface"
    assert f"model: {tuned}\n" in capsys.readouterr().out
    losses = [row["train/loss"] for row in read_rows(tmp_path / "sft" / METRICS)]
    assert len(losses) == 24 and losses[0] > 5 and losses[-1] < 0.6 * losses[0], losses

    reward = tmp_path / "sevens.py"
    reward.write_text(SHARE_OF_SEVENS)
    rows = train(
        "rl",
        actor_rollout_ref__model__path=tuned,
        custom_reward_function__path=reward,
        actor_rollout_ref__actor__clip_ratio_low=3e-3,
        actor_rollout_ref__actor__clip_ratio_high=4e-3,
        actor_rollout_ref__actor__optim__lr=5e-3,
        actor_rollout_ref__rollout__n=8,
        data__train_batch_size=8,
        actor_rollout_ref__actor__ppo_mini_batch_size=4,
        trainer__total_training_steps=12,
    )
    rewards = [row["critic/rewards/mean"] for row in rows[1:]]
    first, last = sum(rewards[:2]) / 2, sum(rewards[-2:]) / 2
    assert first < 0.2 and last > first + 0.3, rewards


def test_the_saved_model_is_the_trained_one_in_plain_transformers(
    train: Callable[..., list[dict[str, Any]]], reward_file: Path, tmp_path: Path, model: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seqrl.config.schema import FSDPConfig, ModelConfig
    from seqrl.training.model import load_model
    from seqrl.training.packing import Layout

    train(custom_reward_function__path=reward_file, **{f"{ACTOR}optim__lr": 1e-2})
    saved = tmp_path / "run" / "global_step_2"
    plain = AutoModelForCausalLM.from_pretrained(saved / "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(saved / "huggingface")
    ours = load_model(ModelConfig(str(model)), FSDPConfig(), torch.device("cpu"), key="model.path")
    tokens = torch.tensor(
        [tokenizer.apply_chat_template([{"role": "user", "content": "7-2+5"}], return_dict=False)]
    )
    layout = Layout.of(torch.tensor([0, tokens.numel()]))

    def logits() -> torch.Tensor:
        arguments = {"position_ids": layout.positions[None], "use_cache": False, "layout": layout}
        return ours(tokens, **arguments).logits

    from seqrl import checkpoint

    with torch.no_grad():
        untrained = logits()
        ours.load_state_dict(checkpoint.load(saved, "cpu").model)
        trained = logits()
        theirs = plain(tokens).logits
    torch.testing.assert_close(theirs, trained, rtol=1e-5, atol=1e-5)
    assert (trained - untrained).abs().max() > 1e-2
