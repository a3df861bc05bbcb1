"""The loop: rollout, reward, log-probs, advantages, update; again and again, and never lost."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seqrl import checkpoint
from seqrl.algos.advantages import ADVANTAGES
from seqrl.algos.kl import KL_ESTIMATORS
from seqrl.algos.segments import segment_sum
from seqrl.config.schema import Config
from seqrl.data.base import Sampler
from seqrl.report.metrics import batch_metrics, timing_metrics, validation_metrics
from seqrl.report.page import SampleRow, append_samples, report_from_run
from seqrl.report.trackers import Trackers
from seqrl.rewards.base import RewardFunction
from seqrl.rollout.base import RolloutEngine
from seqrl.trainer.interrupt import StopRequest
from seqrl.training.base import EngineState, PolicyObjective, TrainingEngine, Update, update_metrics
from seqrl.types import Batch, Prompt, Reward, Rollout, SamplingParams

Metrics = dict[str, float]
SAMPLED_GROUPS = 1
"""Groups of a step whose responses go into the report."""


@dataclass(frozen=True)
class Parts:
    """What the loop puts to work; `cli.py` builds them."""

    training: TrainingEngine
    rollout: RolloutEngine
    reward: RewardFunction
    sampler: Sampler
    train_prompts: Sequence[Prompt]
    val_prompts: Sequence[Prompt]


class Trainer:
    def __init__(self, config: Config, parts: Parts, *, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.parts, self.training, self.rollout = parts, parts.training, parts.rollout
        self.run_dir = Path(config.trainer.default_local_dir)
        self.objective = PolicyObjective(config.actor_rollout_ref.actor, config.data.max_response_length)
        self.uses_reference = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
        self.sampling, self.val_sampling = _sampling(config)
        self.step = 0
        """Finished steps."""
        self._finished = self._progress()
        self._saved_step = 0
        self._saving_seconds = 0.0
        """Of the checkpoint before; a step's own is written after its line in the metrics."""

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint as if nothing had happened."""
        saved = checkpoint.load(path, "cpu")
        self.training.load_state(EngineState(saved.model, saved.optimizer, saved.state["training"]))
        self.parts.sampler.load_state_dict(saved.state["sampler"])
        checkpoint.restore_rng(saved.state)
        self.step = self._saved_step = saved.step
        self._finished = self._progress()

    def fit(self, trackers: Trackers, stop: StopRequest) -> None:
        """Trains up to `total_steps`, or to the end of the step in which `stop` is received."""
        first = self.step == 0 and stop.received is None
        if first and self.config.trainer.val_before_train and self.parts.val_prompts:
            trackers.log(self.validate(), 0)
        try:
            while self.step < self.total_steps and stop.received is None:
                self._finish_step(trackers)
                if self._is_due(self.config.trainer.save_freq) or stop.received is not None:
                    self.save()
        except Exception:
            self._rescue(trackers)
            raise
        finally:
            report_from_run(self.run_dir)

    def _finish_step(self, trackers: Trackers) -> None:
        """One step, and its line in the metrics whatever becomes of the validation after it."""
        clock = Clock()
        start = time.perf_counter()
        batch, metrics = self.train_step(clock)
        self.step += 1
        self._finished = self._progress()
        try:
            if self._is_due(self.config.trainer.test_freq):
                with clock("testing"):
                    metrics |= self.validate()
        finally:
            clock.seconds |= {"save_checkpoint": self._saving_seconds, "step": time.perf_counter() - start}
            self._saving_seconds = 0.0
            tokens, responses = batch.tokens.numel(), int(batch.response_mask.sum())
            trackers.log(metrics | timing_metrics(clock.seconds, tokens, responses), self.step)

    def _rescue(self, trackers: Trackers) -> None:
        """After a failure: the last finished step is saved, unless the weights have moved since."""
        if self._saved_step == self.step or self.training.steps_done != self._finished["policy_version"]:
            return
        self.save()
        trackers.print(f"step {self.step} is saved; trainer.resume_mode=auto goes on from it")

    def train_step(self, clock: Clock) -> tuple[Batch, Metrics]:
        """One rollout batch and the optimizer steps on it."""
        step = self.step + 1
        prompts = [self.parts.train_prompts[i] for i in self.parts.sampler.next_batch()]
        with clock("gen"):
            rollouts = self._generate(prompts, self.sampling)
        with clock("reward"):
            rewards = self.parts.reward(rollouts)
        batch = Batch.of(rollouts, rewards)
        with clock("old_log_prob"):
            batch = replace(batch, old_logprobs=self.training.logprobs(batch))
        if self.uses_reference:
            with clock("ref"):
                batch = replace(batch, ref_logprobs=self.training.ref_logprobs(batch))
        with clock("adv"):
            batch = self.with_advantages(batch)
        with clock("update_actor"):
            updates = [self.training.update(part, self.objective) for part in self._mini_batches(batch)]
        if self._is_due(self.config.trainer.test_freq, step) or step == 1:
            append_samples(self.run_dir, self._samples(step, batch, rollouts, rewards))
        return batch, self._metrics(batch, rollouts, rewards, updates)

    def with_advantages(self, batch: Batch) -> Batch:
        """The KL penalty taken off the reward, where asked for, and each token its advantage."""
        algorithm = self.config.algorithm
        if algorithm.use_kl_in_reward:
            assert batch.old_logprobs is not None and batch.ref_logprobs is not None
            kl = KL_ESTIMATORS[algorithm.kl_penalty](batch.old_logprobs, batch.ref_logprobs)
            penalty = algorithm.kl_ctrl.kl_coef * segment_sum(kl, batch.offsets)
            batch = replace(batch, reward=batch.reward - penalty)
        advantage = ADVANTAGES[algorithm.adv_estimator](
            batch.reward, batch.group, norm_by_std=algorithm.norm_adv_by_std_in_grpo
        )
        per_token = advantage.repeat_interleave(batch.lengths)
        return replace(batch, advantages=torch.where(batch.response_mask, per_token, 0.0))

    def validate(self) -> Metrics:
        """Answers the held-out prompts; {} where there are none."""
        rollouts = self._generate(self.parts.val_prompts, self.val_sampling)
        return validation_metrics(rollouts, self.parts.reward(rollouts), n=self.val_sampling.n)

    def save(self) -> None:
        start = time.perf_counter()
        state = self.training.state()
        checkpoint.save(
            self.run_dir,
            self.step,
            model=state.model,
            optimizer=state.optimizer,
            state={
                "training": state.extra,
                "sampler": self._finished["sampler"],
                **checkpoint.rng_state(),
            },
            save_hf=self.training.save_pretrained,
            keep=self.config.trainer.max_actor_ckpt_to_keep,
        )
        self._saved_step = self.step
        self._saving_seconds = time.perf_counter() - start

    def _progress(self) -> dict[str, Any]:
        return {"sampler": self.parts.sampler.state_dict(), "policy_version": self.training.steps_done}

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        return self.rollout.generate(
            prompts, sampling, seed=self._seed(), policy_version=self.training.steps_done
        )

    def _seed(self) -> int:
        """Of this step: what is drawn follows from it, so that a resumed run draws the same."""
        return (self.config.trainer.seed << 40) + (self.step << 8)

    def _mini_batches(self, batch: Batch) -> Iterator[Batch]:
        actor = self.config.actor_rollout_ref.actor
        size = actor.ppo_mini_batch_size * self.sampling.n
        for epoch in range(actor.ppo_epochs):
            order = torch.arange(len(batch))
            if actor.shuffle:
                order = order[random.Random(f"{self._seed()}/{epoch}").sample(range(len(batch)), len(batch))]
            for part in order.split(size):
                yield batch.select(part)

    def _is_due(self, frequency: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.total_steps or (frequency > 0 and step % frequency == 0)

    def _metrics(
        self, batch: Batch, rollouts: list[Rollout], rewards: list[Reward], updates: list[Update]
    ) -> Metrics:
        place = {"training/global_step": self.step + 1, "training/epoch": self.parts.sampler.epoch}
        return batch_metrics(batch, rollouts, rewards) | update_metrics(updates) | place

    def _samples(
        self, step: int, batch: Batch, rollouts: list[Rollout], rewards: list[Reward]
    ) -> list[SampleRow]:
        assert batch.advantages is not None
        return [
            SampleRow(
                step=step,
                prompt=rollouts[i].prompt.messages[-1]["content"],
                response=rollouts[i].text,
                ground_truth=str(rollouts[i].prompt.ground_truth),
                reward=rewards[i].value,
                advantage=float(batch.advantages[int(batch.offsets[i + 1]) - 1]),
            )
            for i in range(SAMPLED_GROUPS * self.sampling.n)
        ]


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _sampling(config: Config) -> tuple[SamplingParams, SamplingParams]:
    """How training and held-out responses are drawn."""
    rollout, limit = config.actor_rollout_ref.rollout, config.data.max_response_length
    val = rollout.val_kwargs
    temperature = val.temperature if val.do_sample else 0.0
    return (
        SamplingParams(limit, rollout.n, rollout.temperature, rollout.top_p, rollout.top_k),
        SamplingParams(limit, val.n, temperature, val.top_p, val.top_k),
    )
