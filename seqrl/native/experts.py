"""Mixture-of-experts layers, with their gradient, for a few rows (decoding) and for many.

Each (token, expert) pair is one row of work, and pairs are sorted by expert. In C all experts are one call:
with the gradient (training, prefill), or from matrices packed for many calls without one (decoding). On CUDA
they are grouped products, without a look at the counts, for which the host would have to wait.

Shape legend: T tokens, k experts per token, P = T k pairs, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import (
    Matrices,
    Matrix,
    PackedExperts,
    Tiles,
    combined,
    combined_backward,
    current,
    expert_products,
    expert_products_backward,
    gated,
    gated_backward,
    linear,
    pairs_by_expert,
)


class Experts(NamedTuple):
    """A mixture of E gated feed-forward layers, `top_k` for each token."""

    router: Matrix
    """[E, H]"""
    gate_up: Matrices
    """[E, 2 I, H]"""
    down: Matrices
    """[E, H, I]"""
    top_k: int
    normalise: bool
    """Scale the `top_k` routing weights to sum to 1."""
    asked: list[Tensor] | None = None
    """Takes the experts of each token, [T, k], where somebody wants to know them."""

    def __call__(self, y: Tensor) -> Tensor:
        """The output [T, H] for `y` [T, H]."""
        probs = linear(y, self.router).softmax(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)  # [T, k]
        if self.asked is not None:
            self.asked.append(chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return mixture(y, chosen, weights, self.gate_up, self.down)


def mixture(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Matrices, down: Matrices) -> Tensor:
    """The weighted sum [T, H] of what the experts `chosen` [T, k] say of `x` [T, H], in x's type."""
    if not in_c(gate_up, down):
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        return _by_torch(x, chosen, weights, gate_up, down)
    ends, place, token = pairs_by_expert(chosen, _count(gate_up))
    if isinstance(gate_up, PackedExperts) or not (torch.is_grad_enabled() or current() is not None):
        inner = expert_products(x, token, gate_up, ends)
        return combined(expert_products(gated(inner), None, down, ends), place, weights.float())
    sources = (m.sources[0] if isinstance(m, Tiles) else m for m in (gate_up, down))
    tiled = isinstance(gate_up, Tiles), isinstance(down, Tiles)
    return _Mixture.apply(x, token, place, weights.float(), ends, tiled, *sources)


def _count(matrices: Matrices) -> int:
    """E"""
    if isinstance(matrices, Tiles):
        return len(matrices.sources[0])
    return len(matrices.weight if isinstance(matrices, PackedExperts) else matrices)


def in_c(*matrices: Matrices) -> bool:
    """Whether there is C for products with these."""
    return all(not isinstance(m, Tensor) or PackedExperts.fit(m) for m in matrices)


def _by_torch(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    expert, order = chosen.flatten().sort(stable=True)  # [P], pairs by expert
    ends = torch.searchsorted(expert, torch.arange(len(gate_up), device=expert.device), right=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place, token = place.view_as(chosen), order // chosen.shape[1]
    # Grouped products want rows that begin at a multiple of 16 bytes.
    if x.is_cuda and all(w.shape[2] * w.element_size() % 16 == 0 for w in (gate_up, down)):
        said = _in_groups(_Taken.apply(x, token, place), ends, gate_up, down)
        by_token = _Taken.apply(said, place.flatten(), order[:, None]).view(*place.shape, x.shape[1])
    else:
        by_token = _one_by_one(x.index_select(0, token), ends, gate_up, down)[place]  # [T, k, H]
    return (by_token * weights.to(x.dtype)[..., None]).sum(1)


class _Taken(torch.autograd.Function):
    """`x[rows]`, where row i of x is in the places `back[i]` [i, j] of the result: a gradient is looked up
    there, instead of being added up from everywhere in whatever order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return combined(grad, back, None), None, None


class _Mixture(torch.autograd.Function):
    """Keeps the projections and outputs of the pairs; the activations are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor,
        place: Tensor,
        weights: Tensor,
        ends: Tensor,
        tiled: tuple[bool, bool],
        *sources: Tensor,
    ) -> Tensor:
        gate_up, down = _matrices(sources, tiled)

        def compute() -> tuple[Tensor, ...]:
            inner = expert_products(x, token, gate_up, ends)
            out = expert_products(gated(inner), None, down, ends)
            return combined(out, place, weights), inner, out, place

        record = current()
        if record is None:
            said, inner, out, _ = compute()
        else:
            said, inner, out, recorded = record.made(compute)
            said = torch.empty_like(x) if said is None else record.rows_of(said)  # None: not asked for again
            if record.rows is not None:
                pairs = torch.empty_like(place)  # where each pair was among those that were recorded
                pairs.view(-1)[place.flatten()] = record.rows_of(recorded).flatten()
                inner, out = (x.index_select(0, pairs.flatten()) for x in (inner, out))
        ctx.tiled = tiled
        ctx.save_for_backward(x, token, place, weights, ends, *sources, inner, out)
        return said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, token, place, weights, ends, *sources, inner, out = ctx.saved_tensors
        gate_up, down = _matrices(sources, ctx.tiled)
        of_out, of_weights = combined_backward(out, place, weights, grad.contiguous())
        of_activation, of_down = expert_products_backward(of_out, gated(inner), None, down, ends)
        of_inner = gated_backward(inner, of_activation)
        of_pairs, of_gate_up = expert_products_backward(of_inner, x, token, gate_up, ends)
        return combined(of_pairs, place, None), None, None, of_weights, None, None, of_gate_up, of_down


def _matrices(sources: Sequence[Tensor], tiled: Sequence[bool]) -> list[Tensor | Tiles]:
    return [Tiles((x,)) if on_tiles else x for x, on_tiles in zip(sources, tiled, strict=True)]


def _in_groups(pairs: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What each pair's expert says of it, [P, H], from `pairs` [P, H]."""
    offsets = ends.int()
    inner = F.grouped_mm(pairs, gate_up.transpose(1, 2), offs=offsets)
    return F.grouped_mm(gated(inner), down.transpose(1, 2), offs=offsets)


def _one_by_one(pairs: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same, expert by expert."""
    starts = [0, *ends.tolist()[:-1]]
    said = [
        linear(gated(linear(pairs[start:end], gate_up[expert])), down[expert])
        for expert, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True))
        if end > start
    ]
    return torch.cat(said) if said else pairs
