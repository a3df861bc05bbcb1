"""Decoding for any causal language model, by its own transformers forward and a dynamic cache.

The same loop, draws and seeds as native decoding; only the forward pass is the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from seqrl.rollout.decoding import DecodingEngine, SteppingDecoder


class TransformersEngine(DecodingEngine):
    """A `RolloutEngine` for a model without native decoding."""

    def _decoder(self, rows: int, prompts: int, prompt_length: int, new_tokens: int) -> TransformersDecoder:
        return TransformersDecoder(self.model, self.dtype)


class TransformersDecoder(SteppingDecoder):
    """The forward pass of `model`, its matrix products in `dtype`, and the cache of B rows."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model.device)
        self.model = model
        self.dtype = dtype
        self.accepted = inspect.signature(model.forward).parameters
        self.cache: Any = None
        self.real = torch.empty(0)  # [B, columns], 0 on padding

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.admit`."""
        from transformers import DynamicCache

        columns, device = max(map(len, prompts)), self.model.device
        padded = [(0,) * (columns - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.cache = DynamicCache(config=self.model.config)
        self.real = torch.tensor(real, device=device)
        logits = self._run(torch.tensor(padded, device=device))
        each = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).tolist()
        self.keep(each)
        return logits[each]

    def step(self, tokens: Tensor) -> Tensor:
        """See `SteppingDecoder.step`."""
        self.real = torch.cat([self.real, self.real.new_ones(len(self.real), 1)], dim=1)
        return self._run(tokens[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`; `admit` repeats rows with it, too."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.cache.reorder_cache(index)
        self.real = self.real[index]

    def _run(self, tokens: Tensor) -> Tensor:
        """Runs the last columns, `tokens` [B, T]. Logits [B, V] after the last."""
        positions = (self.real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        autocast = self.dtype != self.model.dtype and self.dtype != torch.float32
        with (
            _in_evaluation(self.model),
            torch.autocast(tokens.device.type, self.dtype) if autocast else nullcontext(),
        ):
            output = self.model(
                input_ids=tokens,
                attention_mask=self.real,
                past_key_values=self.cache,
                use_cache=True,
                **{name: value for name, value in optional.items() if name in self.accepted},
            )
        return output.logits[:, -1]


@contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    """Dropout would blur the log-probs, and gradient checkpointing in training mode would drop the cache.
    Each module gets its flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
