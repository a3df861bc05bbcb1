"""Our own decoding for Llama, Qwen2, Qwen3 and Qwen3-MoE, with the trainer's tensors.

On a CPU a prompt's keys and values are held once for all responses to it, each response grows in a place of
its own, and a place that becomes free is taken by the next (`CachedDecoder`). Where there is no C for it,
on CUDA above all, rows are padded on the left and attend with torch's own operations (`padded.py`).

Shape legend: B rows, T tokens, Q and K query and key heads, D head size, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.kernels import Cache, Spans, attend, attend_cached, fits, recurring, turned
from seqrl.native.forward import hidden_states
from seqrl.native.weights import Layer, Weights, read_weights
from seqrl.rollout.decoding import Decoder, DecodingEngine
from seqrl.rollout.padded import PaddedDecoder

_PREFILL_TOKENS = 8192
"""Prompt tokens in one forward pass; bounds the memory of its activations."""


class NativeEngine(DecodingEngine):
    """A `RolloutEngine` for the models `why_unreadable` has nothing against."""

    def _decoder(self, rows: int, prompt_length: int, new_tokens: int) -> Decoder:
        w = read_weights(self.model, self.dtype, length=prompt_length + new_tokens, pack=True)
        stream = w.embedding
        if fits(stream.dtype, self.dtype, stream.device, stream.shape[1], w.turn.size // 2):
            return CachedDecoder(w, rows, prompt_length, new_tokens)
        return PaddedDecoder(w)


class CachedDecoder:
    """Decoding of at most `rows` rows at once, of prompts and responses of at most so many tokens."""

    joins = True

    def __init__(self, weights: Weights, rows: int, prompt_length: int, new_tokens: int) -> None:
        self.weights = weights

        def caches(columns: int) -> list[Cache]:
            sizes = (rows, columns, weights.turn.kv_heads, weights.turn.size, weights.dtype)
            return [Cache.of(*sizes) for _ in weights.layers]

        self.prompts, self.own = caches(prompt_length), caches(new_tokens)
        self.prompt_columns = torch.zeros(rows, dtype=torch.long)
        """Of each prompt in `prompts`."""
        self.free_prompts, self.free = list(range(rows)), list(range(rows))
        self.prompt = self.slot = self.columns = torch.empty(0, dtype=torch.long)
        """[B]: where each row's prompt lies, where its own columns lie, and how many it has of these."""

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.admit`."""
        places, self.free_prompts = self.free_prompts[: len(prompts)], self.free_prompts[len(prompts) :]
        place, lengths = torch.tensor(places), torch.tensor([len(prompt) for prompt in prompts])
        self.prompt_columns[place] = lengths
        parts = (lengths.cumsum(0) - 1) // _PREFILL_TOKENS
        logits = []
        for part in parts.unique():
            chosen = (parts == part).nonzero()[:, 0]
            logits.append(self._prefill([prompts[i] for i in chosen.tolist()], place[chosen]))
        each = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
        slots, self.free = self.free[: len(each)], self.free[len(each) :]
        self.prompt = torch.cat([self.prompt, place[each]])
        self.slot = torch.cat([self.slot, torch.tensor(slots)])
        self.columns = torch.cat([self.columns, torch.zeros_like(each)])
        return torch.cat(logits)[each]

    def _prefill(self, prompts: Sequence[tuple[int, ...]], place: Tensor) -> Tensor:
        """Reads prompts into their places [P]. Logits [P, V] after their last tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends, nobody = lengths.cumsum(0), torch.zeros_like(lengths)
        spans = Spans(nobody, nobody, ends - lengths, lengths)
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        column = torch.arange(len(tokens)) - (ends - lengths).repeat_interleave(lengths)
        slot = place.repeat_interleave(lengths)
        tokens, positions = _filled_up(tokens), _filled_up(column)

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = turned(qkv, positions, self.weights.turn, layer.q_norm, layer.k_norm)
            self.prompts[index].append(k, v, slot, column)
            return attend(q, k, v, spans)[0].flatten(1)

        hidden = hidden_states(self.weights, tokens, attention)
        return self.weights.lm_head(hidden[_filled_up(ends - 1)])[: len(prompts)]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        positions, columns = self.prompt_columns[self.prompt] + self.columns, self.columns + 1
        rows = len(tokens)
        tokens, positions = _filled_up(tokens), _filled_up(positions)

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = turned(qkv, positions, self.weights.turn, layer.q_norm, layer.k_norm)
            own = self.own[index]
            own.append(k, v, self.slot, self.columns)
            return attend_cached(
                q, self.prompts[index], self.prompt, self.prompt_columns, own, self.slot, columns
            )

        logits = self.weights.lm_head(hidden_states(self.weights, tokens, attention))[:rows]
        self.columns = columns
        return logits

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        before = set(self.prompt.tolist()), set(self.slot.tolist())
        self.prompt, self.slot, self.columns = self.prompt[rows], self.slot[rows], self.columns[rows]
        self.free_prompts += before[0] - set(self.prompt.tolist())
        self.free += before[1] - set(self.slot.tolist())


def _filled_up(x: Tensor) -> Tensor:
    """`x` [B], and zeros for rows without a place up to a number of rows that comes again."""
    return F.pad(x, (0, recurring(len(x), x.device) - len(x)))
