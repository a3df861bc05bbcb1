"""Drawing one token per row: the sampling distribution, its log-probs, and the randomness of a request.

The draw inverts the cumulative distribution in vocabulary order, on 52-bit integers: an integer
cumulative sum is exact on every device, so a token of probability 0 can never be picked. It looks for a
block of the vocabulary first, and for the token within it.
Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.kernels import draw, fits
from seqrl.kernels.fused import fused
from seqrl.types import SamplingParams

_ONE = 2.0**52
"""Probability 1 as an integer weight; a float32 times a power of two is exact."""
_BLOCK = 512
"""Entries of the vocabulary that are summed before any is looked at."""


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
    if in_one_pass(logits, sampling):
        return draw(logits.float(), sampling.temperature, uniforms)
    if sampling.temperature == 0:
        tokens, logprobs = logits.argmax(-1), logits.float().log_softmax(-1)
    else:
        temperature = sampling.temperature
        if _restricts(logits, sampling):
            logits = _restrict(logits.float() / temperature, sampling.top_k, sampling.top_p)
            temperature = 1.0
        logprobs, totals = _weighed(logits, temperature)
        tokens = _invert(logprobs, totals, uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def in_one_pass(logits: Tensor, sampling: SamplingParams) -> bool:
    """Whether the C for plain sampling will do."""
    plain = sampling.temperature > 0 and not _restricts(logits, sampling)
    return plain and fits(torch.float32, torch.float32, logits.device)


def _restricts(logits: Tensor, sampling: SamplingParams) -> bool:
    return sampling.top_p < 1 or 0 < sampling.top_k < logits.shape[-1]


def _restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` [B, V] with -inf outside the `top_k` largest and then outside the smallest set of the
    largest whose probability (among those) reaches `top_p`."""
    count = logits.shape[-1]
    if 0 < top_k < count:
        count = top_k
    largest, index = logits.topk(count)  # [B, count], descending
    if top_p < 1:
        probs = largest.softmax(-1, dtype=torch.float64)
        before = probs.cumsum(-1) - probs
        before[:, 0].fill_(-1)  # the first always stays
        largest = largest.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, largest)


@fused
def _weighed(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [B, V], and the integer weight of each block of them [B, V / block]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    blocks = F.pad(logprobs, (0, -logprobs.shape[1] % _BLOCK), value=-torch.inf).unflatten(1, (-1, _BLOCK))
    return logprobs, (blocks.exp() * _ONE).long().sum(-1)


@fused
def _weights(logprobs: Tensor) -> Tensor:
    return (logprobs.exp() * _ONE).long()


def _invert(logprobs: Tensor, totals: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform, from what `_weighed` says: [B] int64.
    Of what is no number it gives some token."""
    ends, last = totals.cumsum(-1), logprobs.shape[1] - 1
    target = (uniforms * ends[:, -1]).long()[:, None]  # below the total, as the uniform is below 1
    block = torch.searchsorted(ends, target, right=True).clamp(max=totals.shape[1] - 1)  # [B, 1]
    target = target - (ends - totals).gather(1, block)
    token = block * _BLOCK + torch.arange(_BLOCK, device=block.device)  # [B, block]
    weights = _weights(logprobs.gather(1, token.clamp(max=last)))
    within = torch.searchsorted(weights.cumsum(-1), target, right=True)[:, 0]
    return (block[:, 0] * _BLOCK + within).clamp(max=last)
