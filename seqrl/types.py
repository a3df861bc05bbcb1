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

from seqrl.reward import Reward as Reward


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
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""


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
class Batch:
    """N sequences (prompt and response), flat over T tokens; on the host, an engine sends what it needs."""

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
    """[T] float32, 0 outside the response (as are all log-probs and advantages)."""
    old_logprobs: Tensor | None = None
    """[T] float32, of the training engine before the update."""
    ref_logprobs: Tensor | None = None
    """[T] float32, of the frozen reference."""
    advantages: Tensor | None = None
    """[T] float32, token advantages (constant over a response under a group advantage)."""
    weights: Tensor | None = None
    """[T] float32, what rollout correction multiplies each token's surrogate with."""
    selected: Tensor | None = None
    """[T] bool, the tokens that `clip_cov` or `kl_cov` has picked from a whole mini-batch."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> Batch:
        """Lays the sequences of N rollouts one behind the other."""
        lengths = torch.tensor([[len(rollout.prompt.tokens), rollout.tokens.numel()] for rollout in rollouts])
        mask = torch.tensor([False, True]).repeat(len(rollouts)).repeat_interleave(lengths.flatten())
        tokens, logprobs = torch.empty(mask.shape, dtype=torch.long), torch.zeros(mask.shape)
        tokens[~mask] = torch.tensor([token for rollout in rollouts for token in rollout.prompt.tokens])
        tokens[mask] = torch.cat([rollout.tokens for rollout in rollouts])
        logprobs[mask] = torch.cat([rollout.logprobs for rollout in rollouts])
        return cls(
            tokens=tokens,
            response_mask=mask,
            offsets=to_offsets(lengths.sum(1)),
            group=torch.tensor([rollout.group for rollout in rollouts]),
            policy_version=torch.tensor([rollout.policy_version for rollout in rollouts]),
            reward=torch.tensor([reward.value for reward in rewards], dtype=torch.float32),
            rollout_logprobs=logprobs,
        )

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
        index = self._sequence_index(sequences)
        token_index = self._token_index(index)
        changed: dict[str, Tensor] = {"offsets": to_offsets(self.lengths[index])}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is not None and name != "offsets":
                changed[name] = value[index if name in PER_SEQUENCE else token_index]
        return replace(self, **changed)

    def token_index(self, sequences: Tensor | Sequence[int]) -> Tensor:
        """Where the tokens of `select(sequences)` lie in this batch: indices into T."""
        return self._token_index(self._sequence_index(sequences))

    def response_token_index(self, sequences: Tensor | Sequence[int]) -> Tensor:
        """The same of its response tokens."""
        token_index = self.token_index(sequences)
        return token_index[self.response_mask[token_index]]

    def _sequence_index(self, sequences: Tensor | Sequence[int]) -> Tensor:
        return torch.as_tensor(sequences, dtype=torch.long, device=self.offsets.device)

    def _token_index(self, index: Tensor) -> Tensor:
        lengths = self.lengths[index]
        offsets = to_offsets(lengths)
        within = torch.arange(int(offsets[-1]), device=index.device) - offsets[:-1].repeat_interleave(lengths)
        return self.offsets[index].repeat_interleave(lengths) + within


PER_SEQUENCE = frozenset({"group", "policy_version", "reward"})


def to_offsets(lengths: Tensor) -> Tensor:
    """Lengths [N] to boundaries [N+1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
