"""Supervised fine-tuning: the cold start before reinforcement learning."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from seqrl.config.schema import SFTConfig
from seqrl.data.base import Sampler
from seqrl.report.metrics import timing_metrics
from seqrl.report.trackers import Trackers
from seqrl.report.validation import validation_metrics
from seqrl.rewards.base import RewardFunction
from seqrl.rollout.base import RolloutEngine
from seqrl.trainer.interrupt import StopRequest
from seqrl.training.base import Likelihood, TrainingEngine, fetched
from seqrl.types import Batch, Prompt, SamplingParams, to_offsets


class SFTTrainer:
    """Learns answers by heart; stops early once held-out accuracy reaches `trainer.target_accuracy`."""

    def __init__(
        self,
        config: SFTConfig,
        *,
        training: TrainingEngine,
        rollout: RolloutEngine,
        reward: RewardFunction,
        examples: Batch,
        sampler: Sampler,
        val_prompts: Sequence[Prompt],
        total_steps: int,
    ) -> None:
        """`examples` holds all prompts and answers, the answers as responses."""
        self.config, self.total_steps = config, total_steps
        self.training, self.rollout, self.reward = training, rollout, reward
        self.examples, self.sampler, self.val_prompts = examples, sampler, val_prompts
        self.finished = False
        """Whether `fit` came to its end, and not only to a signal."""

    def fit(self, trackers: Trackers, stop: StopRequest) -> Path:
        """Trains, and returns the Hugging Face directory that holds the result."""
        objective, test_freq = Likelihood(), self.config.trainer.test_freq
        for step in range(1, self.total_steps + 1):
            start = time.perf_counter()
            mini_batch = self.examples.select(self.sampler.next_batch())
            (update,) = fetched([self.training.update(mini_batch, objective)])
            seconds = {"update_actor": time.perf_counter() - start}
            metrics = {
                "train/loss": float(update.diagnostics.loss.sum()),
                "actor/grad_norm": update.grad_norm,
                "actor/entropy": float(update.diagnostics.entropy.mean()),
                "actor/lr": update.lr,
            }
            if step == self.total_steps or (test_freq > 0 and step % test_freq == 0):
                metrics |= self.validate()
                seconds["testing"] = time.perf_counter() - start - seconds["update_actor"]
            seconds["step"] = time.perf_counter() - start
            tokens, answers = mini_batch.tokens.numel(), int(mini_batch.response_mask.sum())
            trackers.log(metrics | timing_metrics(seconds, tokens, answers), step)
            self.finished = step == self.total_steps or self._reached(metrics)
            if self.finished or stop.received is not None:
                break
        directory = Path(self.config.trainer.default_local_dir) / "huggingface"
        unfinished = directory.with_name(".tmp-huggingface")
        self.training.save_pretrained(unfinished)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
        return directory

    def validate(self) -> dict[str, float]:
        """Greedy accuracy on the held-out prompts; {} where there are none."""
        sampling = SamplingParams(self.config.data.max_response_length, temperature=0.0)
        rollouts = self.rollout.generate(
            self.val_prompts, sampling, seed=0, policy_version=self.training.steps_done
        )
        return validation_metrics(rollouts, self.reward(rollouts), n=1)

    def _reached(self, metrics: dict[str, float]) -> bool:
        target = self.config.trainer.target_accuracy
        return target is not None and metrics.get("val/accuracy", -torch.inf) >= target


def to_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Pairs of prompt and answer tokens as a flat batch whose responses are the answers."""
    lengths = torch.tensor([[len(prompt), len(answer)] for prompt, answer in examples])  # [N, 2]
    n, total = len(examples), int(lengths.sum())
    is_answer = torch.tensor([False, True]).repeat(n).repeat_interleave(lengths.flatten())
    return Batch(
        tokens=torch.tensor([token for prompt, answer in examples for token in (*prompt, *answer)]),
        response_mask=is_answer,
        offsets=to_offsets(lengths.sum(1)),
        group=torch.arange(n),
        policy_version=torch.zeros(n, dtype=torch.long),
        reward=torch.zeros(n),
        rollout_logprobs=torch.zeros(total),
    )
