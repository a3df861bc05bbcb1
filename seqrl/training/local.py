"""Training in one process, on the CPU or one GPU."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqrl.config.schema import OptimConfig
from seqrl.errors import UserError
from seqrl.training.base import EngineState, Update
from seqrl.training.logprobs import response_logprobs
from seqrl.training.objective import Counts, Diagnostics, Objective
from seqrl.training.optim import learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors
from seqrl.training.packing import by_count, by_tokens
from seqrl.types import Batch

logger = logging.getLogger(__name__)


class LocalEngine:
    """One model, its optimizer, and a frozen copy of it where a reference is needed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        optim: OptimConfig,
        total_steps: int,
        grad_clip: float,
        temperature: float,
        compute_dtype: torch.dtype,
        max_tokens: int,
        micro_batch_size: int | None,
        with_reference: bool,
    ) -> None:
        """
        Args:
            total_steps: optimizer steps of the whole run, for the learning-rate schedule.
            temperature: log-probs are taken of logits divided by it.
            max_tokens: tokens per micro-batch.
            micro_batch_size: sequences per micro-batch in updates instead, where not None.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer = make_adamw(model, optim)
        self.steps_done = 0
        self._optim = optim
        self._total_steps = total_steps
        self._grad_clip = grad_clip
        self._temperature = temperature
        self._compute_dtype = compute_dtype
        self._max_tokens = max_tokens
        self._micro_batch_size = micro_batch_size
        self._reference = copy.deepcopy(model).requires_grad_(False) if with_reference else None
        self._device = next(model.parameters()).device

    def logprobs(self, batch: Batch) -> Tensor:
        return self._logprobs_of(self.model, batch)

    def ref_logprobs(self, batch: Batch) -> Tensor:
        assert self._reference is not None, "built without a reference model"
        return self._logprobs_of(self._reference, batch)

    def update(self, mini_batch: Batch, objective: Objective) -> Update:
        counts = Counts.of(mini_batch)
        lr = learning_rate(self._optim, self.steps_done, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts: list[Diagnostics] = []
        for part in self._micro_batches(mini_batch):
            with self._autocast():
                logprobs, entropy = response_logprobs(
                    self.model,
                    part,
                    temperature=self._temperature,
                    entropy_gradient=objective.needs_entropy_gradient,
                )
            loss, diagnostics = objective(logprobs, entropy, part, counts)
            loss.backward()
            parts.append(diagnostics)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        self.steps_done += 1  # first: an optimizer step that fails half-way is not taken for none
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            logger.warning("optimizer step %d skipped: gradient norm %s", self.steps_done, float(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return Update(float(norm), lr, type(parts[0]).merge(parts))

    def state(self) -> EngineState:
        return EngineState(
            model=self.model.state_dict(),
            optimizer=optimizer_tensors(self.model, self.optimizer),
            extra={"optimizer_steps": self.steps_done},
        )

    def load_state(self, state: EngineState) -> None:
        self._check_fit(state)
        self.model.load_state_dict(dict(state.model))
        load_optimizer_tensors(self.model, self.optimizer, state.optimizer)
        self.steps_done = state.extra["optimizer_steps"]

    def save_pretrained(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _check_fit(self, state: EngineState) -> None:
        ours = {name: tuple(x.shape) for name, x in self.model.state_dict().items()}
        theirs = {name: tuple(x.shape) for name, x in state.model.items()}
        if unlike := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
            raise UserError(
                f"the checkpoint is of another model than actor_rollout_ref.model.path: {unlike[0]} is "
                f"{theirs.get(unlike[0], 'missing')} there and {ours.get(unlike[0], 'missing')} here; resume "
                "with the model the run began with, or choose another trainer.default_local_dir"
            )

    def _logprobs_of(self, model: Any, batch: Batch) -> Tensor:
        result = torch.zeros(batch.tokens.numel())
        with torch.no_grad(), self._autocast():
            for indices in by_tokens(batch.lengths.tolist(), self._max_tokens):
                part = batch.select(indices).to(self._device)
                logprobs, _ = response_logprobs(model, part, temperature=self._temperature)
                result[batch.response_token_index(indices)] = logprobs.cpu()
        return result

    def _micro_batches(self, mini_batch: Batch) -> Iterator[Batch]:
        if self._micro_batch_size is None:
            splits = by_tokens(mini_batch.lengths.tolist(), self._max_tokens)
        else:
            splits = by_count(len(mini_batch), self._micro_batch_size)
        for indices in splits:
            yield mini_batch.select(indices).to(self._device)

    def _autocast(self) -> AbstractContextManager[None]:
        enabled = self._compute_dtype != torch.float32
        return torch.autocast(self._device.type, self._compute_dtype, enabled=enabled)
