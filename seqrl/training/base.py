"""What the loop asks of a training engine, whatever it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "update_metrics",
]


@dataclass(frozen=True)
class Update:
    """What one optimizer step has to tell."""

    grad_norm: float
    """Before clipping; not finite where the step was skipped for it."""
    lr: float
    diagnostics: Diagnostics


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

    def ref_logprobs(self, batch: Batch) -> Tensor:
        """The same under the frozen reference."""

    def update(self, mini_batch: Batch, objective: Objective) -> Update:
        """One optimizer step on a mini-batch, micro-batch by micro-batch."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the weights: the policy version."""

    def state(self) -> EngineState: ...

    def load_state(self, state: EngineState) -> None: ...

    def save_pretrained(self, directory: Path) -> None:
        """Writes the policy and its tokenizer as a Hugging Face directory."""


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """The optimizer steps of one rollout batch as metrics."""
    diagnostics = [update.diagnostics for update in updates]
    return {
        **policy_metrics([d for d in diagnostics if isinstance(d, PolicyDiagnostics)]),
        "actor/grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "actor/lr": updates[-1].lr,
    }
