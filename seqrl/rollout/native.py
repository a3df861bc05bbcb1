"""Our own decoding for Llama, Qwen2, Qwen3 and Qwen3-MoE, on a key-value cache, with the trainer's tensors.

Prompts are padded on the left, so that all rows write the same column of the cache at each step (a slice
write). Decoding attends with two batched products over the cache, which on CPU took a third of the time
of scaled_dot_product_attention for one query per row; prefill uses the latter.
Shape legend: B rows, T tokens a row, H hidden, Q and K query and key heads, D head size, L columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.rollout.decoding import DecodingEngine
from seqrl.rollout.experts import mixture
from seqrl.rollout.weights import Dense, Weights, read_weights

_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, in one forward pass; bounds the memory of its activations."""


class NativeEngine(DecodingEngine):
    """A `RolloutEngine` for the models `why_unreadable` has nothing against."""

    @contextmanager
    def _decoder(self, length: int) -> Iterator[NativeDecoder]:
        yield NativeDecoder(read_weights(self.model, self.dtype), length)


class NativeDecoder:
    """The forward pass over `weights`, for sequences of at most `length` tokens."""

    def __init__(self, weights: Weights, length: int) -> None:
        self.weights = weights
        self.length = length
        positions = torch.arange(length, device=weights.embedding.device)
        cos, sin = weights.rotary(weights.embedding[:1], positions[None])
        half = weights.head_dim // 2
        self.cos = cos[0]  # [length, D]
        # x rotated by half its size needs the first half of sin negated: -x2 sin | x1 sin.
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)  # [length, D]

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[NativeRows, Tensor]:
        """See `Decoder.prefill`. Prompts of similar length should be neighbours."""
        device = self.weights.embedding.device
        columns = max(map(len, prompts))
        pads = torch.tensor([columns - len(prompt) for prompt in prompts])  # [B]
        rows = NativeRows(self, pads.to(device), columns, capacity=columns)
        at_once = max(1, _PREFILL_TOKENS // columns)
        logits = []
        for start in range(0, len(prompts), at_once):
            chunk = slice(start, start + at_once)
            padded = [
                (0,) * pad + prompt for pad, prompt in zip(pads[chunk].tolist(), prompts[chunk], strict=True)
            ]
            logits.append(rows.fill(chunk, torch.tensor(padded, device=device)))
        return rows, torch.cat(logits)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The logits [B, V] after the last of `tokens` [B, T] at `positions` [B, T].

        `attend` takes a layer's index, q [B, T, Q, D] (scaled), k and v [B, T, K, D]; returns [B, T, Q D].
        """
        w = self.weights
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # [B, T, 1, D]
        x = w.embedding[tokens]  # [B, T, H]
        for i, layer in enumerate(w.layers):
            qkv = layer.qkv(layer.attention_norm(x)).unflatten(-1, (-1, w.head_dim))
            qk, v = qkv.split([w.heads + w.kv_heads, w.kv_heads], dim=2)
            if layer.qk_norm is not None:
                qk = layer.qk_norm(qk)
            qk = qk * cos + qk.roll(w.head_dim // 2, -1) * sin
            q, k = qk.to(v.dtype).split([w.heads, w.kv_heads], dim=2)
            x += layer.out(attend(i, q * w.head_dim**-0.5, k, v))
            normed = layer.mlp_norm(x)
            if isinstance(layer.mlp, Dense):
                x += layer.mlp(normed)
            else:
                x += mixture(layer.mlp, normed.flatten(0, 1)).view_as(x)
        return w.lm_head(w.norm(x[:, -1]))


class NativeRows:
    """The key-value cache of B rows, with room for `capacity` columns of which `columns` are filled.

    `pads` [B] counts the columns on the left of each row that hold no token.
    """

    def __init__(self, decoder: NativeDecoder, pads: Tensor, columns: int, capacity: int) -> None:
        w = decoder.weights
        self.decoder = decoder
        self.columns = columns
        self.group = w.heads // w.kv_heads  # query heads that share a key head
        shape = (len(pads), w.kv_heads, capacity, w.head_dim)
        like = w.lm_head.weight
        self.keys = [like.new_empty(shape) for _ in w.layers]
        self.values = [like.new_empty(shape) for _ in w.layers]
        self._set_pads(pads)

    def _set_pads(self, pads: Tensor) -> None:
        self.pads = pads
        columns = torch.arange(self.keys[0].shape[2], device=pads.device)
        hidden = columns < pads[:, None, None, None]
        self.mask = None  # [B, 1, 1, capacity], 0 or -inf
        if bool(hidden.any()):
            self.mask = torch.zeros(hidden.shape, device=pads.device).masked_fill_(hidden, -torch.inf)

    def fill(self, rows: slice, tokens: Tensor) -> Tensor:
        """Runs the padded prompts `tokens` [b, T] of `rows`; keeps their keys and values. Logits [b, V]."""
        pads = self.pads[rows, None]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        mask = None  # [b, 1, T, T], true where a query may look
        if self.mask is not None:
            # A padding query looks at itself, so that its softmax has something to sum.
            seen = (columns[None, :] <= columns[:, None]) & (columns >= pads)[:, None, :]
            mask = (seen | torch.eye(len(columns), dtype=torch.bool, device=tokens.device))[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            self.keys[layer][rows], self.values[layer][rows] = k, v
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=self.group > 1
            )
            return out.transpose(1, 2).flatten(2)

        return self.decoder.forward(tokens, (columns - pads).clamp(min=0), attend)

    def spread(self, rows: Tensor) -> NativeRows:
        """See `Rows.spread`."""
        copy = NativeRows(self.decoder, self.pads[rows], self.columns, self.decoder.length)
        for ours, theirs in zip(self.keys + self.values, copy.keys + copy.values, strict=True):
            theirs[:, :, : self.columns] = ours[rows]
        return copy

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows.step`."""
        column = self.columns
        self.columns += 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            batch, _, kv_heads, size = k.shape
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, column], values[:, :, column] = k[:, 0], v[:, 0]
            keys = keys.flatten(0, 1)[:, : self.columns]  # [B K, columns, D]
            values = values.flatten(0, 1)[:, : self.columns]
            scores = torch.bmm(q.reshape(batch * kv_heads, self.group, size), keys.transpose(1, 2))
            if self.mask is not None:
                scores.view(batch, -1, self.columns).add_(self.mask[:, 0, :, : self.columns])
            probs = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            return torch.bmm(probs.view(batch * kv_heads, self.group, -1), values).view(batch, 1, -1)

        return self.decoder.forward(tokens[:, None], (column - self.pads)[:, None], attend)

    def keep(self, rows: Tensor) -> None:
        """See `Rows.keep`."""
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        source, filled = rows[moved], self.columns
        for cache in (self.keys, self.values):
            for i, tensor in enumerate(cache):
                tensor[moved, :, :filled] = tensor[source, :, :filled]
                cache[i] = tensor[:count]
        self._set_pads(self.pads[rows])
