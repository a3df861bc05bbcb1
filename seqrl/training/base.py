"""What the loop asks of a training engine, whatever it runs on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from seqrl.training.objective import (
    Diagnostics,
    Likelihood,
    Objective,
    PolicyDiagnostics,
    PolicyObjective,
    policy_metrics,
)
from seqrl.types import Batch

__all__ = [
    "EngineState",
    "Likelihood",
    "Objective",
    "PolicyObjective",
    "TrainingEngine",
    "Update",
    "fetched",
    "update_metrics",
    "update_ratios",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one optimizer step has to tell; where it was taken, until it is `fetched`."""

    step: int
    """Optimizer steps taken by then, this one included."""
    norm: Tensor
    """[], of the gradient before clipping; not finite where the step was skipped for it."""
    lr: float
    diagnostics: Diagnostics

    @property
    def grad_norm(self) -> float:
        """`norm` as a number, for which the device is waited."""
        return float(self.norm)


@dataclass(frozen=True)
class EngineState:
    """What a later process needs to go on bit by bit."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    """JSON."""


class TrainingEngine(Protocol):
    """Holds the policy, its optimizer and, where one is needed, the frozen reference."""

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probs of the response tokens under the policy: [T], 0 outside the responses."""

    def logprobs_and_sum_pi_squared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and the sum over the vocabulary of squared probabilities; both [T]."""

    def ref_logprobs(self, batch: Batch) -> Tensor:
        """The log-probs under the frozen reference."""

    def routing(self, batch: Batch) -> list[Tensor]:
        """The experts that each response token is sent to: for each mixture-of-experts layer a tensor
        [response tokens, experts per token], the tokens in an order that depends on `batch` alone; none
        for a dense model."""

    def partition_error(self, mini_batch: Batch, objective: Objective, logprobs: Tensor) -> float:
        """How far the gradient of a mini-batch taken at once is from that of its halves, relative to its
        norm, where the policy says `logprobs` [T]: with respect to these, token by token. No step is
        taken."""

    def update(self, mini_batch: Batch, objective: Objective) -> Update:
        """One optimizer step on a mini-batch, micro-batch by micro-batch. A device may still be at it when
        this returns, see `fetched`."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the weights: the policy version."""

    def state(self) -> EngineState: ...

    def load_state(self, state: EngineState) -> None: ...

    def save_pretrained(self, directory: Path) -> None:
        """Writes the policy and its tokenizer as a Hugging Face directory."""


def fetched(updates: Iterable[Update]) -> list[Update]:
    """The same on the host, all taken before any is asked for: a device that still computes is waited for
    once. Says which steps were skipped."""
    taken = list(updates)
    here = [replace(u, norm=u.norm.cpu(), diagnostics=u.diagnostics.cpu()) for u in taken]
    for update in here:
        if not math.isfinite(update.grad_norm):
            _log.warning("optimizer step %d skipped: gradient norm %s", update.step, update.grad_norm)
    return here


def update_ratios(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """log s_i [N] and advantages [N] of the responses of these optimizer steps, as each was trained on."""
    parts = [u.diagnostics for u in updates if isinstance(u.diagnostics, PolicyDiagnostics)]
    merged = PolicyDiagnostics.merge(parts)
    return merged.sequence_log_ratio, merged.sequence_advantage


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """The optimizer steps of one rollout batch as metrics."""
    diagnostics = [update.diagnostics for update in updates]
    return {
        **policy_metrics([d for d in diagnostics if isinstance(d, PolicyDiagnostics)]),
        "actor/grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "actor/lr": updates[-1].lr,
    }
