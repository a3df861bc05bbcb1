"""Products of matrices, by what is fastest at them here.

Shape legend: T tokens.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels.call import call, fits, words_of
from seqrl.kernels.record import current, made
from seqrl.kernels.tiles import Tiles, add_gradient


class Reordered(NamedTuple):
    """A matrix in oneDNN's own layout, for many products without gradient."""

    weight: Tensor
    """[out, in]"""


class Strips(NamedTuple):
    """A matrix as strips.c wants it, for many products without gradient that are oneDNN's to the last bit."""

    columns: Tensor
    """[out / 16, words, 16], words of 32 bits."""
    outs: int
    ins: int
    stretch: int
    """Numbers that are added up one after the other."""

    @classmethod
    def of(cls, weight: Tensor, stretch: int) -> Strips:
        columns, (outs, ins) = torch.empty_like(weight), weight.shape
        call("expert_pack", 1, outs, words_of(ins, weight.dtype)[0], weight, columns)
        return cls(columns, outs, ins, stretch)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y, wide = x.new_empty(len(x), self.outs), None if bias is None else bias.float()
        sizes = (x.dtype == torch.bfloat16, self.stretch, *x.shape, self.outs)
        call("strip_products", *sizes, x.contiguous(), self.columns, wide, y)
        return y


Matrix = Tensor | Tiles | Reordered | Strips
"""[out, in]"""


def _has_onednn(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
    )


def _reorders(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can lay out matrices of this type for many products."""
    if dtype == torch.bfloat16:
        return _has_onednn(device) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _has_onednn(device) and dtype == torch.float32


def matrix(*sources: Tensor, dtype: torch.dtype) -> Tensor | Tiles:
    """`sources` [out_i, in], one below the other, as products in `dtype` want them."""
    if Tiles.fit(*sources, dtype=dtype):
        return Tiles(sources)
    cast = [source.to(dtype) for source in sources]  # first: it is half as much to copy
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def laid_out(weight: Tensor | Tiles) -> Matrix:
    """A matrix for many products without gradient."""
    if isinstance(weight, Tiles):
        return weight.laid_out()
    if not _reorders(weight.dtype, weight.device):
        return weight
    if fits(weight.dtype, weight.dtype, weight.device):
        stretch = _stretch(*weight.shape, weight.dtype)
        if stretch is not None:
            return Strips.of(weight.contiguous(), stretch)
    return Reordered(torch.ops.mkldnn._reorder_linear_weight(weight))


_STRETCHES = (512, 1024)
_ROWS, _OUTS = 64, 2048
"""On so many, at most, it is tried how the library adds up."""


@functools.cache
def _stretch(outs: int, ins: int, dtype: torch.dtype) -> int | None:
    """Of `Strips` that multiply by such a matrix as the library does, to the last bit; None where none do."""
    if outs % 32 or ins % 32 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None  # with fewer registers strips.c is slower than the library at many rows
    generator, half = torch.Generator().manual_seed(0), ins // 2
    order = torch.randperm(half, generator=generator)
    a, b = (torch.randn(n, half, generator=generator) for n in (_ROWS, min(outs, _OUTS)))
    # The sums are 0 but for what is lost on the way, which depends on the way.
    x, weight = torch.cat([a, a[:, order]], 1).to(dtype), torch.cat([b, -b[:, order]], 1).to(dtype)
    bias = (1e-6 * b[:, 0]).to(dtype)
    for stretch in _STRETCHES:
        strips = Strips.of(weight, stretch)
        if all(torch.equal(strips.product(x, b), product(x, weight, b)) for b in (None, bias)):
            return stretch
    return None


_MANY = 4096
"""Rows of which not even 1 in 64 is there for nobody."""


def recurring(rows: int, device: torch.device) -> int:
    """At least `rows`, and hardly more: one of few numbers of rows that come again and again.

    On a CPU oneDNN compiles a kernel for each shape it meets, which takes milliseconds, as long as many a
    product itself; products with a sixteenth more of many rows take longer.
    """
    if device.type != "cpu":
        return rows
    if rows <= 8:
        return max(rows, 4)  # fewer rows are added up in another order
    step = max(4, 2 ** (rows.bit_length() - (5 if rows < _MANY else 7)))
    return -(-rows // step) * step


def filled_up(x: Tensor) -> Tensor:
    """`x` [T], of rows, and zeros for rows that nobody sees, up to a number that recurs."""
    return F.pad(x, (0, recurring(len(x), x.device) - len(x)))


def product(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in] times the transpose of `weight` [out, in], plus `bias` [out]; without gradient."""
    if isinstance(weight, Tiles | Strips):
        return weight.product(x, bias)
    # MKL's float32 products are slow on processors of other makers; oneDNN's are not.
    if isinstance(weight, Reordered) or (x.dtype == torch.float32 and _has_onednn(x.device) and len(x)):
        tensor = weight.weight if isinstance(weight, Reordered) else weight
        return torch.ops.mkldnn._linear_pointwise(x, tensor, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _mkl_is_fast() -> bool:
    """Faster than oneDNN, that is; of float32. Only where no sum has to be decoding's."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.exists() and "GenuineIntel" in info.read_text()


def product_backward(grad: Tensor, weight: Tensor | Tiles) -> Tensor:
    """The gradient [T, in] with respect to `product`'s x, given `grad` [T, out]."""
    if isinstance(weight, Tiles):
        return weight.backward(grad)
    return grad @ weight if grad.dtype == torch.float32 and _mkl_is_fast() else product(grad, weight.t())


def add_weight_gradient(into: Tensor, grad: Tensor, x: Tensor, weight: Tensor | Tiles) -> None:
    """Adds to `into` [out, in] the gradient with respect to `product`'s weight, given `grad` [T, out]."""
    if isinstance(weight, Tiles) and into.dtype == torch.float32:
        add_gradient(grad, x, into)
    elif into.dtype == grad.dtype:
        into.addmm_(grad.t(), x)
    else:
        into += grad.t() @ x


class _Linear(torch.autograd.Function):
    """Of a matrix of `sources`, or of the one tensor that `sources` is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tiles | None, bias: Tensor | None, *sources: Tensor) -> Tensor:
        ctx.tiled = tiles is not None
        ctx.save_for_backward(x, *sources)
        weight, outs = (tiles, tiles.outs) if tiles is not None else (sources[0], len(sources[0]))
        (out,) = made(lambda: (product(x, weight, bias),))
        return x.new_empty(len(x), outs) if out is None else out  # None: it is not asked for again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *sources = ctx.saved_tensors
        weight = Tiles(tuple(sources)) if ctx.tiled else sources[0]
        wants_x, _, wants_bias, *wants_weights = ctx.needs_input_grad
        grad = grad.contiguous()
        of_weights: list[Tensor] | list[None] = [None] * len(sources)
        if any(wants_weights):
            of_weights = weight.gradients(grad, x) if isinstance(weight, Tiles) else [grad.t() @ x]
        return (
            product_backward(grad, weight) if wants_x else None,
            None,
            grad.sum(0) if wants_bias else None,
            *of_weights,
        )


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """`product` with a gradient, but for a matrix that was laid out for those without."""
    if isinstance(weight, Reordered | Strips) or not (torch.is_grad_enabled() or current() is not None):
        return product(x, weight, bias)
    if isinstance(weight, Tiles):
        return _Linear.apply(x, weight, bias, *weight.sources)
    return _Linear.apply(x, None, bias, weight)
