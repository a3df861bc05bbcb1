"""Products of matrices, by the library that is fastest at them here.

Shape legend: T tokens.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels.record import current, made


def _has_onednn(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
    )


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can lay out matrices of this type for many products."""
    if dtype == torch.bfloat16:
        return _has_onednn(device) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _has_onednn(device) and dtype == torch.float32


def recurring(rows: int, device: torch.device) -> int:
    """At least `rows`, and hardly more: one of few numbers of rows that come again and again.

    On a CPU oneDNN compiles a kernel for each shape it meets, which takes milliseconds, as long as many a
    product itself.
    """
    if device.type != "cpu":
        return rows
    if rows <= 8:
        return max(rows, 4)  # fewer rows are added up in another order
    step = max(4, 2 ** (rows.bit_length() - 5))
    return -(-rows // step) * step


def filled_up(x: Tensor) -> Tensor:
    """`x` [T], of rows, and zeros for rows that nobody sees, up to a number that recurs."""
    return F.pad(x, (0, recurring(len(x), x.device) - len(x)))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in] times the transpose of `weight` [out, in], plus `bias` [out]; without gradient."""
    # MKL's float32 products are slow on processors of other makers; oneDNN's are not.
    if x.dtype == torch.float32 and _has_onednn(x.device) and x.shape[0]:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        (out,) = made(lambda: (product(x, weight, bias),))
        return x.new_empty(len(x), len(weight)) if out is None else out  # None: it is not asked for again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            product(grad, weight.t()) if wants_x else None,
            grad.t() @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` with a gradient."""
    if torch.is_grad_enabled() or current() is not None:
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)
