"""The rewards room: rollouts in, one finite reward each out, with why."""

from __future__ import annotations

from collections.abc import Sequence

from seqrl.config.schema import CustomRewardFunctionConfig
from seqrl.rewards.base import RewardFunction, Scorer
from seqrl.rewards.custom import load_custom
from seqrl.rewards.verifiers import check_sources, verify
from seqrl.types import Reward, Rollout

__all__ = ["RewardFunction", "check_sources", "make_reward"]


def make_reward(config: CustomRewardFunctionConfig) -> RewardFunction:
    """The user's own function where `config.path` names one, else the verifier of each data source.

    Raises UserError where the function cannot be loaded.
    """
    score: Scorer = verify if config.path is None else load_custom(config)

    def reward(rollouts: Sequence[Rollout]) -> list[Reward]:
        return [score(rollout) for rollout in rollouts]

    return reward
