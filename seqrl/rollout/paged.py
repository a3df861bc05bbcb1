"""Native decoding on pages of keys and values, on any device; on CUDA by FlashAttention and CUDA graphs.

A step is a function of tensors that stay where they are: the last token of each row, how many it has, its
pages, what is drawn. So it can be captured, once for each of a few numbers of rows; rows that fill a number
up belong to nobody, and write into a page of nobody's.

Shape legend: B rows, T tokens, Q and K query and key heads, D head size; a page is C columns, W pages a row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.errors import UserError
from seqrl.kernels import FLASH_PAGE, attend_flat, attend_pages, fill, has_pages, is_flash, sent, turned
from seqrl.native.forward import hidden_states
from seqrl.native.weights import Layer, Weights
from seqrl.rollout.decoding import Decoder
from seqrl.rollout.graphs import Capture, Graphs
from seqrl.rollout.pages import Pages
from seqrl.rollout.rows import DecodedRows
from seqrl.types import SamplingParams

_log = logging.getLogger(__name__)

_PREFILL_TOKENS = 8192
"""Prompt tokens in one forward pass; bounds the memory of its activations."""
_PAGE = 32
"""Columns of a page where FlashAttention does not ask for another number."""
_SAMPLINGS = 2
"""Ways to sample whose graphs are kept: those of training and of validation."""


@dataclass
class ReadPrompt:
    """A prompt that was read."""

    tokens: tuple[int, ...]
    pages: list[int]
    """The last may be half empty; each row has a copy of it, to write on."""
    rows: int = 0
    """That continue it."""


class Row(NamedTuple):
    prompt: ReadPrompt
    own: list[int]
    """Its pages behind those that are full of the prompt."""


class Latest(NamedTuple):
    """The prompt that was read last; more responses to it may be waiting for a place."""

    prompt: ReadPrompt
    logits: Tensor
    """[1, V], that follow it."""


class PagedDecoder(Decoder):
    """Of at most `rows` rows at once, and of prompts and responses of at most `columns` tokens together."""

    joins = True

    def __init__(self, weights: Weights, rows: int, columns: int, capture: Capture | None = None) -> None:
        """With `capture`, steps are captured, and the tensors of `weights` stay where they are."""
        device = weights.embedding.device
        super().__init__(device)
        self.weights, self.capacity, self._capture = weights, rows, capture
        self._flash = pages_are_fast(weights.embedding, weights.dtype, weights.turn.size)
        self.pages = Pages(weights, FLASH_PAGE if self._flash else _PAGE, self._forget)
        self._room = rows if capture is None else filled_number(rows)
        width = -(-columns // self.pages.columns)
        self._each = torch.arange(self._room + 1, dtype=torch.int32, device=device)
        self._table = torch.zeros(self._room, width, dtype=torch.int32, device=device)
        """The pages of each row, in order."""
        self._prompt_columns = torch.ones(self._room, dtype=torch.long, device=device)
        self._known: dict[tuple[Any, ...], tuple[DecodedRows, Graphs]] = {}
        """What is drawn, and the steps that draw it, by the way to sample."""
        self._graphs: Graphs | None = None
        """Of this call."""
        self.begin()

    def begin(self) -> None:
        """Another call, with the weights as they are now."""
        self.held: list[Row] = []
        self.latest: Latest | None = None
        self.pages.begin()
        # What the device is to have of both, as the host has it.
        self._table_here = torch.zeros(self._table.shape, dtype=torch.int32)
        self._prompt_columns_here = torch.ones(self._room, dtype=torch.long)
        self._told = False
        self._warned = False

    def rows(self, eos_ids: Sequence[int], sampling: SamplingParams, capacity: int) -> DecodedRows:
        """See `Decoder.rows`. Those that graphs know are used again."""
        if self._capture is None:
            return super().rows(eos_ids, sampling, capacity)
        key = (*eos_ids, replace(sampling, n=1))
        if key not in self._known:
            lag = 0 if self.waits else 1
            rows = DecodedRows(self.device, eos_ids, sampling, self.capacity, room=self._room, lag=lag)
            self._known[key] = rows, Graphs(self._capture)
        self._known[key] = self._known.pop(key)  # the last to be let go
        while len(self._known) > _SAMPLINGS:
            del self._known[next(iter(self._known))]
        rows, self._graphs = self._known[key]
        rows.begin()
        return rows

    def _forget(self) -> None:
        for _, graphs in self._known.values():
            graphs.forget()

    def room(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> int:
        """See `Decoder.room`. A page more for each row, those under way included."""
        is_read = self.latest is not None and self.latest.prompt.tokens == prompts[0]
        needed = [len(self.held)]
        for i, (prompt, count) in enumerate(zip(prompts, copies, strict=True)):
            needed.append(needed[-1] + 1 + (0 if i == 0 and is_read else self._pages_of(len(prompt))))
            needed += range(needed[-1] + 1, needed[-1] + count)
        if self.pages.make(needed[-1]) < needed[-1] and not is_read:
            self._forget_latest()
        fit, free = len(needed) - 1, len(self.pages.free)
        while fit and needed[fit] > free:
            fit -= 1
        if not fit and not self.held:
            raise UserError(
                f"data.max_prompt_length: there is no memory for the keys and values of a prompt of "
                f"{len(prompts[0])} tokens; lower it, or take a smaller model"
            )
        return fit

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.admit`. A prompt whose responses do not all join at once is read once all the same."""
        before = self.latest
        known = before if before is not None and before.prompt.tokens == prompts[0] else None
        unread = prompts if known is None else prompts[1:]
        read = [ReadPrompt(prompt, self.pages.take(self._pages_of(len(prompt)))) for prompt in unread]
        logits = self._read(read)
        if known is not None:
            read, logits = [known.prompt, *read], torch.cat([known.logits, logits])
        self.latest = Latest(read[-1], logits[-1:].clone())
        partial_pages, own_pages = list[int](), list[int]()
        for prompt, count in zip(read, copies, strict=True):
            prompt.rows += count
            for _ in range(count):
                row = Row(prompt, [])
                if len(prompt.tokens) % self.pages.columns:
                    row.own.extend(self.pages.take(1))
                    partial_pages.append(prompt.pages[-1])
                    own_pages.extend(row.own)
                self._append(row)
        self._copy(partial_pages, own_pages)
        if before is not None:
            self._release(before.prompt)
        each = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
        return logits.index_select(0, sent(each, self.device))

    def _append(self, row: Row) -> None:
        place, full = len(self.held), row.prompt.pages[: len(row.prompt.tokens) // self.pages.columns]
        pages = torch.tensor([*full, *row.own], dtype=torch.int32)
        self._table_here[place, : len(pages)] = pages
        self._prompt_columns_here[place] = len(row.prompt.tokens)
        self.held.append(row)
        self._told = False

    def _copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if not sources:
            return
        source, target = (sent(torch.tensor(x, dtype=torch.long), self.device) for x in (sources, targets))
        for store in (*self.pages.keys, *self.pages.values):
            store[target] = store[source]

    def _pages_of(self, columns: int) -> int:
        return -(-columns // self.pages.columns)

    def _release(self, prompt: ReadPrompt) -> None:
        """Gives its pages back, if no row looks at it and no response may join."""
        if prompt.rows == 0 and (self.latest is None or self.latest.prompt is not prompt):
            self.pages.free += prompt.pages

    def _forget_latest(self) -> None:
        latest, self.latest = self.latest, None
        if latest is not None:
            self._release(latest.prompt)

    def _read(self, prompts: Sequence[ReadPrompt]) -> Tensor:
        """Fills the pages of prompts; the logits [P, V] that follow them."""
        parts: list[list[ReadPrompt]] = [[]]
        for prompt in prompts:
            if sum(len(each.tokens) for each in parts[-1]) + len(prompt.tokens) > _PREFILL_TOKENS:
                parts.append([])
            parts[-1].append(prompt)
        logits = [self._prefill(part) for part in parts if part]
        return torch.cat(logits) if logits else self._no_logits()

    def _no_logits(self) -> Tensor:
        w = self.weights
        return torch.empty(0, w.vocabulary, dtype=w.dtype, device=self.device)

    def _prefill(self, prompts: Sequence[ReadPrompt]) -> Tensor:
        lengths = [len(prompt.tokens) for prompt in prompts]
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        columns = torch.arange(self.pages.columns)
        slots = [
            (torch.tensor(prompt.pages)[:, None] * len(columns) + columns).flatten()[: len(prompt.tokens)]
            for prompt in prompts
        ]
        tokens = torch.tensor([token for prompt in prompts for token in prompt.tokens])
        slot, positions, offsets, last, tokens = (
            sent(x, self.device)
            for x in (
                torch.cat(slots),
                torch.cat([torch.arange(length) for length in lengths]),
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(starts[1:]) - 1,
                tokens,
            )
        )

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = self._turned_and_kept(index, layer, qkv, positions, slot)
            if self._flash:
                return attend_flat(q, k, v, offsets, offsets, max(lengths)).flatten(1)
            return torch.cat([_attend(*(x[i:j] for x in (q, k, v))) for i, j in pairwise(starts)])

        hidden = hidden_states(self.weights, tokens, attention)
        return self.weights.lm_head(hidden.index_select(0, last))

    def _turned_and_kept(
        self, index: int, layer: Layer, qkv: Tensor, positions: Tensor, slot: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of [T] tokens, the latter two in the cache as well: `slot` is page times C
        plus column."""
        q, k, v = turned(qkv, positions, self.weights.turn, layer.q_norm, layer.k_norm)
        self.pages.keys[index].flatten(0, 1)[slot] = k
        self.pages.values[index].flatten(0, 1)[slot] = v
        return q, k, v

    def crowded(self, rows: DecodedRows) -> int:
        """See `Decoder.crowded`. All others have the pages until the next look afterwards."""
        asked = [
            self._pages_of(len(row.prompt.tokens) + min(count - 1 + self.looks_every, rows.steps))
            - len(row.prompt.tokens) // self.pages.columns
            - len(row.own)
            for row, count in zip(self.held, rows.drawn, strict=True)
        ]
        going = len(self.held)
        if self.pages.make(sum(asked)) < sum(asked):
            self._forget_latest()
        free = len(self.pages.free)
        while sum(asked[:going]) > free:
            going -= 1
            free += len(self.held[going].own)
        if late := len(self.held) - going:
            self._tell_of(going, rows)
            self.keep(range(going))
        for place, (row, count) in enumerate(zip(self.held, asked, strict=False)):
            if count > 0:
                first = len(row.prompt.tokens) // self.pages.columns + len(row.own)
                row.own.extend(self.pages.take(count))
                self._table_here[place, first : first + count] = torch.tensor(row.own[-count:])
                self._told = False
        if not self._told:
            fill(self._table, self._table_here)
            fill(self._prompt_columns, self._prompt_columns_here)
            self._told = True
        return late

    def _tell_of(self, going: int, rows: DecodedRows) -> None:
        """That memory is short, once a call. Raises UserError where it is too short for a single row."""
        if not going:
            raise UserError(
                f"data.max_response_length={rows.steps}: there is no memory for the keys and values of a "
                f"response of {rows.most_drawn} tokens; lower it, or take a smaller model"
            )
        if not self._warned:
            _log.warning(
                "rollout: memory is short; %d responses are decoded at once and the others later. "
                "actor_rollout_ref.rollout.max_num_seqs=%d asks for no more",
                going,
                going,
            )
        self._warned = True

    def advance(self, rows: DecodedRows) -> None:
        """See `Decoder.advance`. Whoever is at the limit before the next look draws on, and it is lost."""
        steps = min(self.looks_every, rows.steps - rows.least_drawn)
        count, width = len(self.held), self._table.shape[1]
        if self._graphs is None:
            width = max(len(row.own) + len(row.prompt.tokens) // self.pages.columns for row in self.held)
        else:
            count = filled_number(count)
        step = partial(self._step, rows, count, width)
        for _ in range(steps):
            if self._graphs is None:
                step()
            else:
                self._graphs.run(count, step)
        rows.took(steps)

    def _step(self, rows: DecodedRows, count: int, width: int) -> None:
        """One token more for each of the first `count` rows, of which each has at most `width` pages."""
        positions = self._prompt_columns[:count] + rows.count[:count] - 1
        lengths, table = (positions + 1).int(), self._table[:count, :width]
        page = table.gather(1, (positions // self.pages.columns)[:, None])[:, 0].long()
        slot = page * self.pages.columns + positions % self.pages.columns
        each = self._each[: count + 1] if self._flash else None

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, _, _ = self._turned_and_kept(index, layer, qkv, positions, slot)
            return attend_pages(q, self.pages.keys[index], self.pages.values[index], table, lengths, each)

        hidden = hidden_states(self.weights, rows.last[:count], attention)
        rows.draw(slice(0, count), self.weights.lm_head(hidden))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        kept = set(rows)
        for place, row in enumerate(self.held):
            if place not in kept:
                self.pages.free += row.own
                row.prompt.rows -= 1
                self._release(row.prompt)
        self.held = [self.held[i] for i in rows]
        for here, nobody in ((self._table_here, 0), (self._prompt_columns_here, 1)):
            here[: len(rows)] = here[list(rows)]
            here[len(rows) :] = nobody
        self._told = False


def pages_are_fast(embedding: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether there is FlashAttention over pages where `embedding` is, for heads of `size` in `dtype`."""
    return is_flash(embedding, dtype, size) and has_pages()


def filled_number(rows: int) -> int:
    """At least `rows`: a power of two, or half as much again."""
    power = 1 << max(rows - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within one prompt, by torch's own operations: [T, Q D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)
