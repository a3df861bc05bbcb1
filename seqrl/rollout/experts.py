"""Mixture-of-experts layers without autograd, for a few rows (decoding) and for many (prefill).

Each (token, expert) pair is one row of work. Two ways to do it:
- as a batched product over all experts, each padded to the busiest one's rows. On CPU this runs the
  experts in parallel and took less than half the time of one product per expert at the same rows;
- as a grouped product, expert by expert, where padding would cost more than that: uneven routing, many
  rows, or few of many experts in use. On CUDA always, since it needs no look at the counts.
Shape legend: M tokens, k experts per token, E experts, C rows per expert, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.rollout.weights import Experts

_FEW_ROWS = 8
"""A product of this many rows or fewer takes about the time of one row."""
_MANY_ROWS = 256
"""From here on a product per expert keeps the processor busy by itself."""


def mixture(experts: Experts, x: Tensor) -> Tensor:
    """The output [M, H] for `x` [M, H]."""
    logits = experts.router(x)
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(experts.top_k, dim=-1)  # [M, k]
    if experts.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    x = x.to(experts.gate_up.dtype)
    pair_expert, order = chosen.flatten().sort()  # [M k], pairs by expert
    counts = torch.bincount(pair_expert, minlength=len(experts.gate_up))  # [E]
    token = order // experts.top_k
    place = torch.arange(len(order), device=x.device)  # where the work of each sorted pair stands
    rows = None if x.device.type == "cuda" else _padding_pays(counts, len(order))
    if rows is None:
        result = _grouped(experts, x.index_select(0, token), counts.cumsum(0))
    else:
        shift = torch.arange(len(counts), device=x.device) * rows - (counts.cumsum(0) - counts)  # [E]
        place += shift.index_select(0, pair_expert)
        source = torch.zeros(len(counts) * rows, dtype=torch.long, device=x.device)
        source[place] = token  # padding computes token 0 once more, for nobody
        result = _padded(experts, x.index_select(0, source).view(len(counts), rows, -1))
    slot = torch.empty_like(order)
    slot[order] = place
    # The gather of each token's k results and their weighted sum, in one pass.
    return F.embedding_bag(
        slot.view_as(chosen), result, per_sample_weights=weights.to(result.dtype), mode="sum"
    )


def _padding_pays(counts: Tensor, pairs: int) -> int | None:
    """Rows per expert for the padded product, or None where the grouped one is better."""
    per_expert = counts.tolist()
    busiest, used, total = max(per_expert), sum(c > 0 for c in per_expert), len(per_expert)
    if busiest <= _MANY_ROWS and 2 * used >= total and busiest <= max(_FEW_ROWS, 2 * pairs / total):
        return busiest
    return None


def _padded(experts: Experts, x: Tensor) -> Tensor:
    """`x` [E, C, H] to [E C, H]."""
    gate, up = torch.bmm(x, experts.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(experts.activation(gate) * up, experts.down.transpose(1, 2)).flatten(0, 1)


def _grouped(experts: Experts, x: Tensor, ends: Tensor) -> Tensor:
    """`x` [M k, H], sorted by expert, with the row where each expert `ends` [E]. Returns [M k, H]."""
    offsets = ends.to(torch.int32)
    gate, up = F.grouped_mm(x, experts.gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    return F.grouped_mm(experts.activation(gate) * up, experts.down.transpose(1, 2), offs=offsets)
