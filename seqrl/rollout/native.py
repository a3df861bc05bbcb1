"""Our own decoding for Llama, Qwen2, Qwen3 and Qwen3-MoE, with the trainer's tensors.

On a CPU a prompt's keys and values are held once for all responses to it, each response grows in a place of
its own, and a place that becomes free is taken by the next (`CachedDecoder`). Where there is no C for it,
on CUDA above all, keys and values lie in pages (`paged.py`).

Shape legend: B rows, T tokens, Q and K query and key heads, D head size, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqrl.kernels import FLASH_PAGE, Cache, Spans, attend, attend_cached, filled_up, fits, turned
from seqrl.native.forward import hidden_states
from seqrl.native.weights import Copies, Layer, Weights, read_weights
from seqrl.rollout.decoding import Decoder, DecodingEngine, SteppingDecoder
from seqrl.rollout.graphs import Capture, CudaCapture
from seqrl.rollout.layers import LayersInC
from seqrl.rollout.paged import PagedDecoder, pages_are_fast
from seqrl.types import Prompt, Rollout, SamplingParams

_PREFILL_TOKENS = 8192
"""Prompt tokens in one forward pass; bounds the memory of its activations."""
_FIRST_COLUMNS = 128
"""Columns of a response that there is room for at first; twice as many whenever one needs more."""
_KEPT_SHARE = 0.3
"""Most of a GPU's memory that pages and graphs keep for the next call. What is more is needed for training,
and beside a rollout that fills so much the seconds of capturing anew are few."""


class Kept(NamedTuple):
    """What graphs read and write, as long as it stays where it is."""

    decoder: PagedDecoder
    copies: Copies
    columns: int
    """Of prompt and response that there is room for."""
    weights: tuple[int, ...]
    """Addresses of the model's."""


class NativeEngine(DecodingEngine):
    """A `RolloutEngine` for the models `why_unreadable` has nothing against."""

    graphs = True
    """Whether CUDA graphs are captured, where they can be."""
    _kept: Kept | None = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, policy_version: int
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        made = super().generate(prompts, sampling, seed=seed, policy_version=policy_version)
        if self._kept is not None and self._kept.decoder.pages.share > _KEPT_SHARE:
            self._kept = None
        return made

    def _decoder(self, rows: int, prompts: int, prompt_length: int, new_tokens: int) -> Decoder:
        columns = prompt_length + new_tokens
        if self.graphs and self._can_capture():
            return self._captured(rows, columns)
        w = read_weights(self.model, self.dtype, length=columns, keep=True)
        stream = w.embedding
        if fits(stream.dtype, self.dtype, stream.device, stream.shape[1], w.turn.size // 2):
            return CachedDecoder(w, rows, prompts, prompt_length, new_tokens)
        return PagedDecoder(w, rows, columns)

    def _can_capture(self) -> bool:
        size = self.model.model.layers[0].self_attn.head_dim
        return pages_are_fast(self.model.model.embed_tokens.weight, self.dtype, size)

    def _capture(self) -> Capture:
        return CudaCapture()

    def _captured(self, rows: int, columns: int) -> PagedDecoder:
        """The decoder of the call before, with its graphs, as long as it is large enough."""
        kept, weights = self._kept, tuple(x.data_ptr() for x in self.model.parameters())
        if kept is not None:
            rows, columns = max(rows, kept.decoder.capacity), max(columns, kept.columns)
        if kept is None or (rows, columns, weights) != (kept.decoder.capacity, kept.columns, kept.weights):
            kept = self._kept = None  # before another takes memory
            columns = -(-columns // FLASH_PAGE) * FLASH_PAGE  # prompts of the next call may be longer
            copies = Copies()
            w = read_weights(self.model, self.dtype, length=columns, copies=copies)
            self._kept = Kept(PagedDecoder(w, rows, columns, self._capture()), copies, columns, weights)
            return self._kept.decoder
        read_weights(self.model, self.dtype, length=columns, copies=kept.copies)
        kept.decoder.begin()
        return kept.decoder


class Latest(NamedTuple):
    """The prompt that was read last; more responses to it may be waiting for a place."""

    tokens: tuple[int, ...]
    place: int
    logits: Tensor
    """[1, V], that follow it."""


class CachedDecoder(SteppingDecoder):
    """Decoding of at most `rows` rows at once, of so many prompts, and of prompts and responses of at most so
    many tokens."""

    joins = True

    def __init__(
        self, weights: Weights, rows: int, prompts: int, prompt_length: int, new_tokens: int
    ) -> None:
        super().__init__(weights.embedding.device)
        self.weights = weights
        self.capacity, self.new_tokens = rows, new_tokens
        places = min(prompts, rows + 1)  # those of the rows, and the latest

        def caches(slots: int, columns: int) -> list[Cache]:
            sizes = (slots, columns, weights.turn.kv_heads, weights.turn.size, weights.dtype)
            return [Cache.of(*sizes) for _ in weights.layers]

        self.prompts, self.own = caches(places, prompt_length), caches(rows, min(new_tokens, _FIRST_COLUMNS))
        self.prompt_columns = torch.zeros(places, dtype=torch.long)
        """Of each prompt in `prompts`."""
        self.free_prompts, self.free = list(range(places)), list(range(rows))
        self.latest: Latest | None = None
        self.prompt = self.slot = self.columns = torch.empty(0, dtype=torch.long)
        """[B]: where each row's prompt lies, where its own columns lie, and how many it has of these."""
        self._layers_in_c = self._in_c()

    def _in_c(self) -> LayersInC | None:
        """For the caches as they are now."""
        if not LayersInC.fit(self.weights):
            return None
        return LayersInC(self.weights, self.capacity, self.prompts, self.own)

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.admit`. A prompt whose responses do not all join at once is read once all the same."""
        known = self.latest if self.latest is not None and self.latest.tokens == prompts[0] else None
        place, logits = self._read(prompts if known is None else prompts[1:])
        if known is not None:
            place, logits = torch.cat([torch.tensor([known.place]), place]), torch.cat([known.logits, logits])
        before = self.latest
        self.latest = Latest(prompts[-1], int(place[-1]), logits[-1:].clone())
        each = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
        slots, self.free = self.free[: len(each)], self.free[len(each) :]
        self.prompt = torch.cat([self.prompt, place[each]])
        self.slot = torch.cat([self.slot, torch.tensor(slots)])
        self.columns = torch.cat([self.columns, torch.zeros_like(each)])
        if before is not None:
            self._free_prompts({before.place})
        return logits[each]

    def _free_prompts(self, places: set[int]) -> None:
        """Gives back those of `places` that no row looks at and no response may join."""
        held = set(self.prompt.tolist()) | ({self.latest.place} if self.latest is not None else set())
        self.free_prompts += places - held

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """The places [P] that these prompts get, and the logits [P, V] that follow them."""
        places, self.free_prompts = self.free_prompts[: len(prompts)], self.free_prompts[len(prompts) :]
        place = torch.tensor(places, dtype=torch.long)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        self.prompt_columns[place] = lengths
        parts = (lengths.cumsum(0) - 1) // _PREFILL_TOKENS
        logits = [self.weights.embedding.new_empty(0, self.weights.vocabulary, dtype=self.weights.dtype)]
        for part in parts.unique():
            chosen = (parts == part).nonzero()[:, 0]
            logits.append(self._prefill([prompts[i] for i in chosen.tolist()], place[chosen]))
        return place, torch.cat(logits)

    def _prefill(self, prompts: Sequence[tuple[int, ...]], place: Tensor) -> Tensor:
        """Reads prompts into their places [P]. Logits [P, V] after their last tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends, nobody = lengths.cumsum(0), torch.zeros_like(lengths)
        spans = Spans(nobody, nobody, ends - lengths, lengths)
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        column = torch.arange(len(tokens)) - (ends - lengths).repeat_interleave(lengths)
        slot = place.repeat_interleave(lengths)
        tokens, positions = filled_up(tokens), filled_up(column)

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = turned(qkv, positions, self.weights.turn, layer.q_norm, layer.k_norm)
            self.prompts[index].append(k, v, slot, column)
            return attend(q, k, v, spans)[0].flatten(1)

        hidden = hidden_states(self.weights, tokens, attention)
        return self.weights.lm_head(hidden[filled_up(ends - 1)])[: len(prompts)]

    def step(self, tokens: Tensor) -> Tensor:
        """See `SteppingDecoder.step`."""
        positions, columns = self.prompt_columns[self.prompt] + self.columns, self.columns + 1
        rows = len(tokens)
        if int(columns.max()) > self.own[0].columns:
            for own in self.own:
                own.grow(min(2 * own.columns, self.new_tokens))
            self._layers_in_c = self._in_c()
        if self._layers_in_c is not None:
            where = self.prompt, self.prompt_columns, self.slot, columns
            hidden = self._layers_in_c(tokens, positions, *where)
        else:
            hidden = self._hidden(filled_up(tokens), filled_up(positions), columns)
        self.columns = columns
        return self.weights.lm_head(hidden)[:rows]

    def _hidden(self, tokens: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
        """The last hidden states, [T, H] of T rows, of which those beyond B are nobody's."""

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = turned(qkv, positions, self.weights.turn, layer.q_norm, layer.k_norm)
            prompts = self.prompts[index], self.prompt, self.prompt_columns
            return attend_cached(q, k, v, *prompts, self.own[index], self.slot, columns)

        return hidden_states(self.weights, tokens, attention)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        prompts, slots, index = set(self.prompt.tolist()), set(self.slot.tolist()), torch.tensor(rows).long()
        self.prompt, self.slot, self.columns = self.prompt[index], self.slot[index], self.columns[index]
        self._free_prompts(prompts)
        self.free += slots - set(self.slot.tolist())
