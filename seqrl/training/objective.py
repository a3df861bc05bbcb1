"""From log-probs to the one number that is minimised: surrogate, aggregation, KL, entropy.

This is the only place where training meets the algorithms. Prompt and masked tokens are taken out
here, before a loss sees them: whatever stands in their log-probs cannot reach a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from seqrl.algos.aggregate import AGGREGATIONS
from seqrl.algos.kl import KL_ESTIMATORS
from seqrl.algos.losses import LOSSES, SELECTIONS, Loss, Surrogate
from seqrl.algos.segments import segment_mean, segment_sum
from seqrl.config.functions import described, find
from seqrl.config.loss_keys import LOSS_MODE, PARAMETER_KEYS, aggregations, setting
from seqrl.config.schema import ActorConfig
from seqrl.errors import UserError
from seqrl.kernels import sent
from seqrl.types import Batch

ARGUMENTS = ("logprobs", "old_logprobs", "advantages", "offsets")


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
        """Lays the parts' tensors one behind the other."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def cpu(self) -> Self:
        return replace(self, **{f.name: getattr(self, f.name).cpu() for f in fields(self)})


@dataclass(frozen=True)
class PolicyDiagnostics(Diagnostics):
    """Per response token [T] and per sequence [N]."""

    policy_loss: Tensor
    """[1], the loss without its KL and entropy terms."""
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
    sequence_advantage: Tensor
    """[N], the mean of the response's token advantages."""
    sequence_clipped_low: Tensor
    sequence_clipped_high: Tensor
    """[N] bool: at least one token of the sequence is clipped."""


class Objective(Protocol):
    @property
    def needs_entropy_gradient(self) -> bool: ...

    @property
    def needs_full_kl(self) -> bool: ...

    def prepared(self, mini_batch: Batch) -> Batch:
        """With what has to be decided over the whole mini-batch, before it is split."""

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        part: Batch,
        counts: Counts,
        full_kl: Tensor | None = None,
    ) -> tuple[Tensor, Diagnostics]:
        """The share of `part`, a micro-batch on the host, in the loss of its mini-batch.

        Args:
            logprobs, entropy: [T] of the response tokens of `part`, on any device.
            counts: of the whole mini-batch.
            full_kl: [T], the divergence from the reference, under `needs_full_kl`.
        """


@dataclass(frozen=True)
class PolicyObjective:
    """Reinforcement learning: a policy loss, aggregated, with KL and entropy terms.

    Raises UserError for a loss that is not known or asks for a setting that is not there.
    """

    config: ActorConfig
    max_response_length: int
    """Tokens; the divisor of `seq-mean-token-sum-norm` where none is given."""
    _loss: Loss = field(init=False)
    _settings: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        mode = self.config.policy_loss.loss_mode
        loss = find(mode, LOSSES, LOSS_MODE)
        object.__setattr__(self, "_loss", loss)
        object.__setattr__(self, "_settings", _settings(loss, self.config, f"{LOSS_MODE}={mode}"))
        try:
            inspect.signature(loss).bind(*ARGUMENTS, **self._settings, **dict.fromkeys(_selected(mode)))
        except TypeError as error:
            raise UserError(
                f"{LOSS_MODE}={mode} cannot be called with {', '.join(ARGUMENTS)} and its settings "
                f"({error}); give it these four arguments, and its settings behind a *"
            ) from error

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.config.entropy_coeff != 0

    @property
    def needs_full_kl(self) -> bool:
        return self.config.use_kl_loss and self.config.kl_loss_type == "full"

    def prepared(self, mini_batch: Batch) -> Batch:
        select = SELECTIONS.get(self.config.policy_loss.loss_mode)
        if select is None:
            return mini_batch
        assert mini_batch.old_logprobs is not None and mini_batch.advantages is not None
        mask = mini_batch.response_mask
        chosen = select(
            mini_batch.old_logprobs[mask],
            mini_batch.advantages[mask],
            **_settings(select, self.config, LOSS_MODE),
        )
        return replace(mini_batch, selected=torch.zeros_like(mask).masked_scatter(mask, chosen))

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        part: Batch,
        counts: Counts,
        full_kl: Tensor | None = None,
    ) -> tuple[Tensor, PolicyDiagnostics]:
        actor, device = self.config, logprobs.device
        assert part.old_logprobs is not None and part.advantages is not None
        offsets, token = sent(part.response_offsets, device), part.response_mask.nonzero()[:, 0]

        def of_tokens(values: Tensor) -> Tensor:
            """[all tokens of the part] -> [T], where the log-probs are."""
            return sent(values.index_select(0, token), device)

        old_logprobs, advantages = of_tokens(part.old_logprobs), of_tokens(part.advantages)
        selected = {} if part.selected is None else {"selected": of_tokens(part.selected)}

        surrogate = self._surrogate(logprobs, old_logprobs, advantages, offsets, **selected)
        values = surrogate.values
        if part.weights is not None:
            values = values * of_tokens(part.weights)
        policy_loss = loss = self._aggregate(values, offsets, counts)
        kl = torch.zeros_like(logprobs)
        if actor.use_kl_loss:
            if self.needs_full_kl:
                assert full_kl is not None
                kl = full_kl
            else:
                assert part.ref_logprobs is not None
                kl = KL_ESTIMATORS[actor.kl_loss_type](logprobs, of_tokens(part.ref_logprobs))
            loss = loss + actor.kl_loss_coef * self._aggregate(kl, offsets, counts)
        if self.needs_entropy_gradient:
            loss = loss - actor.entropy_coeff * self._aggregate(entropy, offsets, counts)

        log_ratio = logprobs.detach() - old_logprobs
        return loss, PolicyDiagnostics(
            loss=loss.detach().reshape(1),
            entropy=entropy.detach(),
            policy_loss=policy_loss.detach().reshape(1),
            log_ratio=log_ratio,
            clipped_low=surrogate.clipped_low,
            clipped_high=surrogate.clipped_high,
            clipped_dual=surrogate.clipped_dual,
            kl=kl.detach(),
            sequence_log_ratio=segment_mean(log_ratio, offsets),
            sequence_advantage=segment_mean(advantages, offsets),
            sequence_clipped_low=segment_sum(surrogate.clipped_low.long(), offsets) > 0,
            sequence_clipped_high=segment_sum(surrogate.clipped_high.long(), offsets) > 0,
        )

    def _surrogate(self, logprobs: Tensor, *others: Tensor, **selected: Tensor) -> Surrogate:
        """What the loss says; one of a user's own may raise or give back anything."""
        mode = self.config.policy_loss.loss_mode
        if mode in LOSSES:
            return self._loss(logprobs, *others, **self._settings, **selected)
        try:
            surrogate: Any = self._loss(logprobs, *others, **self._settings)
        except Exception as error:
            raise UserError(f"{LOSS_MODE}={mode} raised {described(error)}") from error
        shape = tuple(logprobs.shape)
        given = surrogate if isinstance(surrogate, Surrogate) else None
        if given is None or any(tuple(getattr(given, f.name).shape) != shape for f in fields(given)):
            raise UserError(
                f"{LOSS_MODE}={mode} gave "
                f"{type(surrogate).__name__ if given is None else 'a Surrogate of other shapes'}; return a "
                "seqrl.algos.losses.Surrogate whose fields all have one value per response token, "
                f"{shape} here"
            )
        if logprobs.requires_grad and not given.values.requires_grad:
            raise UserError(f"{LOSS_MODE}={mode} gave values without a gradient; make them from `logprobs`")
        return given

    def _aggregate(self, values: Tensor, offsets: Tensor, counts: Counts) -> Tensor:
        own, *others = aggregations(self.config.policy_loss.loss_mode)
        # Under a loss that goes with one alone, as verl does; `no_effect` says so.
        mode = self.config.loss_agg_mode if self.config.loss_agg_mode in others else own
        scale = self.config.loss_scale_factor or self.max_response_length
        return AGGREGATIONS[mode](
            values, offsets, tokens=counts.tokens, sequences=counts.sequences, scale=scale
        )


def _selected(loss_mode: str) -> tuple[str, ...]:
    """What a loss with a selection is told besides its settings."""
    return ("selected",) if loss_mode in SELECTIONS else ()


def _settings(function: Any, actor: ActorConfig, origin: str) -> dict[str, Any]:
    """What the keyword-only parameters of a loss or a selection are to be: as the config says; where it says
    nothing, the function's own default."""
    settings = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in _selected(actor.policy_loss.loss_mode):
            continue
        value = setting(actor, name) if name in PARAMETER_KEYS else None
        required = parameter.default is parameter.empty
        if value is not None:
            settings[name] = value
        elif required and name in PARAMETER_KEYS:
            raise UserError(f"{origin} needs a value for {' or '.join(PARAMETER_KEYS[name])}, which is null")
        elif required:
            raise UserError(
                f"{origin} asks for the setting {name}, which is not there; give it a default, or use one of "
                f"{', '.join(PARAMETER_KEYS)}"
            )
    return settings


@dataclass(frozen=True)
class Likelihood:
    """Supervised fine-tuning: the mean negative log-likelihood of the response tokens."""

    needs_entropy_gradient: bool = False
    needs_full_kl: bool = False

    def prepared(self, mini_batch: Batch) -> Batch:
        return mini_batch

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        part: Batch,
        counts: Counts,
        full_kl: Tensor | None = None,
    ) -> tuple[Tensor, Diagnostics]:
        loss = -logprobs.sum() / max(counts.tokens, 1)
        return loss, Diagnostics(loss.detach().reshape(1), entropy.detach())


def policy_metrics(parts: Sequence[PolicyDiagnostics]) -> dict[str, float]:
    """The mini-batches of a step as metrics, under verl's names where it has them."""
    d = PolicyDiagnostics.merge(parts)

    def mean(values: Tensor) -> float:
        return float(values.float().mean()) if values.numel() else 0.0

    metrics = {
        "actor/pg_loss": float(d.policy_loss.sum()) / len(parts),
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
