"""The values that travel between rooms.

Shape legend: N sequences, T tokens in all, G groups, R response tokens of one rollout, P prompt
tokens. A batch is flat: sequences lie one behind the other and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question with its ground truth (a row in verl's schema, tokenized)."""

    uid: str
    """Where it came from, as `file:row` or `task:index`; errors name a sample by it."""
    data_source: str
    messages: tuple[Mapping[str, str], ...]
    ground_truth: Any
    extra_info: Mapping[str, Any]
    tokens: tuple[int, ...]
    """The chat template applied, with the generation prompt; P token ids."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `temperature=0` is greedy; `top_k=-1` and `top_p=1` switch them off."""

    max_new_tokens: int
    n: int = 1
    """Responses per prompt (the group size)."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True)
class Rollout:
    """One response and what the rollout engine said about it."""

    prompt: Prompt
    group: int
    """Index of the prompt within the call that generated it."""
    tokens: Tensor
    """[R] int64, the response, with its end-of-sequence token where it reached one."""
    logprobs: Tensor
    """[R] float32, log-probs of `tokens` under the distribution they were drawn from."""
    text: str
    """`tokens` decoded without special tokens."""
    finished: bool
    """True where the response ended by itself, False where `max_new_tokens` cut it."""
    policy_version: int


@dataclass(frozen=True)
class Reward:
    """What a verifier said of one rollout."""

    value: float
    why: str
    """`right`, `wrong`, or the verifier's own word."""


@dataclass(frozen=True)
class Batch:
    """N sequences (prompt and response), flat over T tokens."""

    tokens: Tensor
    """[T] int64."""
    response_mask: Tensor
    """[T] bool, true where the policy chose the token."""
    offsets: Tensor
    """[N+1] int64; sequence i is `tokens[offsets[i]:offsets[i+1]]`."""
    group: Tensor
    """[N] int64."""
    policy_version: Tensor
    """[N] int64."""
    reward: Tensor
    """[N] float32."""
    rollout_logprobs: Tensor
    """[T] float32, 0 outside the response."""
    old_logprobs: Tensor | None = None
    """[T] float32, 0 outside the response."""
    ref_logprobs: Tensor | None = None
    """[T] float32, 0 outside the response."""
    advantages: Tensor | None = None
    """[T] float32, token advantages (constant over a response under a group advantage), 0 outside it."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """[N] tokens per sequence, prompt included."""
        return self.offsets.diff()

    @property
    def response_offsets(self) -> Tensor:
        """[N+1] boundaries of the sequences in `x[response_mask]`."""
        return to_offsets(self.response_mask.long())[self.offsets]

    @property
    def response_lengths(self) -> Tensor:
        """[N] response tokens per sequence."""
        return self.response_offsets.diff()

    def select(self, sequences: Tensor | Sequence[int]) -> Batch:
        """The batch of these sequences, in this order; `sequences` holds indices [M] into N."""
        index = torch.as_tensor(sequences, dtype=torch.long)
        lengths = self.lengths[index]
        offsets = to_offsets(lengths)
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
        token_index = self.offsets[index].repeat_interleave(lengths) + within
        changed: dict[str, Tensor] = {"offsets": offsets}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != "offsets":
                changed[field.name] = value[index if field.name in PER_SEQUENCE else token_index]
        return replace(self, **changed)


PER_SEQUENCE = frozenset({"group", "policy_version", "reward"})


def to_offsets(lengths: Tensor) -> Tensor:
    """Lengths [N] to boundaries [N+1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
