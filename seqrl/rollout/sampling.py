"""Drawing one token per row: the sampling distribution, its log-probs, and the randomness of a request.

The draw inverts the cumulative distribution in vocabulary order, on 52-bit integers: an integer
cumulative sum is exact on every device, so a token of probability 0 can never be picked.
Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from seqrl.kernels import draw, fits
from seqrl.types import SamplingParams

_ONE = 2.0**52
"""Probability 1 as an integer weight; a float32 times a power of two is exact."""


def request_uniforms(seed: int, uid: str, response: int, count: int) -> Tensor:
    """`count` float64 uniforms in [0, 1), [count], of response number `response` to prompt `uid`.

    They depend on (seed, uid, response) alone, and a larger `count` only appends to them.
    """
    digest = hashlib.blake2b(f"{seed}\0{uid}\0{response}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row from `logits` [B, V] with one uniform each [B].

    Returns tokens [B] int64 and log-probs [B] float32 under the distribution they were drawn from:
    after temperature, top-k and top-p, renormalised. Greedy (`temperature=0`) takes the first of the
    largest logits and gives its log-prob at temperature 1.
    """
    logits = logits.float()
    if in_one_pass(logits, sampling):
        return draw(logits, sampling.temperature, uniforms)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        if sampling.temperature != 1:
            logits = logits / sampling.temperature
        logits = _restrict(logits, sampling.top_k, sampling.top_p)
    logprobs = logits.log_softmax(-1)
    if sampling.temperature != 0:
        tokens = _invert(logprobs.exp(), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def in_one_pass(logits: Tensor, sampling: SamplingParams) -> bool:
    """Whether the C for plain sampling will do."""
    plain = sampling.temperature > 0 and sampling.top_p >= 1 and not 0 < sampling.top_k < logits.shape[-1]
    return plain and fits(logits.dtype, logits.dtype, logits.device)


def _restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` [B, V] with -inf outside the `top_k` largest and then outside the smallest set of the
    largest whose probability (among those) reaches `top_p`."""
    count = logits.shape[-1]
    if 0 < top_k < count:
        count = top_k
    elif top_p >= 1:
        return logits
    largest, index = logits.topk(count)  # [B, count], descending
    if top_p < 1:
        probs = largest.softmax(-1, dtype=torch.float64)
        before = probs.cumsum(-1) - probs
        before[:, 0] = -1  # the first always stays
        largest = largest.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, largest)


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform. Returns [B] int64."""
    cumulative = (probs * _ONE).long().cumsum(-1)  # [B, V]
    target = (uniforms * cumulative[:, -1]).long()  # below the total, as the uniform is below 1
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
