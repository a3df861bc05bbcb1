"""Native decoding with torch's own operations, on any device: rows padded on the left, so that all write the
same column of the cache at each step (a slice write).

Shape legend: B rows, T tokens a row, Q and K query and key heads, D head size, L columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.kernels import turned
from seqrl.native.forward import hidden_states
from seqrl.native.weights import Layer, Weights

_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, in one forward pass; bounds the memory of its activations."""
_LEAST_BLOCK = 32
"""Columns the cache grows by, or a quarter of what it holds."""


class PaddedDecoder:
    """The key-value cache of B rows, as blocks of columns, each contiguous: the prompts, then what grows."""

    joins = False

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.group = weights.turn.heads // weights.turn.kv_heads  # query heads that share a key head
        self.columns = 0  # filled
        self.pads = torch.empty(0)  # [B], columns on the left of each row that hold no token
        self.keys: list[list[Tensor]] = []  # per layer, blocks [B, K, C, D]
        self.values: list[list[Tensor]] = []
        self.mask = torch.empty(0)  # [B, 1, all C], 0 where to look, else -inf

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.admit`. Prompts of similar length should be neighbours."""
        device = self.weights.embedding.device
        self.columns = columns = max(map(len, prompts))
        pads = torch.tensor([columns - len(prompt) for prompt in prompts])  # [P]
        self.pads = pads.to(device)
        self.keys = [[] for _ in self.weights.layers]
        self.values = [[] for _ in self.weights.layers]
        self.mask = torch.empty(len(prompts), 1, 0, device=device)
        self._grow(columns)
        at_once = max(1, _PREFILL_TOKENS // columns)
        logits = []
        for start in range(0, len(prompts), at_once):
            chunk = slice(start, start + at_once)
            padded = [
                (0,) * pad + prompt for pad, prompt in zip(pads[chunk].tolist(), prompts[chunk], strict=True)
            ]
            logits.append(self._fill(chunk, torch.tensor(padded, device=device)))
        each = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(device)
        self.keep(each)
        return torch.cat(logits)[each]

    def _grow(self, columns: int) -> None:
        """Appends an empty block of so many columns. It is zeros: hidden values still enter a product."""
        w = self.weights
        shape = (len(self.pads), w.turn.kv_heads, columns, w.turn.size)
        for blocks in self.keys + self.values:
            blocks.append(torch.zeros(shape, dtype=w.dtype, device=self.pads.device))
        self.mask = F.pad(self.mask, (0, columns), value=-torch.inf)

    def _fill(self, rows: slice, tokens: Tensor) -> Tensor:
        """Runs the padded prompts `tokens` [b, C] of `rows` into the first block. Returns logits [b, V]."""
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        pads = self.pads[rows, None]
        real = columns >= pads  # [b, C]
        # A padding query looks at itself, so that its softmax has something to sum.
        itself = torch.eye(len(columns), dtype=torch.bool, device=tokens.device)
        mask = ((real[:, None] & (columns <= columns[:, None])) | itself)[:, None]  # [b, 1, C, C]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            self.keys[layer][0][rows], self.values[layer][0][rows] = k, v
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.group > 1)
            return out.transpose(1, 2)

        self.mask[rows, 0] = self.mask[rows, 0].masked_fill(real, 0)
        return self._logits(tokens, (columns - pads).clamp(min=0), attend)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        if self.columns == self.mask.shape[-1]:
            self._grow(max(_LEAST_BLOCK, self.columns // 4))
        widths = [block.shape[2] for block in self.keys[0]]
        place = self.columns - sum(widths[:-1])  # in the last block
        self.mask[:, :, self.columns] = 0

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Two batched products over the cache: one query per row is too little for fused attention.
            batch, _, kv_heads, size = k.shape
            keys, values = self.keys[layer], self.values[layer]
            keys[-1][:, :, place], values[-1][:, :, place] = k[:, 0], v[:, 0]
            q = (q * size**-0.5).reshape(batch * kv_heads, self.group, size)
            parts = [torch.bmm(q, block.flatten(0, 1).transpose(1, 2)) for block in keys]
            scores = torch.cat(parts, dim=-1).view(batch, -1, self.mask.shape[-1]).add_(self.mask)
            wide = torch.promote_types(v.dtype, torch.float32)
            probs = scores.softmax(-1, dtype=wide).to(v.dtype).view(len(q), self.group, -1)
            outs = [
                torch.bmm(part, block.flatten(0, 1))
                for part, block in zip(probs.split(widths, dim=-1), values, strict=True)
            ]
            return sum(outs[1:], outs[0])

        positions = (self.columns - self.pads)[:, None]
        self.columns += 1
        return self._logits(tokens[:, None], positions, attend)

    def _logits(
        self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The logits [B, V] after the last of `tokens` [B, T] at `positions` [B, T].

        `attend` takes a layer's index, q [B, T, Q, D], k and v [B, T, K, D]; returns [B, T, Q, D] or what
        reshapes to it.
        """
        w, at = self.weights, positions.flatten()

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = turned(qkv, at, w.turn, layer.q_norm, layer.k_norm)
            q, k, v = (x.unflatten(0, tokens.shape) for x in (q, k, v))
            return attend(index, q, k, v).reshape(len(at), -1)

        hidden = hidden_states(w, tokens.flatten(), attention)
        return w.lm_head(hidden.view(*tokens.shape, -1)[:, -1])

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`; `admit` repeats rows with it, too."""
        for blocks in self.keys + self.values:
            blocks[:] = [block[rows] for block in blocks]
        self.pads, self.mask = self.pads[rows], self.mask[rows]
