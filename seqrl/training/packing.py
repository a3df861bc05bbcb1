"""Which sequences go through the model together, and how they do so without padding.

A micro-batch is one row of flat tokens, the prompt of a group computed once. Everything in a
transformer but attention treats each token by itself, so only attention has to know where a sequence
ends: `flat_attention` lays queries, keys and values out as [sequences, longest], runs plain causal
attention, and takes the tokens back.

Shape legend: N sequences, T tokens in all, T' of them computed, L longest sequence, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.errors import UserError
from seqrl.kernels import Spans, attend_flat, sent
from seqrl.types import Batch

ATTENTION_NAME = "seqrl_flat"


GroupPrompt = tuple[int, int]
"""The group it is of, and its tokens."""


def by_tokens(
    lengths: Sequence[int], max_tokens: int, prompts: Sequence[GroupPrompt] | None = None
) -> list[list[int]]:
    """Splits sequences into as few micro-batches as fit `max_tokens`, none of them larger than it has to be,
    each of similar lengths.

    Longest first, so that sequences laid side by side for attention waste little, and the largest
    micro-batch fails for lack of memory at once if at all. A sequence longer than `max_tokens` goes
    alone. `prompts` are those that `lengths` include: each counts once in a micro-batch; None: every time.
    Returns indices into `lengths`.
    """
    prompts = [(i, 0) for i in range(len(lengths))] if prompts is None else prompts
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fewest = _filled(order, lengths, prompts, max_tokens)
    if len(fewest) < 2:
        return fewest
    repeated = sum(tokens for _, tokens in prompts) - sum(tokens for _, tokens in set(prompts))
    equal = max(-(-(sum(lengths) - repeated) // len(fewest)), lengths[order[0]])
    for size in range(equal, max_tokens, -(-equal // 50)):
        parts = _filled(order, lengths, prompts, size)
        if len(parts) == len(fewest):
            return parts
    return fewest


def _filled(
    order: Sequence[int], lengths: Sequence[int], prompts: Sequence[GroupPrompt], size: int
) -> list[list[int]]:
    """One part after the other, up to `size` tokens each."""
    parts: list[list[int]] = []
    room, there = 0, set[GroupPrompt]()
    for index in order:
        prompt = prompts[index]
        tokens = lengths[index] - (prompt[1] if prompt in there else 0)
        if not parts or tokens > room:
            parts.append([])
            room, there, tokens = size, set(), lengths[index]
        parts[-1].append(index)
        there.add(prompt)
        room -= tokens
    return parts


def by_count(sequences: int, per_part: int) -> list[list[int]]:
    """Splits sequences, in order, into micro-batches of `per_part`."""
    return [list(range(i, min(i + per_part, sequences))) for i in range(0, sequences, per_part)]


@dataclass(frozen=True)
class Split:
    """How a batch is cut into the micro-batches of a forward."""

    max_tokens: int
    """Tokens of each, prompts included, ..."""
    sequences: int | None = None
    """... or, where not None, so many sequences."""

    def __call__(self, batch: Batch, *, prompts_once: bool) -> list[list[int]]:
        """Indices of the sequences of each micro-batch. `prompts_once`: of a group the prompt counts once."""
        if self.sequences is not None:
            return by_count(len(batch), self.sequences)
        prompts = prompt_lengths(batch).tolist() if prompts_once else [0] * len(batch)
        named = list(zip(batch.group.tolist(), prompts, strict=True))
        return by_tokens(batch.lengths.tolist(), self.max_tokens, named)


def prompt_lengths(batch: Batch) -> Tensor:
    """[N], the tokens of each sequence before its response."""
    total = batch.tokens.numel()
    row = torch.arange(len(batch), device=batch.offsets.device).repeat_interleave(batch.lengths)
    position = torch.arange(total, device=row.device) - batch.offsets[row]
    response_at = torch.where(batch.response_mask, position, total)
    return batch.lengths.scatter_reduce(0, row, response_at, "amin")


def shared_prompts(batch: Batch, prompt_length: Tensor) -> Tensor:
    """For each token, the token that is computed in its stead: [T] index into T.

    A prompt's tokens see nothing but the prompt, so the first sequence of a group computes them for
    all that begin with the same ones. Every other token stands for itself. `prompt_length` is [N].
    """
    lengths, total = batch.lengths, batch.tokens.numel()
    everyone = torch.arange(len(batch), device=lengths.device)
    token = torch.arange(total, device=lengths.device)
    row = everyone.repeat_interleave(lengths)
    position = token - batch.offsets[row]
    groups, group = batch.group.unique(return_inverse=True)
    first = everyone.new_full((groups.numel(),), len(batch)).scatter_reduce(0, group, everyone, "amin")
    leader = first[group]  # [N]
    stand_in = (batch.offsets[leader][row] + position).clamp(max=total - 1)
    in_prompt = position < prompt_length[row]
    differs = in_prompt & (batch.tokens[stand_in] != batch.tokens)
    alike = (prompt_length == prompt_length[leader]).index_fill(0, row[differs], False)  # [N]
    return torch.where(in_prompt & alike[row], stand_in, token)


def _spans(own: Tensor, source: Tensor, row: Tensor, offsets: Tensor, prompts: Tensor | None) -> Spans:
    """A prompt is a sequence by itself, which all responses to it see, as in decoding: the same numbers are
    added up in the same order there and here."""
    lengths = offsets.diff()
    computed = torch.zeros_like(lengths).index_add(0, row, own.long())  # [N]
    shared, start = lengths - computed, computed.cumsum(0) - computed
    # What a sequence does not compute itself is its prompt.
    hosted = torch.zeros_like(lengths) if prompts is None else torch.where(shared > 0, 0, prompts)
    hosts = (hosted > 0).nonzero()[:, 0]
    nobody = torch.zeros_like(hosts)
    return Spans(
        shared=torch.cat([source[offsets[:-1]], nobody]),
        shared_columns=torch.cat([shared + hosted, nobody]),
        own=torch.cat([start + hosted, start[hosts]]),
        own_columns=torch.cat([computed - hosted, hosted[hosts]]),
    )


@dataclass(frozen=True)
class Layout:
    """Which tokens go through the model (T' of T), and how attention finds their sequences.

    It is made on the host, where the batch lies, and then sent: made on a device, it would be waited for.
    """

    sequences: int
    longest: int
    computed: Tensor
    """[T'] index into T: the tokens that stand for themselves."""
    source: Tensor
    """[T] index into T': where each token's result is."""
    borrowed: Tensor
    """[T - T'] index into T: the tokens whose result is another's."""
    positions: Tensor
    """[T'] position of each computed token within its sequence."""
    to_padded: Tensor
    """[N*L] index into T' (0 where padding)."""
    to_flat: Tensor
    """[T'] index into N*L."""
    spans: Spans
    """The same for attention on a CPU that needs no padding."""
    offsets: Tensor
    """[N+1] int32, where sequences begin in T."""
    computed_offsets: Tensor
    """[N+1] int32, where they begin in T'."""

    @classmethod
    def of_batch(cls, batch: Batch) -> Layout:
        """Of a micro-batch, prompts computed once for those that share them."""
        prompts = prompt_lengths(batch)
        return cls.of(batch.offsets, shared_prompts(batch, prompts), prompts)

    @classmethod
    def of(cls, offsets: Tensor, stand_in: Tensor | None = None, prompts: Tensor | None = None) -> Layout:
        """`offsets` [N+1]; `stand_in` [T] as `shared_prompts` gives it, None: nothing is shared; `prompts`
        [N], the tokens of each sequence that attention takes apart from the rest, None: none."""
        lengths, total = offsets.diff(), int(offsets[-1])
        sequences, longest = lengths.numel(), int(lengths.max())
        token = torch.arange(total, device=offsets.device)
        stand_in = token if stand_in is None else stand_in
        row = torch.arange(sequences, device=offsets.device).repeat_interleave(lengths)
        position = token - offsets[row]
        own = stand_in == token
        source = (own.cumsum(0) - 1)[stand_in]
        padded = row * longest + position
        to_padded = torch.zeros(sequences * longest, dtype=torch.long, device=offsets.device)
        to_padded[padded] = source
        return cls(
            sequences,
            longest,
            token[own],
            source,
            token[~own],
            position[own],
            to_padded,
            padded[own],
            _spans(own, source, row, offsets, prompts),
            offsets.int(),
            F.pad(own.cumsum(0), (1, 0))[offsets].int(),
        )

    def to(self, device: torch.device) -> Layout:
        """Sent there, but for the spans, which only a CPU reads."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        tensors: dict[str, Any] = {k: sent(x, device) for k, x in values if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def pad(self, x: Tensor) -> Tensor:
        """[1, H, T', D] -> [N, H, L, D]."""
        rows = x[0].transpose(0, 1).index_select(0, self.to_padded)
        return rows.view(self.sequences, self.longest, *rows.shape[1:]).transpose(1, 2)

    def flatten(self, x: Tensor) -> Tensor:
        """[N, H, L, D] -> [1, T', H, D]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.to_flat)[None]


def flat_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each sequence of one flat row, in the form transformers calls.

    query [1, H, T', D], key and value [1, H_kv, T', D] -> [1, T', H, D]. Without a layout (the model is
    called as anyone would call it) it is transformers' own attention. There is no dropout: a ratio
    compares one network with itself.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others | {"dropout": 0.0}
        )
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} needs attention with {name}, which seqrl's training forward "
                "does not have; choose a model of another architecture"
            )
    return padded_attention(query, key, value, layout, scaling=scaling, sliding_window=sliding_window), None


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """query [1, H, T', D], key and value [1, H_kv, T', D] -> [1, T', H, D]."""
    mask = None
    if sliding_window is not None and layout.longest > sliding_window:
        i = torch.arange(layout.longest, device=query.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < sliding_window)
    out = F.scaled_dot_product_attention(
        layout.pad(query),
        layout.pad(key),
        layout.pad(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return layout.flatten(out)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The same without padding, where there is FlashAttention.

    query [T', H, D], key and value [T', H_kv, D] -> [T', H, D]. Each sequence has its keys side by side,
    those of a shared prompt once for each; its queries are the last of it, which is how they line up.
    """
    if len(layout.borrowed):
        key, value = (_Lent.apply(x, layout) for x in (key, value))
    return attend_flat(query, key, value, layout.computed_offsets, layout.offsets, layout.longest)


class _Lent(torch.autograd.Function):
    """What each token has of `x` [T', ...], its own or borrowed: [T, ...]. Only gradients of what is borrowed
    are added up in no order; all others are looked up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        computed, source, borrowed = ctx.layout.computed, ctx.layout.source, ctx.layout.borrowed
        lent = grad.index_select(0, borrowed)
        return grad.index_select(0, computed).index_add_(0, source.index_select(0, borrowed), lent), None


def register() -> None:
    """Makes `flat_attention` known to transformers as an attention implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(**arguments: Any) -> Tensor | None:
        # A flat row comes without a mask, and must not get one of [T, T].
        return None if arguments["attention_mask"] is None else sdpa_mask(**arguments)

    AttentionInterface.register(ATTENTION_NAME, flat_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)
