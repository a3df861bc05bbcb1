"""Training in one process, on the CPU or one GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqrl.config.schema import OptimConfig
from seqrl.errors import UserError
from seqrl.kernels import sent
from seqrl.training.base import EngineState, Update
from seqrl.training.experts import expert_layers
from seqrl.training.forward import reads_prompts_in_place, response_routing
from seqrl.training.logprobs import TokenStatistics, response_statistics
from seqrl.training.objective import Counts, Diagnostics, Objective
from seqrl.training.optim import (
    clipped_step,
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    make_adamw,
    optimizer_tensors,
)
from seqrl.training.packing import Split, by_count
from seqrl.types import Batch


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
        logprob_split: Split | None = None,
        reference_split: Split | None = None,
        reference_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            total_steps: optimizer steps of the whole run, for the learning-rate schedule.
            temperature: log-probs are taken of logits divided by it.
            max_tokens: tokens per micro-batch; of a group's prompt once where its responses read it in place.
            micro_batch_size: sequences per micro-batch in updates instead, where not None.
            logprob_split, reference_split: how batches are cut for old log-probs and for those of the
                reference; None: by `max_tokens`.
            reference_dtype: what the reference is held in; None: what the policy is.
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
        self._update_split = Split(max_tokens, micro_batch_size)
        self._logprob_split = logprob_split or Split(max_tokens)
        self._reference_split = reference_split or Split(max_tokens)
        self._reference = None
        if with_reference:
            self._reference = copy.deepcopy(model).requires_grad_(False).to(reference_dtype or model.dtype)
        self._expert_layers = expert_layers(model)
        self._device = next(model.parameters()).device
        self._prompts_once = reads_prompts_in_place(model, compute_dtype)

    def logprobs(self, batch: Batch) -> Tensor:
        return self._no_grad_statistics(self.model, batch, self._logprob_split)[0]

    def logprobs_and_sum_pi_squared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logprobs, squares = self._no_grad_statistics(
            self.model, batch, self._logprob_split, sum_pi_squared=True
        )
        return logprobs, squares

    def ref_logprobs(self, batch: Batch) -> Tensor:
        assert self._reference is not None, "built without a reference model"
        return self._no_grad_statistics(self._reference, batch, self._reference_split)[0]

    def routing(self, batch: Batch) -> list[Tensor]:
        if not self._expert_layers:
            return []
        chosen: dict[int, list[Tensor]] = {}
        splits = self._logprob_split(batch, prompts_once=self._prompts_once)
        with torch.no_grad(), self._autocast():
            for indices in splits:
                part = batch.select(indices)
                for layer, experts in enumerate(response_routing(self.model, self._expert_layers, part)):
                    chosen.setdefault(layer, []).append(experts)
        return [torch.cat(parts) for parts in chosen.values()]

    def partition_error(self, mini_batch: Batch, objective: Objective, logprobs: Tensor) -> float:
        mini_batch = objective.prepared(mini_batch)
        half = -(-len(mini_batch) // 2)
        at_once, in_two = (
            self._gradient_of_logprobs(mini_batch, objective, logprobs, by_count(len(mini_batch), size))
            for size in (len(mini_batch), half)
        )
        smallest = torch.finfo(torch.float32).tiny
        return float((in_two - at_once).norm() / at_once.norm().clamp(min=smallest))

    def update(self, mini_batch: Batch, objective: Objective) -> Update:
        mini_batch = objective.prepared(mini_batch)
        lr = learning_rate(self._optim, self.steps_done, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        splits = self._update_split(mini_batch, prompts_once=self._prompts_once)
        parts = self._accumulate(mini_batch, objective, splits)
        norm = gradient_norm(self.model.parameters())
        self.steps_done += 1  # first: an optimizer step that fails half-way is not taken for none
        clipped_step(self.optimizer, norm, self._grad_clip)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(self.steps_done, norm, lr, type(parts[0]).merge(parts))

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

    def _accumulate(
        self, mini_batch: Batch, objective: Objective, splits: Sequence[Sequence[int]]
    ) -> list[Diagnostics]:
        """Adds the gradient of the mini-batch, micro-batch by micro-batch."""

        def ask_model(indices: Sequence[int], part: Batch) -> TokenStatistics:
            with self._autocast():
                return response_statistics(
                    self.model,
                    part,
                    temperature=self._temperature,
                    entropy=True,
                    entropy_gradient=objective.needs_entropy_gradient,
                    reference=self._reference if objective.needs_full_kl else None,
                )

        parts = []
        for loss, diagnostics in self._losses(mini_batch, objective, splits, ask_model):
            loss.backward()
            parts.append(diagnostics)
        return parts

    def _gradient_of_logprobs(
        self,
        mini_batch: Batch,
        objective: Objective,
        logprobs: Tensor,
        splits: Sequence[Sequence[int]],
    ) -> Tensor:
        """The loss's gradient with respect to log-prob, entropy and full KL of each response token of the
        micro-batches in turn, [R, 3], where the policy says `logprobs` [T]: no forward is taken."""
        leaves: list[Tensor] = []

        def say_logprobs(indices: Sequence[int], part: Batch) -> TokenStatistics:
            now = sent(logprobs[mini_batch.response_token_index(indices)], self._device)
            leaves.append(torch.stack([now, -now, now.square()], dim=1).requires_grad_())
            said, entropy, full_kl = leaves[-1].unbind(1)
            return TokenStatistics(said, entropy=entropy, full_kl=full_kl)

        losses = self._losses(mini_batch, objective, splits, say_logprobs)
        return torch.cat([torch.autograd.grad(loss, leaves[-1])[0] for loss, _ in losses])

    def _losses(
        self,
        mini_batch: Batch,
        objective: Objective,
        splits: Sequence[Sequence[int]],
        statistics: Callable[[Sequence[int], Batch], TokenStatistics],
    ) -> Iterator[tuple[Tensor, Diagnostics]]:
        """Each micro-batch's share of the loss, given what `statistics` says of its response tokens."""
        counts = Counts.of(mini_batch)
        for indices in splits:
            part = mini_batch.select(indices)
            said = statistics(indices, part)
            assert said.entropy is not None
            yield objective(said.logprobs, said.entropy, part, counts, said.full_kl)

    def _no_grad_statistics(
        self, model: Any, batch: Batch, split: Split, *, sum_pi_squared: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [T], and sum of squared probabilities [T] where asked for; 0 outside the responses."""
        splits = split(batch, prompts_once=self._prompts_once)
        with torch.no_grad(), self._autocast():
            parts = [
                response_statistics(
                    model,
                    batch.select(indices),
                    temperature=self._temperature,
                    sum_pi_squared=sum_pi_squared,
                )
                for indices in splits
            ]
        logprobs, squares = torch.zeros(2, batch.tokens.numel())
        for indices, said in zip(splits, parts, strict=True):  # a device is waited for here, and not before
            at = batch.response_token_index(indices)
            logprobs[at] = said.logprobs.cpu()
            if said.sum_pi_squared is not None:
                squares[at] = said.sum_pi_squared.cpu()
        return logprobs, squares

    def _autocast(self) -> AbstractContextManager[None]:
        enabled = self._compute_dtype != torch.float32
        return torch.autocast(self._device.type, self._compute_dtype, enabled=enabled)
