"""The decoding loop every in-process engine shares: prompts are read once, their responses grow token by
token, and the place of one that has ended is taken at once. An engine brings the forward pass, a `Decoder`.

Shape legend: B rows decoded together, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqrl.errors import UserError
from seqrl.rollout.rows import DecodedRows, Left, Request, Response
from seqrl.types import Prompt, Rollout, SamplingParams

_STEPS_ON_CUDA = 8
"""Steps between looks at who has ended, on a device that works on while the host looks."""


class Decoder(ABC):
    """The forward pass of one call of `generate`, with the weights as they are now, and its rows."""

    joins = False
    """Whether rows can be admitted while others are under way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits = device.type == "cpu"
        """Whether its numbers are there as soon as the host asks."""
        self.looks_every = 1 if self.waits else _STEPS_ON_CUDA
        """So many steps it looks at who has ended."""

    def rows(self, eos_ids: Sequence[int], sampling: SamplingParams, capacity: int) -> DecodedRows:
        """For what is drawn in this call."""
        return DecodedRows(self.device, eos_ids, sampling, capacity, lag=0 if self.waits else 1)

    def room(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> int:
        """How many of the rows that `admit` would append there is memory for now."""
        return sum(copies)

    @abstractmethod
    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """Appends `copies[i]` rows that continue prompt i; the logits [sum of copies, V] that follow."""

    def crowded(self, rows: DecodedRows) -> int:
        """Drops those of `rows`, the last ones, that there is no memory to go on with. How many they are."""
        return 0

    @abstractmethod
    def advance(self, rows: DecodedRows) -> None:
        """Draws a token for each of `rows`, or several until the next look."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """From now on row j is what was row `rows[j]`; `rows` is ascending, all others are dropped."""


class SteppingDecoder(Decoder):
    """One that is asked for logits, step by step."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` [B] to the rows; the logits [B, V] that follow."""

    def advance(self, rows: DecodedRows) -> None:
        """See `Decoder.advance`."""
        everybody, steps = slice(0, len(rows.requests)), min(self.looks_every, rows.steps - rows.most_drawn)
        for _ in range(steps):
            rows.draw(everybody, self.step(rows.last[everybody]))
        rows.took(steps)


class DecodingEngine(ABC):
    """A `RolloutEngine` around a forward pass in this process.

    `model` is a transformers causal language model; its device is where decoding happens.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_num_seqs: int, dtype: torch.dtype) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.dtype = dtype
        self.eos_ids = end_of_sequence_ids(model, tokenizer)

    @abstractmethod
    def _decoder(self, rows: int, prompts: int, prompt_length: int, new_tokens: int) -> Decoder:
        """A decoder of at most so many rows at once, of so many prompts in all, and of prompts and responses
        of at most so many tokens."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, policy_version: int
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        if not prompts:
            return []
        self._check(prompts, sampling)
        # On CUDA what is compiled for training serves here, too: its tensors are of the same kind.
        with torch.inference_mode() if self.model.device.type == "cpu" else torch.no_grad():
            responses = self._decode(prompts, sampling, seed)
        texts = self.tokenizer.batch_decode(
            [response.tokens.tolist() for response in responses], skip_special_tokens=True
        )
        return [
            # Cloned out here: a tensor born in inference mode could not enter a backward pass.
            Rollout(
                prompts[i // sampling.n],
                i // sampling.n,
                r.tokens.clone(),
                r.logprobs.clone(),
                text,
                r.finished,
                policy_version,
            )
            for i, (r, text) in enumerate(zip(responses, texts, strict=True))
        ]

    def _check(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(longest.tokens) + sampling.max_new_tokens > limit:
            raise UserError(
                f"data.max_response_length={sampling.max_new_tokens}: with the {len(longest.tokens)} tokens "
                f"of prompt {longest.uid} that exceeds the model's max_position_embeddings of {limit}; "
                "lower data.max_response_length or data.max_prompt_length"
            )
        for prompt in prompts:
            if not prompt.tokens:
                raise UserError(f"{prompt.uid}: the prompt has no tokens; give it some text or drop the row")

    def _decode(self, prompts: Sequence[Prompt], sampling: SamplingParams, seed: int) -> list[Response]:
        """The n responses of each prompt, prompt-major."""
        # Neighbours in length are read together, so that an engine that pads wastes little.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        waiting = [Request(i, j) for i in order for j in range(sampling.n)]
        capacity = min(self.max_num_seqs, len(waiting))
        longest = len(prompts[order[-1]].tokens)
        decoder = self._decoder(capacity, len(prompts), longest, sampling.max_new_tokens)
        rows, left = decoder.rows(self.eos_ids, sampling, capacity), list[Left]()
        while waiting or rows.requests:
            free = capacity - len(rows.requests)
            if waiting and free and (decoder.joins or not rows.requests):
                indices, copies = _by_prompt(waiting[:free])
                fit = decoder.room([prompts[i].tokens for i in indices], copies)
                joining, waiting = waiting[:fit], waiting[fit:]
                if joining:
                    indices, copies = _by_prompt(joining)
                    logits = decoder.admit([prompts[i].tokens for i in indices], copies)
                    rows.join(joining, [prompts[request.prompt].uid for request in joining], seed, logits)
            if (kept := rows.going()) is not None:
                left.append(rows.leave(kept))
                decoder.keep(kept)
            if rows.requests and (late := decoder.crowded(rows)):
                capacity = len(rows.requests) - late
                waiting = rows.requests[capacity:] + waiting  # they begin anew, and draw the same
                rows.keep(range(capacity))
            if rows.requests:
                decoder.advance(rows)
        done = {request: response for each in left for request, response in each.responses(rows.eos_on_host)}
        return [done[Request(i, j)] for i in range(len(prompts)) for j in range(sampling.n)]


def _by_prompt(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """The prompts of these requests, in order, and how many requests each has."""
    counts: dict[int, int] = {}
    for request in requests:
        counts[request.prompt] = counts.get(request.prompt, 0) + 1
    return [*counts], [*counts.values()]


def end_of_sequence_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends a response, by generation config, model config and tokenizer.

    Raises UserError where there is none.
    """
    named = [
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ]
    listed = [value if isinstance(value, list | tuple) else [value] for value in named]
    ids = {i for value in listed for i in value if i is not None}
    if not ids:
        raise UserError(
            "actor_rollout_ref.model.path: neither the model nor its tokenizer names an end-of-sequence "
            "token; set eos_token_id in its generation_config.json"
        )
    return sorted(ids)
