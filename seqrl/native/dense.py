"""Linear layers, and the gated feed-forward layer made of two, with its gradient.

Shape legend: T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import (
    Matrix,
    Reordered,
    Tiles,
    current,
    fits,
    gated,
    gated_product,
    gated_product_backward,
    linear,
    made,
    product,
    product_backward,
    weight_gradients,
)


class Linear(NamedTuple):
    weight: Matrix
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Dense(NamedTuple):
    """A gated feed-forward layer."""

    gate_up: Linear
    down: Linear

    @property
    def width(self) -> int:
        """I"""
        down = self.down.weight
        assert not isinstance(down, Reordered), "laid out, its shape is oneDNN's"
        return down.ins if isinstance(down, Tiles) else down.shape[1]

    def __call__(self, y: Tensor) -> Tensor:
        """[T, H]"""
        gate_up, down = self.gate_up.weight, self.down.weight
        if self.gate_up.bias is not None or self.down.bias is not None:
            return self.down(gated(self.gate_up(y)))
        if not (torch.is_grad_enabled() or current() is not None):
            return product(gated_product(y, gate_up, keep=False)[1], down)
        if not fits(y.dtype, y.dtype, y.device, self.width):
            return self.down(gated(self.gate_up(y)))
        sources = [_sources(gate_up), _sources(down)]
        tiled = isinstance(gate_up, Tiles), isinstance(down, Tiles)
        return _Dense.apply(y, tiled, len(sources[0]), *sources[0], *sources[1])


class _Dense(torch.autograd.Function):
    """Keeps what goes in and the projections; the activation is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiled: tuple[bool, bool], split: int, *sources: Tensor) -> Tensor:
        gate_up, down = _matrices(sources, tiled, split)

        def compute() -> tuple[Tensor, ...]:
            inner, activation = gated_product(x, gate_up, keep=True)
            assert inner is not None
            return product(activation, down), inner

        out, inner = made(compute)
        ctx.tiled, ctx.split = tiled, split
        ctx.save_for_backward(x, inner, *sources)
        return torch.empty_like(x) if out is None else out  # None: it is not asked for again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, *sources = ctx.saved_tensors
        gate_up, down = _matrices(sources, ctx.tiled, ctx.split)
        grad = grad.contiguous()
        of_inner, activation = gated_product_backward(grad, down, inner)
        wants_x, _, _, *wants = ctx.needs_input_grad
        of_gate_up: list[Any] = [None] * ctx.split
        of_down: list[Any] = [None] * (len(sources) - ctx.split)
        if any(wants[ctx.split :]):
            of_down = weight_gradients(grad, activation, down)
        if any(wants[: ctx.split]):
            of_gate_up = weight_gradients(of_inner, x, gate_up)
        of_x = product_backward(of_inner, gate_up) if wants_x else None
        return of_x, None, None, *of_gate_up, *of_down


def _sources(weight: Matrix) -> tuple[Tensor, ...]:
    assert not isinstance(weight, Reordered), "laid out for products without gradient"
    return weight.sources if isinstance(weight, Tiles) else (weight,)


def _matrices(sources: Sequence[Tensor], tiled: tuple[bool, bool], split: int) -> list[Tensor | Tiles]:
    """The two that `_sources` took apart."""
    parts = tuple(sources[:split]), tuple(sources[split:])
    return [Tiles(part) if on_tiles else part[0] for part, on_tiles in zip(parts, tiled, strict=True)]
