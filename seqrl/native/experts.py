"""Mixture-of-experts layers, with their gradient, for a few rows (decoding) and for many.

Each (token, expert) pair is one row of work, and pairs are sorted by expert. Three ways to do it:
- expert by expert, the whole gated layer on the pairs of one, with its gradient (training, prefill);
- from packed matrices, all experts in one call, without gradient (decoding on a CPU);
- on CUDA as grouped products, without a look at the counts, for which the host would have to wait.

Shape legend: T tokens, k experts per token, P = T k pairs, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqrl.kernels import PackedExperts, combined, combined_backward, gated, gated_backward, linear, product

Matrices = Tensor | PackedExperts


class Experts(NamedTuple):
    """A mixture of E gated feed-forward layers, `top_k` for each token."""

    router: Tensor
    """[E, H]"""
    gate_up: Matrices
    """[E, 2 I, H]"""
    down: Matrices
    """[E, H, I]"""
    top_k: int
    normalise: bool
    """Scale the `top_k` routing weights to sum to 1."""

    def __call__(self, y: Tensor) -> Tensor:
        """The output [T, H] for `y` [T, H]."""
        probs = linear(y, self.router).softmax(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)  # [T, k]
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return mixture(y, chosen, weights, self.gate_up, self.down)


def mixture(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Matrices, down: Matrices) -> Tensor:
    """The weighted sum [T, H] of what the experts `chosen` [T, k] say of `x` [T, H], in x's type."""
    expert, order = chosen.flatten().sort(stable=True)  # [P], pairs by expert
    count = len(gate_up.weight if isinstance(gate_up, PackedExperts) else gate_up)
    ends = torch.bincount(expert, minlength=count).cumsum(0)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place, token = place.view_as(chosen), order // chosen.shape[1]
    if isinstance(gate_up, PackedExperts):
        assert isinstance(down, PackedExperts)
        pairs = x.index_select(0, token)
        return combined(down(gated(gate_up(pairs, ends)), ends), place, weights)
    assert isinstance(down, Tensor)
    if x.device.type == "cuda":
        return _grouped(x, token, place, weights, ends, gate_up, down)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _ByExpert.apply(x, token, place, weights.to(wide), ends.tolist(), gate_up, down)


class _ByExpert(torch.autograd.Function):
    """Keeps the pairs' inputs, projections and outputs; the activations are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor,
        place: Tensor,
        weights: Tensor,
        ends: list[int],
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        pairs = x.index_select(0, token)  # [P, H]
        inner, outer = [], []
        for expert, rows in _rows(ends):
            inner.append(product(pairs[rows], gate_up[expert]))
            outer.append(product(gated(inner[-1]), down[expert]))
        out = torch.cat(outer) if outer else pairs
        ctx.save_for_backward(pairs, place, weights, gate_up, down, out, *inner)
        ctx.ends = ends
        return combined(out, place, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs, place, weights, gate_up, down, out, *inner = ctx.saved_tensors
        of_out, of_weights = combined_backward(out, place, weights, grad.contiguous())
        of_gate_up, of_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        of_pairs = []
        for (expert, rows), made in zip(_rows(ctx.ends), inner, strict=True):
            of_made = gated_backward(made, product(of_out[rows], down[expert].t()))
            torch.mm(of_out[rows].t(), gated(made), out=of_down[expert])
            torch.mm(of_made.t(), pairs[rows], out=of_gate_up[expert])
            of_pairs.append(product(of_made, gate_up[expert].t()))
        dx = combined(torch.cat(of_pairs), place, None) if of_pairs else None
        return dx, None, None, of_weights, None, of_gate_up, of_down


def _rows(ends: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    spans = enumerate(zip([0, *ends], ends, strict=False))
    return [(expert, slice(start, end)) for expert, (start, end) in spans if end > start]


def _grouped(
    x: Tensor, token: Tensor, place: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    offsets = ends.to(torch.int32)
    pairs = x.index_select(0, token)
    inner = F.grouped_mm(pairs, gate_up.transpose(1, 2), offs=offsets)
    out = F.grouped_mm(gated(inner), down.transpose(1, 2), offs=offsets)
    by_token = out.index_select(0, place.flatten()).view(*place.shape, -1)  # [T, k, H]
    return (by_token * weights.to(out.dtype)[..., None]).sum(1)
