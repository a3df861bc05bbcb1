"""The loop: rollout, reward, log-probs, advantages, update; again and again, and never lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqrl import checkpoint
from seqrl.algos.drift import expert_drift
from seqrl.algos.segments import segment_mean
from seqrl.config.schema import Config
from seqrl.report.metrics import batch_metrics, timing_metrics
from seqrl.report.page import SampleRow, append_samples, report_from_run
from seqrl.report.trackers import Trackers
from seqrl.trainer.advantages import AdvantageEstimator
from seqrl.trainer.clock import Clock
from seqrl.trainer.controllers import Controllers
from seqrl.trainer.correction import RolloutCorrection, measured_mismatch
from seqrl.trainer.interrupt import StopRequest
from seqrl.trainer.parts import Parts
from seqrl.trainer.preflight import check_partition, check_splits, noise_clipfrac, report_noise
from seqrl.trainer.sampling import ResponseSampler, Sampled
from seqrl.trainer.validation import Validation
from seqrl.training.base import (
    EngineState,
    Update,
    fetched,
    update_metrics,
    update_ratios,
)
from seqrl.types import Batch, SamplingParams

Metrics = dict[str, float]
SAMPLED_GROUPS = 1
"""Groups of a step whose responses go into the report."""
PROBED_FOR_DRIFT = 4
"""Responses of a step on which expert drift is measured."""
PROBED_FOR_MISMATCH = 16
"""Responses of a step whose log-probs the training engine computes even where it takes the rollout's."""
PROBED_FOR_NOISE = 64
"""Responses whose log-probs are computed in two splits, once in a process."""


class Trainer:
    def __init__(self, config: Config, parts: Parts, *, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.parts, self.training, self.rollout = parts, parts.training, parts.rollout
        self.run_dir = Path(config.trainer.default_local_dir)
        actor = config.actor_rollout_ref.actor
        self.needs_ref_logprobs = config.algorithm.use_kl_in_reward or (
            actor.use_kl_loss and actor.kl_loss_type != "full"  # which takes the reference's logits
        )
        self.sampling = _sampling(config)
        self.validation = Validation(config, parts)
        self.correction = RolloutCorrection(config.algorithm.rollout_correction)
        self.advantages = AdvantageEstimator(config.algorithm)
        self.responses = ResponseSampler(
            config, parts, self.sampling, with_baseline=self.advantages.needs_baseline
        )
        self.controllers = Controllers(config)
        self.objective = self.controllers.objective()
        self.step = 0
        """Finished steps."""
        self._untried = True
        """No step was taken in this process."""
        self._batch: Batch | None = None
        """Of the last finished step, if this process took it."""
        self._finished = self._progress()
        self._saved_step = 0
        self._saving_seconds = 0.0
        """Of the checkpoint before; a step's own is written after its line in the metrics."""

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint as if nothing had happened."""
        saved = checkpoint.load(path, "cpu")
        self.training.load_state(EngineState(saved.model, saved.optimizer, saved.state["training"]))
        self.parts.sampler.load_state_dict(saved.state["sampler"])
        if "controllers" in saved.state:
            self.controllers.load_state_dict(saved.state["controllers"])
        self.objective = self.controllers.objective()
        checkpoint.restore_rng(saved.state)
        self.step = self._saved_step = saved.step
        self._finished = self._progress()

    def fit(self, trackers: Trackers, stop: StopRequest) -> None:
        """Trains up to `total_steps`, or to the end of the step in which `stop` is received; under
        `trainer.val_only` it validates and trains nothing."""
        if self.config.trainer.val_only:
            self._validate_only(trackers)
            return
        first = self.step == 0 and stop.received is None
        if first and self.config.trainer.val_before_train and self.parts.val_prompts:
            trackers.log(self._validate(trackers), 0)
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
        batch, metrics = self.train_step(clock, trackers.print)
        self.step += 1
        self._batch, self._finished = batch, self._progress()
        try:
            if self.parts.val_prompts and self._is_due(self.config.trainer.test_freq):
                with clock("testing"):
                    metrics |= self._validate(trackers)
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

    def train_step(self, clock: Clock, say: Callable[[str], None]) -> tuple[Batch, Metrics]:
        """One rollout batch and the optimizer steps on it; `say` prints a line."""
        step = self.step + 1
        sampled = self.responses(seed=self._seed(), policy_version=self.training.steps_done, clock=clock)
        batch = Batch.of(sampled.rollouts, sampled.rewards)
        metrics = dict(sampled.metrics)
        with clock("old_log_prob"):
            batch, measured, sum_pi_squared = self._with_old_logprobs(batch)
        if self.needs_ref_logprobs:
            with clock("ref"):
                batch = replace(batch, ref_logprobs=self.training.ref_logprobs(batch))
        with clock("adv"):
            metrics |= measured_mismatch(measured) | noise_clipfrac(measured, self.objective.config)
            corrected, of_correction = self.correction(batch)
            batch, of_reward = self.advantages(
                corrected,
                sampled.rewards,
                [rollout.prompt.uid for rollout in sampled.rollouts],
                kl_coef=self.controllers.reward_kl_coef,
                baseline=sampled.baseline,
                sum_pi_squared=sum_pi_squared,
            )
            metrics |= of_correction | of_reward
        if self._untried:
            self._preflight(batch, measured, say)
            self._untried = False
        with clock("routing"):
            probe = batch.select(_spread(len(batch), PROBED_FOR_DRIFT))
            routing = self.training.routing(probe)
        with clock("update_actor"):
            parts = self._mini_batches(batch)
            updates = fetched(self.training.update(part, self.objective) for part in parts)
        with clock("routing"):
            metrics |= _drift(routing, self.training.routing(probe) if routing else [])
        metrics |= self._metrics(batch, sampled, updates)
        self.controllers.after_step(*update_ratios(updates), metrics, sequences=len(batch))
        self.objective = self.controllers.objective()
        if self._is_due(self.config.trainer.test_freq, step) or step == 1:
            append_samples(self.run_dir, self._samples(step, batch, sampled))
        return batch, metrics

    @property
    def _bypasses(self) -> bool:
        return self.config.algorithm.rollout_correction.bypass_mode

    def _with_old_logprobs(self, batch: Batch) -> tuple[Batch, Batch, Tensor | None]:
        """The batch with its old log-probs; what of it has the training engine's own, to measure the mismatch
        by; and the sum of squared probabilities [T] where it is needed.

        Where the two engines say the same of some responses, bit for bit, the rollout's are taken for all.
        Each step decides for itself, so that a resumed run decides likewise.
        """
        taken = replace(batch, old_logprobs=batch.rollout_logprobs)
        if self.advantages.needs_sum_pi_squared:
            logprobs, squares = self.training.logprobs_and_sum_pi_squared(batch)
            computed = replace(batch, old_logprobs=logprobs)
            return taken if self._bypasses else computed, computed, squares
        probe = batch.select(_spread(len(batch), PROBED_FOR_MISMATCH))
        probe = replace(probe, old_logprobs=self.training.logprobs(probe))
        if self._bypasses or _is_equal(probe):
            return taken, probe, None
        if len(probe) == len(batch):
            return probe, probe, None
        computed = replace(batch, old_logprobs=self.training.logprobs(batch))
        return computed, computed, None

    def _preflight(self, batch: Batch, measured: Batch, say: Callable[[str], None]) -> None:
        """Asked once in a process: is there noise in the ratios, and does a split change the gradient?"""
        actor = self.objective.config
        # At most half of them: the same responses again would make up the same micro-batches.
        probe = measured.select(_spread(len(measured), min(PROBED_FOR_NOISE, (len(measured) + 1) // 2)))
        again = self.training.logprobs(probe)
        report_noise(measured, probe, again, self.config, say)
        if batch.old_logprobs is batch.rollout_logprobs and not self._bypasses:
            say("old log-probs: the rollout's, as long as the training engine says the same, bit for bit")
        if self.config.trainer.self_test:
            check_splits(probe, again, actor)
            check_partition(self.training, next(self._mini_batches(batch)), self.objective, actor, say)

    def _validate(self, trackers: Trackers) -> Metrics:
        return self.validation(
            trackers, step=self.step, seed=self._seed(), policy_version=self.training.steps_done
        )

    def _validate_only(self, trackers: Trackers) -> None:
        trackers.log(self._validate(trackers), self.step)
        report_from_run(self.run_dir)

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
                "controllers": self._finished["controllers"],
                **checkpoint.rng_state(),
            },
            batch=self._batch,
            save_hf=self.training.save_pretrained if self._exports else None,
            keep=self.config.trainer.max_actor_ckpt_to_keep,
        )
        self._saved_step = self.step
        self._saving_seconds = time.perf_counter() - start

    @property
    def _exports(self) -> bool:
        return "hf_model" in self.config.actor_rollout_ref.actor.checkpoint.save_contents

    def _progress(self) -> dict[str, Any]:
        return {
            "sampler": self.parts.sampler.state_dict(),
            "policy_version": self.training.steps_done,
            "controllers": self.controllers.state_dict(),
        }

    def _seed(self) -> int:
        """Of this step: what is drawn follows from it, so that a resumed run draws the same."""
        return (self.config.trainer.seed << 40) + (self.step << 8)

    def _mini_batches(self, batch: Batch) -> Iterator[Batch]:
        """As many as the config says, of whole groups (or shuffled responses), shared out evenly: fewer than
        all responses are there where some were masked."""
        actor = self.config.actor_rollout_ref.actor
        count = self.config.data.train_batch_size // actor.ppo_mini_batch_size
        _, group = batch.group.unique(return_inverse=True)  # [N] in 0 .. G-1
        mini_batch = group * count // (group.max() + 1)
        for epoch in range(actor.ppo_epochs):
            if actor.shuffle:
                order = random.Random(f"{self._seed()}/{epoch}").sample(range(len(batch)), len(batch))
                parts = torch.tensor(order).tensor_split(count)
            else:
                parts = tuple((mini_batch == k).nonzero()[:, 0] for k in range(count))
            yield from (batch.select(part) for part in parts if part.numel())

    def _is_due(self, frequency: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.total_steps or (frequency > 0 and step % frequency == 0)

    def _metrics(self, batch: Batch, sampled: Sampled, updates: list[Update]) -> Metrics:
        return {
            **batch_metrics(batch, sampled.rollouts, sampled.rewards),
            **update_metrics(updates),
            **self.controllers.metrics(),
            "training/global_step": self.step + 1,
            "training/epoch": self.parts.sampler.epoch,
        }

    def _samples(self, step: int, batch: Batch, sampled: Sampled) -> list[SampleRow]:
        rollouts, rewards = sampled.rollouts, sampled.rewards
        assert batch.advantages is not None
        advantage = segment_mean(batch.advantages[batch.response_mask], batch.response_offsets)
        return [
            SampleRow(
                step=step,
                prompt=rollouts[i].prompt.messages[-1]["content"],
                response=rollouts[i].text,
                ground_truth=str(rollouts[i].prompt.ground_truth),
                reward=rewards[i].value,
                advantage=float(advantage[i]),
            )
            for i in range(len(rollouts))
            if rollouts[i].group < SAMPLED_GROUPS
        ]


def _spread(total: int, most: int) -> list[int]:
    """At most `most` of the first `total` numbers, evenly."""
    count = min(total, most)
    return [i * total // count for i in range(count)]


def _is_equal(probe: Batch) -> bool:
    """Whether both engines say the same of each response token; NaN is no agreement."""
    assert probe.old_logprobs is not None
    mask = probe.response_mask
    return torch.equal(probe.old_logprobs[mask], probe.rollout_logprobs[mask])


def _drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> Metrics:
    """Expert drift by layer and over all layers; {} for a dense model."""
    layers = [float(expert_drift(*pair)) for pair in zip(before, after, strict=True)]
    if not layers:
        return {}
    by_layer = {f"moe/expert_drift/layer_{i}": drift for i, drift in enumerate(layers)}
    return {"moe/expert_drift": sum(layers) / len(layers), **by_layer}


def _sampling(config: Config) -> SamplingParams:
    """How training responses are drawn."""
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        max_new_tokens=config.data.max_response_length,
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        ignore_eos=rollout.ignore_eos,
    )
