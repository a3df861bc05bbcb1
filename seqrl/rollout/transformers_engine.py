"""Decoding for any causal language model, by its own transformers forward and a dynamic cache.

The same waves, draws and seeds as native decoding; only the forward pass is the model's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from seqrl.rollout.decoding import DecodingEngine


class TransformersEngine(DecodingEngine):
    """A `RolloutEngine` for a model without native decoding.

    The model is in evaluation mode for the time of a call: dropout would blur the log-probs, and
    gradient checkpointing in training mode would drop the cache. Each module gets its flag back.
    """

    @contextmanager
    def _decoder(self, length: int) -> Iterator[TransformersDecoder]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield TransformersDecoder(self.model, self.dtype)
        finally:
            for module in training:
                module.training = True


class TransformersDecoder:
    """The forward pass of `model`, its matrix products in `dtype`."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.accepted = inspect.signature(model.forward).parameters

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[TransformersRows, Tensor]:
        """See `Decoder.prefill`."""
        from transformers import DynamicCache

        columns = max(map(len, prompts))
        padded = [(0,) * (columns - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        rows = TransformersRows(
            self, DynamicCache(config=self.model.config), torch.tensor(real, device=device)
        )
        return rows, rows.run(torch.tensor(padded, device=device))

    def forward(self, tokens: Tensor, real: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] after the last of `tokens` [B, T]; `real` [B, columns] is 0 on padding."""
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        autocast = self.dtype != self.model.dtype and self.dtype != torch.float32
        with torch.autocast(tokens.device.type, self.dtype) if autocast else nullcontext():
            output = self.model(
                input_ids=tokens,
                attention_mask=real,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in optional.items() if name in self.accepted},
            )
        return output.logits[:, -1]


class TransformersRows:
    """The cache of B rows; `real` [B, columns] is 0 on padding."""

    def __init__(self, decoder: TransformersDecoder, cache: Any, real: Tensor) -> None:
        self.decoder = decoder
        self.cache = cache
        self.real = real

    def run(self, tokens: Tensor) -> Tensor:
        """Runs the last columns, `tokens` [B, T]. Logits [B, V]."""
        return self.decoder.forward(tokens, self.real, self.cache)

    def spread(self, rows: Tensor) -> TransformersRows:
        """See `Rows.spread`."""
        spread = TransformersRows(self.decoder, copy.deepcopy(self.cache), self.real)
        spread.keep(rows)
        return spread

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows.step`."""
        self.real = torch.cat([self.real, self.real.new_ones(len(self.real), 1)], dim=1)
        return self.run(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """See `Rows.keep`."""
        self.cache.reorder_cache(rows)
        self.real = self.real[rows]
