"""Mixtures of experts: products of rows sorted by expert, and the weighted sum of what the experts said.

Shape legend: T tokens, k experts per token, P = T k pairs, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqrl.kernels.call import LANES, SUFFIX, call, fits, words_of
from seqrl.kernels.tiles import Tiles


def pairs_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of tokens with the experts `chosen` [T, k] int64, sorted by expert and then by token: where
    those of each expert end [E], the place of each pair [T, k], and the token in each place [P]. In C."""
    chosen = chosen.contiguous()
    ends, place, token = chosen.new_empty(experts), torch.empty_like(chosen), chosen.new_empty(chosen.numel())
    call("sort_pairs", *chosen.shape, experts, chosen, ends, place, token)
    return ends, place, token


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


@dataclass(frozen=True)
class PackedExperts:
    """A matrix per expert, [E, out, in], laid out for its products. In C (see `fits`), without gradient."""

    weight: Tensor
    """[E, out / 16, in, 16]; in bfloat16 [E, out / 16, in / 2, 16, 2]."""

    @staticmethod
    def fit(*matrices: Tensor) -> bool:
        """Whether there is C for these, [E, out, in] each."""
        return all(
            fits(weight.dtype, weight.dtype, weight.device, *weight.shape[1:])
            and all(width % (2 * LANES) == 0 for width in weight.shape[1:])
            for weight in matrices
        )

    @classmethod
    def of(cls, weight: Tensor) -> PackedExperts:
        assert cls.fit(weight), "the C reads two vectors at once"
        experts, outs, ins = weight.shape
        packed = weight.new_empty(experts, outs // LANES, *words_of(ins, weight.dtype))
        call("expert_pack", experts, outs, packed.shape[2], weight.contiguous(), packed)
        return cls(packed)

    def __call__(self, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
        """See `expert_products`."""
        experts, blocks, words = self.weight.shape[:3]
        ins, outs = words * self.weight[0, 0, 0, 0].numel(), blocks * LANES
        out = x.new_empty(len(x) if token is None else len(token), outs)
        name = f"expert_products_{SUFFIX[x.dtype]}"
        call(name, experts, ins, outs, x.contiguous(), token, self.weight, ends, out)
        return out


Matrices = Tensor | PackedExperts | Tiles
"""[E, out, in]"""


def expert_matrices(source: Tensor, *, dtype: torch.dtype) -> Tensor | Tiles:
    """`source` [E, out, in] as products in `dtype` want them."""
    return Tiles((source,)) if Tiles.fit(source, dtype=dtype) else source.to(dtype)


def laid_out_experts(*layer: Tensor | Tiles) -> list[Matrices]:
    """All matrices of a layer, for many products without gradient: in C where there is C for all."""
    in_c = PackedExperts.fit(*(matrices for matrices in layer if isinstance(matrices, Tensor)))

    def laid_out(matrices: Tensor | Tiles) -> Matrices:
        if isinstance(matrices, Tiles):
            return matrices.laid_out()
        return PackedExperts.of(matrices) if in_c else matrices

    return [laid_out(matrices) for matrices in layer]


def expert_products(x: Tensor, token: Tensor | None, matrices: Matrices, ends: Tensor) -> Tensor:
    """Row r of the result [P, out] is `x[token[r]]` (x[r] where that is None) times the transpose of its
    expert's matrix; in C. Expert e has the rows up to `ends[e]`, [E] int64, from where that before it ends.
    """
    if isinstance(matrices, Tiles):
        return matrices.product(x, None, token, ends)
    packed = PackedExperts.of(matrices) if isinstance(matrices, Tensor) else matrices
    return packed(x, token, ends)


def expert_products_backward(
    grad: Tensor, x: Tensor, token: Tensor | None, matrices: Tensor | Tiles, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the rows taken from `x`, [P, in], and to the source of `matrices`, given
    `grad` [P, out]."""
    if isinstance(matrices, Tiles):
        (of_source,) = matrices.gradients(grad, x, token, ends)
        return matrices.backward(grad.contiguous(), ends), of_source
    experts, outs, ins = matrices.shape
    x, weight, suffix = x.contiguous(), matrices.contiguous(), SUFFIX[x.dtype]
    dx, dweight = x.new_empty(len(grad), ins), torch.empty_like(weight)
    call(f"expert_backward_x_{suffix}", experts, ins, outs, grad, weight, ends, dx)
    call(f"expert_backward_w_{suffix}", experts, ins, outs, grad, x, token, ends, dweight)
    return dx, dweight
