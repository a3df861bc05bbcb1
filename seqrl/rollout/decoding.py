"""The decoding loop every in-process engine shares: prompts are read once, their responses grow token by
token, and the place of one that has ended is taken at once. An engine brings the forward pass, a `Decoder`.

Shape legend: B rows decoded together, S most new tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from seqrl.errors import UserError
from seqrl.rollout.sampling import request_uniforms, sample
from seqrl.types import Prompt, Rollout, SamplingParams

_CUDA_LOOK_EVERY = 8
"""Steps between looks at who has ended, where looking means waiting for the device."""


class Decoder(Protocol):
    """The forward pass of one call of `generate`, with the weights as they are now, and its rows."""

    joins: bool
    """Whether rows can be admitted while others are under way."""

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """Appends `copies[i]` rows that continue prompt i; the logits [sum of copies, V] that follow."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` [B] to the rows; the logits [B, V] that follow."""
        ...

    def keep(self, rows: Tensor) -> None:
        """From now on row j is what was row `rows[j]`; `rows` is ascending, all others are dropped."""
        ...


class Request(NamedTuple):
    prompt: int
    """Index into the prompts of the call."""
    response: int


class Response(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    finished: bool


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
        with torch.inference_mode():
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
        rows = DecodedRows(self.model.device, self.eos_ids, sampling, capacity)
        done: dict[Request, Response] = {}
        logits: Tensor | None = None
        while waiting or rows.requests:
            free = capacity - len(rows.requests)
            if waiting and free and (decoder.joins or not rows.requests):
                joining, waiting = waiting[:free], waiting[free:]
                indices, copies = _by_prompt(joining)
                first = decoder.admit([prompts[i].tokens for i in indices], copies)
                logits = first if logits is None else torch.cat([logits, first])
                rows.join(joining, [prompts[request.prompt].uid for request in joining], seed)
            assert logits is not None
            drawn = rows.draw(logits)
            kept = rows.ended()
            if kept is not None:
                done.update(rows.leave(kept))
                decoder.keep(kept)
                drawn = drawn[kept]
            logits = decoder.step(drawn) if rows.requests else None
        return [done[Request(i, j)] for i in range(len(prompts)) for j in range(sampling.n)]


class DecodedRows:
    """What has been drawn for the rows under way, on the model's device."""

    def __init__(self, device: torch.device, eos_ids: Sequence[int], sampling: SamplingParams, capacity: int):
        self.device, self.sampling, self.steps = device, sampling, sampling.max_new_tokens
        self.eos = torch.tensor([] if sampling.ignore_eos else eos_ids, dtype=torch.long, device=device)
        self.requests: list[Request] = []
        self.looked = 0  # steps since the last look at who has ended
        self.drawn = 0  # of the row that has most
        self.uniforms = torch.empty(capacity, self.steps, dtype=torch.float64, device=device)
        self.tokens = torch.empty(capacity, self.steps, dtype=torch.long, device=device)
        self.logprobs = torch.empty(capacity, self.steps, device=device)
        self.free = list(range(capacity))
        self.place = torch.empty(0, dtype=torch.long, device=device)  # of each row in these three
        self.count = torch.empty(0, dtype=torch.long, device=device)  # tokens each row has
        self.ends = torch.empty(0, dtype=torch.bool, device=device)

    def join(self, requests: Sequence[Request], uids: Sequence[str], seed: int) -> None:
        places, self.free = self.free[: len(requests)], self.free[len(requests) :]
        uniforms = [
            request_uniforms(seed, uid, request.response, self.steps)
            for request, uid in zip(requests, uids, strict=True)
        ]
        place = torch.tensor(places, device=self.device)
        self.uniforms[place] = torch.stack(uniforms).to(self.device)
        self.requests += requests
        self.place = torch.cat([self.place, place])
        self.count = torch.cat([self.count, torch.zeros_like(place)])
        self.ends = torch.cat([self.ends, torch.zeros_like(place, dtype=torch.bool)])

    def draw(self, logits: Tensor) -> Tensor:
        """One more token for each row, from `logits` [B, V]."""
        at = self.place, self.count
        drawn, logprobs = sample(logits, self.uniforms[at], self.sampling)
        self.tokens[at], self.logprobs[at] = drawn, logprobs
        self.count = self.count + 1
        if self.eos.numel():
            self.ends |= (drawn[:, None] == self.eos).any(1)
        self.looked += 1
        self.drawn += 1
        return drawn

    def ended(self) -> Tensor | None:
        """The rows to go on with, ascending; None where none is known to have ended."""
        every = _CUDA_LOOK_EVERY if self.device.type == "cuda" else 1
        if self.looked < every and self.drawn < self.steps:
            return None
        self.looked = 0
        going = ~self.ends & (self.count < self.steps)
        if bool(going.all()):
            return None
        return going.nonzero()[:, 0]

    def leave(self, kept: Tensor) -> Iterator[tuple[Request, Response]]:
        """The responses of all rows but those `kept`, which stay."""
        going = set(kept.tolist())
        left = [i for i in range(len(self.requests)) if i not in going]
        places = self.place[left]
        tokens, logprobs = self.tokens[places].cpu(), self.logprobs[places].cpu()
        is_end = torch.isin(tokens, self.eos.cpu())
        for k, i in enumerate(left):
            count = int(self.count[i])
            ends = is_end[k, :count].nonzero()
            length = int(ends[0]) + 1 if len(ends) else count
            yield self.requests[i], Response(tokens[k, :length], logprobs[k, :length], len(ends) > 0)
        self.free += places.tolist()
        self.requests = [self.requests[i] for i in kept.tolist()]
        self.place, self.count, self.ends = self.place[kept], self.count[kept], self.ends[kept]
        self.drawn = int(self.count.max()) if self.requests else 0


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
