"""Supervised fine-tuning: how long it goes on, and what it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from seqrl.config.schema import SFTConfig, SFTTrainerConfig
from seqrl.data.sampler import PromptSampler
from seqrl.report.files import METRICS, read_rows
from seqrl.report.trackers import make_trackers
from seqrl.trainer.interrupt import StopRequest
from seqrl.trainer.sft import SFTTrainer, to_batch
from seqrl.training.base import Update
from seqrl.training.objective import Diagnostics
from seqrl.types import Batch, Prompt, Reward, Rollout, SamplingParams

EXAMPLES = [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 1], [2, 3]), ([4], [5, 6])]


class Engine:
    """Trains and answers; after `steps_done` steps it answers that many of 4 prompts right."""

    def __init__(self, on_update: Callable[[int], None]) -> None:
        self.steps_done = 0
        self.seen: list[Batch] = []
        self.asked: list[SamplingParams] = []
        self.on_update = on_update

    def update(self, mini_batch: Batch, objective: Any) -> Update:
        self.steps_done += 1
        self.seen.append(mini_batch)
        self.on_update(self.steps_done)
        return Update(1, torch.tensor(1.0), 0.1, Diagnostics(torch.tensor([0.5]), torch.tensor([1.0])))

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "steps").write_text(str(self.steps_done))

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, policy_version: int
    ) -> list[Rollout]:
        self.asked.append(sampling)
        right = torch.tensor([1]), torch.tensor([0.0])
        return [Rollout(p, i, *right, str(self.steps_done > i), True, 0) for i, p in enumerate(prompts)]


def reward(rollouts: Sequence[Rollout]) -> list[Reward]:
    return [Reward(float(rollout.text == "True"), "") for rollout in rollouts]


def train(
    tmp_path: Path, on_update: Callable[[int], None] = lambda step: None, **settings: Any
) -> tuple[Engine, Path, list[dict[str, Any]]]:
    config = SFTConfig(trainer=SFTTrainerConfig(default_local_dir=str(tmp_path), logger=[], **settings))
    engine = Engine(on_update)
    prompts = [
        Prompt(f"val:{i}", "fake", ({"role": "user", "content": "?"},), "", {}, (1,)) for i in range(4)
    ]
    trainer: Any = SFTTrainer(
        config,
        training=engine,  # type: ignore[arg-type]
        rollout=engine,
        reward=reward,
        examples=to_batch(EXAMPLES),
        sampler=PromptSampler(len(EXAMPLES), 2, shuffle=True, seed=1),
        val_prompts=prompts,
        total_steps=6,
    )
    trackers = make_trackers(config.trainer, {}, tmp_path, total_steps=6, first_step=1)
    with StopRequest() as stop:
        directory = trainer.fit(trackers, stop)
    return engine, directory, read_rows(tmp_path / METRICS)


def test_to_batch_makes_answers_responses() -> None:
    batch = to_batch(EXAMPLES)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]
    assert batch.offsets.tolist() == [0, 5, 7, 12, 15]
    assert batch.tokens[batch.response_mask].tolist() == [3, 4, 5, 7, 2, 3, 5, 6]
    assert batch.response_lengths.tolist() == [3, 1, 2, 2]


def test_it_goes_through_the_examples_and_leaves_a_model(tmp_path: Path) -> None:
    engine, directory, rows = train(tmp_path)
    assert directory == tmp_path / "huggingface"
    assert (directory / "steps").read_text() == "6"
    assert not list(tmp_path.glob(".tmp-*"))
    epoch = sorted(
        tuple(part.tolist())
        for batch in engine.seen[:2]
        for part in batch.tokens.split(batch.lengths.tolist())
    )
    assert epoch == sorted(tuple(p + a) for p, a in EXAMPLES)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/accuracy" in row] == [6]
    assert rows[0]["train/loss"] == 0.5


def test_it_stops_once_the_held_out_accuracy_is_reached(tmp_path: Path) -> None:
    engine, directory, rows = train(tmp_path, test_freq=1, target_accuracy=0.5)
    assert [row["val/accuracy"] for row in rows] == [0.25, 0.5]
    assert (directory / "steps").read_text() == "2"
    assert all(sampling.temperature == 0 and sampling.n == 1 for sampling in engine.asked), "greedily"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_keeps_the_model(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    _, directory, rows = train(tmp_path, interrupt)
    assert (directory / "steps").read_text() == "3"
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_model_of_before_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "old").write_text("")
    _, directory, _ = train(tmp_path)
    assert [path.name for path in directory.iterdir()] == ["steps"]
