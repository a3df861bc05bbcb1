"""A training run in miniature: every part of the loop but the loop itself is a small fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from seqrl import checkpoint
from seqrl.config.schema import Config
from seqrl.data.sampler import PromptSampler
from seqrl.report.files import METRICS, read_rows
from seqrl.report.trackers import make_trackers
from seqrl.rewards.shaping import make_shaping
from seqrl.trainer.interrupt import StopRequest
from seqrl.trainer.loop import Trainer
from seqrl.trainer.parts import Parts
from seqrl.training.base import EngineState, Update
from seqrl.training.objective import Counts
from seqrl.types import Batch, Prompt, Reward, Rollout, SamplingParams


@dataclass
class Diary:
    """What was asked of the parts, in order."""

    events: list[str] = field(default_factory=list)
    generated: list[dict[str, Any]] = field(default_factory=list)
    mini_batches: list[Batch] = field(default_factory=list)


class FakeTraining:
    """Its one weight depends on every reward, advantage and their order, so that a run which went
    another way ends elsewhere. The policy's log-probs are -1, the reference's -1.5."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.steps_done = 0
        self.wrong_by = 0.0

    def logprobs(self, batch: Batch) -> torch.Tensor:
        self.diary.events.append("old_log_prob")
        return torch.where(batch.response_mask, -1.0, 0.0)

    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        self.diary.events.append("ref")
        return torch.where(batch.response_mask, -1.5, 0.0)

    def logprobs_and_sum_pi_squared(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logprobs(batch), torch.where(batch.response_mask, 0.4, 0.0)

    def routing(self, batch: Batch) -> list[torch.Tensor]:
        """Two layers; in the second a token's one expert changes with each optimizer step."""
        tokens = int(batch.response_mask.sum())
        return [torch.zeros(tokens, 1), torch.full((tokens, 1), self.steps_done)]

    def partition_error(self, mini_batch: Batch, objective: Any, logprobs: torch.Tensor) -> float:
        return self.wrong_by

    def update(self, mini_batch: Batch, objective: Any) -> Update:
        mini_batch = objective.prepared(mini_batch)
        self.diary.events.append("update")
        self.diary.mini_batches.append(mini_batch)
        self.steps_done += 1
        places = torch.arange(1.0, len(mini_batch) + 1)
        assert mini_batch.advantages is not None and mini_batch.old_logprobs is not None
        self.weight = self.weight * 0.9 + (mini_batch.reward * places).sum() + mini_batch.advantages.std()
        now = mini_batch.old_logprobs[mini_batch.response_mask] + 0.01 * self.steps_done
        _, diagnostics = objective(now, now.exp(), mini_batch, Counts.of(mini_batch))
        return Update(self.steps_done, torch.tensor(1.0), lr=0.1 / self.steps_done, diagnostics=diagnostics)

    def state(self) -> EngineState:
        return EngineState(
            {"weight": self.weight}, {"weight:momentum": self.weight / 2}, {"steps": self.steps_done}
        )

    def load_state(self, state: EngineState) -> None:
        self.weight, self.steps_done = state.model["weight"], state.extra["steps"]

    def save_pretrained(self, directory: Path) -> None:
        self.diary.events.append("save")
        directory.mkdir()
        (directory / "config.json").write_text("{}")


class FakeRollout:
    """Responses of one to four tokens that follow from seed, prompt and number."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary
        self.logprob = -1.0

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, policy_version: int
    ) -> list[Rollout]:
        self.diary.events.append("generate")
        self.diary.generated.append(
            {
                "prompts": [prompt.uid for prompt in prompts],
                "sampling": sampling,
                "seed": seed,
                "policy_version": policy_version,
            }
        )
        return [
            self._rollout(prompt, group, seed + 1000 * i, policy_version)
            for group, prompt in enumerate(prompts)
            for i in range(sampling.n)
        ]

    def _rollout(self, prompt: Prompt, group: int, seed: int, policy_version: int) -> Rollout:
        generator = torch.Generator().manual_seed(seed + 31 * prompt.tokens[0])
        length = int(torch.randint(1, 5, (), generator=generator))
        tokens = torch.randint(0, 9, (length,), generator=generator)
        text = "".join(map(str, tokens.tolist()))
        return Rollout(prompt, group, tokens, torch.full((length,), self.logprob), text, True, policy_version)


def digit_sum(rollout: Rollout) -> Reward:
    return Reward(float(rollout.tokens.sum()), "scored")


class FakeReward:
    """The digits' sum, unless a test sets another `score`. `before[k]` is called before the k-th scoring
    (the first is 1)."""

    def __init__(self, diary: Diary, before: Mapping[int, Callable[[], None]]) -> None:
        self.diary, self.before, self.calls = diary, before, 0
        self.score: Callable[[Rollout], Reward] = digit_sum

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        self.calls += 1
        self.diary.events.append("reward")
        self.before.get(self.calls, lambda: None)()
        return [self.score(rollout) for rollout in rollouts]


def prompts(name: str, count: int) -> list[Prompt]:
    messages = ({"role": "user", "content": "?"},)
    return [Prompt(f"{name}:{i}", "fake", messages, "", {}, (i, i + 1)) for i in range(count)]


@dataclass
class Run:
    """One process's part in a run."""

    trainer: Trainer
    training: FakeTraining
    reward: FakeReward
    diary: Diary
    run_dir: Path
    stop: StopRequest

    def fit(self, start: Path | None = None) -> None:
        """From the checkpoint `start`, or else from its own newest one."""
        found = start or checkpoint.find(self.run_dir, mode="auto", path=None)
        if found is not None:
            self.trainer.resume(found)
        trackers = make_trackers(
            self.trainer.config.trainer,
            {},
            self.run_dir,
            total_steps=self.trainer.total_steps,
            first_step=self.trainer.step + 1,
        )
        with self.stop:
            self.trainer.fit(trackers, self.stop)
        trackers.close()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the metrics, without what the clock says."""
        return [
            {name: value for name, value in row.items() if not name.startswith(("timing_", "perf/"))}
            for row in read_rows(self.run_dir / METRICS)
        ]

    @property
    def saved(self) -> list[int]:
        return sorted(
            int(path.name.removeprefix("global_step_")) for path in self.run_dir.glob("global_step_*")
        )

    def trained_on(self) -> list[list[str]]:
        """The prompts of each training rollout."""
        return [call["prompts"] for call in self.diary.generated if call["prompts"][0].startswith("train")]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Batches of 4 prompts x 2 responses out of 10 prompts, in mini-batches of 2 prompts, for 5 steps.
    Keywords are overrides of config keys, with `__` for a dot."""

    def make(
        name: str = "run", *, before: Mapping[int, Callable[[], None]] | None = None, **overrides: Any
    ) -> Run:
        config = Config()
        settings = {
            "data.train_batch_size": 4,
            "data.max_response_length": 4,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
            "actor_rollout_ref.rollout.n": 2,
            "trainer.default_local_dir": str(tmp_path / name),
            "trainer.logger": [],
        } | {key.replace("__", "."): value for key, value in overrides.items()}
        for key, value in settings.items():
            *sections, last = key.split(".")
            section = reduce(getattr, sections, config)
            assert hasattr(section, last), key
            setattr(section, last, value)
        diary = Diary()
        training, reward = FakeTraining(diary), FakeReward(diary, before or {})
        train, val = prompts("train", 10), prompts("val", 3)
        sampler = PromptSampler(len(train), 4, shuffle=True, seed=1)
        shaping = make_shaping(
            config.reward.reward_kwargs, max_response_length=config.data.max_response_length
        )
        parts = Parts(training, FakeRollout(diary), reward, shaping, sampler, train, val)
        trainer = Trainer(config, parts, total_steps=5)
        return Run(trainer, training, reward, diary, tmp_path / name, StopRequest())

    return make
