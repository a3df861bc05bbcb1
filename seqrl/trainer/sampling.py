"""A step's responses: generated, scored, shaped; without those that could not be judged; and, under dynamic
sampling, only groups that teach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqrl.config.schema import Config, FilterGroupsConfig
from seqrl.errors import UserError
from seqrl.rewards.base import failures
from seqrl.trainer.clock import Clock
from seqrl.trainer.parts import Parts
from seqrl.types import Prompt, Reward, Rollout, SamplingParams

Metrics = dict[str, float]
WHOLE_REWARD = ("reward", "score", "seq_reward", "seq_final_reward")


@dataclass(frozen=True)
class Sampled:
    """N responses, those of a group side by side, groups numbered from 0.

    Fewer than prompts times group size where some were masked (`reward.on_failure`).
    """

    rollouts: list[Rollout]
    rewards: list[Reward]
    baseline: Tensor | None
    """[N] the reward of the greedy response to the same prompt (ReMax); None where not asked for."""
    metrics: Metrics


@dataclass(frozen=True)
class Group:
    """One prompt's responses: those that were judged, under `reward.on_failure=mask`."""

    rollouts: list[Rollout]
    rewards: list[Reward]

    def is_alike(self, metric: str) -> bool:
        """Whether all responses have the same `metric`, so that none is better than another."""
        return len({_measured(reward, metric) for reward in self.rewards}) == 1


class ResponseSampler:
    """Draws the next prompts and their responses, until a step has the groups it needs."""

    def __init__(
        self, config: Config, parts: Parts, sampling: SamplingParams, *, with_baseline: bool
    ) -> None:
        """`with_baseline`: each prompt is answered greedily, too."""
        self._parts, self._sampling = parts, sampling
        self._filter = config.algorithm.filter_groups
        self._on_failure = config.reward.on_failure
        self._with_baseline = with_baseline
        self._groups_wanted = config.data.train_batch_size

    def __call__(self, *, seed: int, policy_version: int, clock: Clock) -> Sampled:
        """`seed` is that of the step; a step's further batches draw from seeds of their own."""

        drawn: list[Group] = []

        def draw(round: int) -> list[Group]:
            prompts = [self._parts.train_prompts[i] for i in self._parts.sampler.next_batch()]
            answered = self._answered(prompts, self._sampling, seed + round, policy_version, clock)
            drawn.extend(answered)
            return judged(answered, on_failure=self._on_failure)

        if self._filter.enable:
            limit = self._filter.max_num_gen_batches or self._parts.sampler.steps_per_epoch
            groups, metrics = select_groups(draw, self._filter, wanted=self._groups_wanted, limit=limit)
        else:
            groups, metrics = draw(0), {}
        if not groups:
            raise _failure(drawn)
        baseline = None
        if self._with_baseline:
            prompts = [group.rollouts[0].prompt for group in groups]
            greedy = SamplingParams(self._sampling.max_new_tokens, temperature=0.0)
            # One that nobody could judge counts 0: any baseline leaves the gradient unbiased.
            answers = self._answered(prompts, greedy, seed, policy_version, clock)
            values = torch.tensor([answer.rewards[0].value for answer in answers])
            baseline = values.repeat_interleave(torch.tensor([len(group.rollouts) for group in groups]))
            metrics["reward/greedy_baseline"] = float(values.mean())
        rollouts = [
            rollout if rollout.group == number else replace(rollout, group=number)
            for number, group in enumerate(groups)
            for rollout in group.rollouts
        ]
        rewards = [reward for group in groups for reward in group.rewards]
        metrics |= failures([reward for group in drawn for reward in group.rewards]) | _part_metrics(rewards)
        return Sampled(rollouts, rewards, baseline, metrics)

    def _answered(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        seed: int,
        policy_version: int,
        clock: Clock,
    ) -> list[Group]:
        with clock("gen"):
            rollouts = self._parts.rollout.generate(
                prompts, sampling, seed=seed, policy_version=policy_version
            )
        with clock("reward"):
            rewards = self._parts.shaping(rollouts, self._parts.reward(rollouts))
        starts = range(0, len(rollouts), sampling.n)
        return [Group(rollouts[i : i + sampling.n], rewards[i : i + sampling.n]) for i in starts]


def judged(groups: Sequence[Group], *, on_failure: str) -> list[Group]:
    """The groups without what could not be judged, as `reward.on_failure` says.

    `mask` takes these responses out, and a group that has none left; `zero` leaves their reward of 0; `fail`
    raises UserError that names the first.
    """
    if on_failure == "zero" or not any(reward.failed for group in groups for reward in group.rewards):
        return list(groups)
    if on_failure == "fail":
        raise _failure(groups)
    return [
        Group([r for r, _ in kept], [reward for _, reward in kept])
        for group in groups
        if (kept := [p for p in zip(group.rollouts, group.rewards, strict=True) if not p[1].failed])
    ]


def _failure(groups: Sequence[Group]) -> UserError:
    """Of the first response that could not be judged: under `fail`, or where none could."""
    pairs = [pair for group in groups for pair in zip(group.rollouts, group.rewards, strict=True)]
    failed = [(rollout, reward) for rollout, reward in pairs if reward.failed]
    rollout, reward = failed[0]
    return UserError(
        f"sample {rollout.prompt.uid}: {reward.why} (the verifier failed on {len(failed)} of {len(pairs)} "
        "responses); correct it, raise reward.time_limit or reward.memory_limit_mb, or write "
        "reward.on_failure=zero"
    )


def select_groups(
    draw: Callable[[int], list[Group]], config: FilterGroupsConfig, *, wanted: int, limit: int
) -> tuple[list[Group], Metrics]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose responses differ.

    `draw(k)` gives the k-th batch of groups. After `limit` batches what is missing is filled with groups
    whose responses are alike: they teach nothing, but no finished rollout holds a step up for ever.
    """
    drawn: list[Group] = []
    differing: list[int] = []
    alike: list[int] = []
    rounds = 0
    while len(differing) < wanted and rounds < limit:
        for number, group in enumerate(draw(rounds), start=len(drawn)):
            (alike if group.is_alike(config.metric or "acc") else differing).append(number)
            drawn.append(group)
        rounds += 1
    # In the order they were drawn: filled groups at the end would make mini-batches without a gradient.
    chosen = sorted((differing + alike)[:wanted])
    return [drawn[number] for number in chosen], {
        "rollout/gen_batches": float(rounds),
        "rollout/filtered_groups": float(len(alike)),
        "rollout/surplus_groups": float(max(len(differing) - wanted, 0)),
        "rollout/filled_groups": float(max(wanted - len(differing), 0)),
    }


def _measured(reward: Reward, metric: str) -> float:
    if metric in WHOLE_REWARD:
        return reward.value
    if metric in reward.parts:
        return reward.parts[metric]
    if metric == "acc" or reward.failed:  # the latter under reward.on_failure=zero
        return reward.value
    there = dict.fromkeys(("acc", "seq_reward", *reward.parts))
    raise UserError(
        f"algorithm.filter_groups.metric={metric}: no reward has a part of that name; choose one of "
        f"{', '.join(there)}"
    )


def _part_metrics(rewards: Sequence[Reward]) -> Metrics:
    """The mean of each part that all judged rewards have, as `reward/NAME`."""
    found = [reward.parts for reward in rewards if not reward.failed]
    names = [name for name in (found[0] if found else ()) if all(name in parts for parts in found)]
    return {f"reward/{name}": sum(parts[name] for parts in found) / len(found) for name in names}
