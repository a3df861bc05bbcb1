"""From log-probs to the one number that is minimised: surrogate, aggregation, KL, entropy.

This is the only place where training meets the algorithms. Prompt and masked tokens are taken out
here, before a loss sees them: whatever stands in their log-probs cannot reach a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from seqrl.algos.aggregate import AGGREGATIONS
from seqrl.algos.kl import KL_ESTIMATORS
from seqrl.algos.losses import DEFAULT_AGGREGATION, LOSSES
from seqrl.algos.segments import segment_mean, segment_sum
from seqrl.config.schema import ActorConfig
from seqrl.errors import UserError
from seqrl.types import Batch


@dataclass(frozen=True)
class Counts:
    """Of the whole mini-batch, so that no split into micro-batches changes a gradient."""

    tokens: int
    """Response tokens."""
    sequences: int

    @classmethod
    def of(cls, mini_batch: Batch) -> Counts:
        return cls(int(mini_batch.response_mask.sum()), len(mini_batch))


@dataclass(frozen=True)
class Diagnostics:
    """What there is to say of a part of a mini-batch; detached."""

    loss: Tensor
    """[1], this part's share of the mini-batch's loss."""
    entropy: Tensor
    """[T], of the response tokens."""

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Lays the parts' tensors one behind the other, on the CPU."""
        return cls(
            **{f.name: torch.cat([getattr(part, f.name) for part in parts]).cpu() for f in fields(cls)}
        )


@dataclass(frozen=True)
class PolicyDiagnostics(Diagnostics):
    """Per response token [T] and per sequence [N]."""

    log_ratio: Tensor
    """[T], logprobs - old_logprobs."""
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    """[T] bool."""
    kl: Tensor
    """[T], estimate of the KL divergence from the reference; 0 where none is asked for."""
    sequence_log_ratio: Tensor
    """[N], log s_i."""
    sequence_clipped_low: Tensor
    sequence_clipped_high: Tensor
    """[N] bool: at least one token of the sequence is clipped."""


class Objective(Protocol):
    @property
    def needs_entropy_gradient(self) -> bool: ...

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, part: Batch, counts: Counts
    ) -> tuple[Tensor, Diagnostics]:
        """The share of `part`, a micro-batch, in the loss of its mini-batch.

        Args:
            logprobs, entropy: [T] of the response tokens of `part`.
            counts: of the whole mini-batch.
        """


@dataclass(frozen=True)
class PolicyObjective:
    """Reinforcement learning: a policy loss, aggregated, with KL and entropy terms."""

    config: ActorConfig
    max_response_length: int
    """Tokens; the divisor of `seq-mean-token-sum-norm` where none is given."""

    def __post_init__(self) -> None:
        if self.config.policy_loss.loss_mode not in LOSSES:
            raise UserError(
                f"actor_rollout_ref.actor.policy_loss.loss_mode={self.config.policy_loss.loss_mode} "
                f"is not known; choose one of {', '.join(LOSSES)}"
            )

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.config.entropy_coeff != 0

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, part: Batch, counts: Counts
    ) -> tuple[Tensor, Diagnostics]:
        actor, mask, offsets = self.config, part.response_mask, part.response_offsets
        assert part.old_logprobs is not None and part.advantages is not None
        old_logprobs = part.old_logprobs[mask]

        surrogate = LOSSES[actor.policy_loss.loss_mode](
            logprobs,
            old_logprobs,
            part.advantages[mask],
            offsets,
            clip_low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
            clip_high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
            clip_c=actor.clip_ratio_c,
        )
        values = surrogate.values
        kl = torch.zeros_like(logprobs)
        if actor.use_kl_loss:
            assert part.ref_logprobs is not None
            kl = KL_ESTIMATORS[actor.kl_loss_type](logprobs, part.ref_logprobs[mask])
            values = values + actor.kl_loss_coef * kl
        if self.needs_entropy_gradient:
            values = values - actor.entropy_coeff * entropy
        loss = self._aggregate(values, offsets, counts)

        log_ratio = logprobs.detach() - old_logprobs
        return loss, PolicyDiagnostics(
            loss=loss.detach().reshape(1),
            entropy=entropy.detach(),
            log_ratio=log_ratio,
            clipped_low=surrogate.clipped_low,
            clipped_high=surrogate.clipped_high,
            clipped_dual=surrogate.clipped_dual,
            kl=kl.detach(),
            sequence_log_ratio=segment_mean(log_ratio, offsets),
            sequence_clipped_low=segment_sum(surrogate.clipped_low.long(), offsets) > 0,
            sequence_clipped_high=segment_sum(surrogate.clipped_high.long(), offsets) > 0,
        )

    def _aggregate(self, values: Tensor, offsets: Tensor, counts: Counts) -> Tensor:
        mode = self.config.loss_agg_mode or DEFAULT_AGGREGATION[self.config.policy_loss.loss_mode]
        scale = self.config.loss_scale_factor or self.max_response_length
        return AGGREGATIONS[mode](
            values, offsets, tokens=counts.tokens, sequences=counts.sequences, scale=scale
        )


@dataclass(frozen=True)
class Likelihood:
    """Supervised fine-tuning: the mean negative log-likelihood of the response tokens."""

    needs_entropy_gradient: bool = False

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, part: Batch, counts: Counts
    ) -> tuple[Tensor, Diagnostics]:
        loss = -logprobs.sum() / max(counts.tokens, 1)
        return loss, Diagnostics(loss.detach().reshape(1), entropy.detach())


def policy_metrics(parts: Sequence[PolicyDiagnostics]) -> dict[str, float]:
    """The mini-batches of a step as metrics, under verl's names where it has them."""
    d = PolicyDiagnostics.merge(parts)

    def mean(values: Tensor) -> float:
        return float(values.float().mean()) if values.numel() else 0.0

    metrics = {
        "actor/pg_loss": float(d.loss.sum()) / len(parts),
        "actor/entropy": mean(d.entropy),
        "actor/ppo_kl": mean(-d.log_ratio),
        "actor/kl_loss": mean(d.kl),
        "actor/pg_clipfrac": mean(d.clipped_low | d.clipped_high),
        "actor/pg_clipfrac_low": mean(d.clipped_low),
        "actor/pg_clipfrac_high": mean(d.clipped_high),
        "actor/pg_clipfrac_lower": mean(d.clipped_dual),
        "actor/seq_clipfrac": mean(d.sequence_clipped_low | d.sequence_clipped_high),
        "actor/seq_clipfrac_low": mean(d.sequence_clipped_low),
        "actor/seq_clipfrac_high": mean(d.sequence_clipped_high),
    }
    levels = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
    quantiles = d.sequence_log_ratio.double().quantile(torch.tensor([*levels.values()]).double()).exp()
    return metrics | {f"actor/seq_ratio_{k}": float(q) for k, q in zip(levels, quantiles, strict=True)}
