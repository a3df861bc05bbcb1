"""Mixtures of experts: products of rows sorted by expert, and the weighted sum of what the experts said.

Shape legend: T tokens, k experts per token, P = T k pairs, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqrl.kernels.call import LANES, SUFFIX, call, fits


def combined(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """y[t] = sum over j of weights[t, j] x[place[t, j]]: `x` [P, H], `place` [T, k] a permutation of P,
    `weights` [T, k] float32 (None: ones) -> [T, H]. Without gradient."""
    if not fits(x.dtype, x.dtype, x.device, x.shape[1]):
        by_token = x.index_select(0, place.flatten()).view(*place.shape, x.shape[1])
        return (by_token if weights is None else by_token * weights[..., None].to(x.dtype)).sum(1)
    out = x.new_empty(len(place), x.shape[1])
    call(f"combine_{SUFFIX[x.dtype]}", *place.shape, x.shape[1], x, place, weights, out)
    return out


def combined_backward(x: Tensor, place: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to `x` [P, H] and `weights` [T, k] of `combined`, given `grad` [T, H]."""
    if not fits(x.dtype, x.dtype, x.device, x.shape[1]):
        flat = place.flatten()
        wide = grad[:, None] * weights[..., None].to(x.dtype)  # [T, k, H]
        of_weights = (x.index_select(0, flat).view_as(wide) * grad[:, None]).sum(-1)
        return torch.empty_like(x).index_copy(0, flat, wide.flatten(0, 1)), of_weights.to(weights.dtype)
    dx, dweights = torch.empty_like(x), torch.empty_like(weights)
    call(
        f"combine_backward_{SUFFIX[x.dtype]}",
        *(*place.shape, x.shape[1], x, place, weights, grad.contiguous(), dx, dweights),
    )
    return dx, dweights


def expert_products(x: Tensor, token: Tensor | None, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r of the result [P, out] is `x[token[r]]` (x[r] where that is None) times the transpose of its
    expert's matrix in `weight` [E, out, in]. In C (see `fits`), without gradient.

    Expert e has the rows up to `ends[e]`, [E] int64, from where the expert before it ends.
    """
    experts, outs, ins = weight.shape
    out = torch.empty(len(x) if token is None else len(token), outs)
    call("expert_forward", experts, ins, outs, x.float(), token, weight.float(), ends, out)
    return out.to(x.dtype)


def expert_products_backward(
    grad: Tensor, x: Tensor, token: Tensor | None, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the rows taken from `x`, [P, in], and to `weight`, given `grad` [P, out]."""
    (experts, outs, ins), wide = weight.shape, grad.float()
    dx, dweight = torch.empty(len(grad), ins), torch.empty(weight.shape)
    call("expert_backward_x", experts, ins, outs, wide, weight.float(), ends, dx)
    call("expert_backward_w", experts, ins, outs, wide, x.float(), token, ends, dweight)
    return dx.to(x.dtype), dweight.to(weight.dtype)


@dataclass(frozen=True)
class PackedExperts:
    """A matrix per expert, [E, out, in], laid out for `__call__`: [E, out / 16, in, 16]."""

    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedExperts:
        experts, outs, ins = weight.shape
        return cls(weight.view(experts, outs // LANES, LANES, ins).transpose(2, 3).contiguous())

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        """Row r of `x` [P, in] times the transpose of its expert's matrix: [P, out] in the matrix's type.
        Expert e has the rows up to `ends[e]`, [E] int64."""
        experts, blocks, ins, _ = self.weight.shape
        out = self.weight.new_empty(len(x), blocks * LANES)
        call(
            f"expert_products_{SUFFIX[self.weight.dtype]}",
            *(experts, ins, blocks * LANES, x.float(), self.weight, ends, out),
        )
        return out
