"""What stands around attention and experts: the residual stream with its norms, and gates.

In C where it `fits`, compiled by torch on CUDA (`fused`), else torch's own operations with the same meaning.
Arithmetic is float32 (float64 of float64 tensors) whatever the tensors are held in.

Shape legend: T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels.call import SUFFIX, call, fits, types_of
from seqrl.kernels.fused import fused
from seqrl.kernels.record import current, made


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        def compute() -> tuple[Tensor, ...]:
            if x.is_cuda:
                return _add_norm_by_torch(x, delta, weight, eps, dtype)
            rstd = x.new_empty(len(x), dtype=torch.float32)
            return *_add_norm_in_c(x, delta, weight, eps, dtype, rstd), rstd

        if delta is not None and (record := current()) is not None:
            record.forget(delta)
        out, y, rstd = made(compute)
        ctx.save_for_backward(out, weight, rstd)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, carried: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        out, weight, rstd = ctx.saved_tensors
        if dy is None:
            assert carried is not None
            return carried, carried.to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None, None
        if out.is_cuda:
            found = _add_norm_backward_by_torch(out, dy, carried, weight, rstd, ctx.dtype)
            return found[0], found[1] if ctx.needs_input_grad[1] else None, found[2], None, None
        rows, width = out.shape
        dx, threads = torch.empty_like(out), torch.get_num_threads()
        ddelta = None
        if ctx.needs_input_grad[1]:
            ddelta = dx if ctx.dtype == dx.dtype else torch.empty_like(dx, dtype=ctx.dtype)
        dweight = torch.zeros(threads, width)
        call(
            f"add_norm_backward_{types_of(out.dtype, ctx.dtype)}",
            *(rows, width, out, weight, rstd, dy.contiguous()),
            *(None if carried is None else carried.contiguous(), dx),
            *(None if ddelta is dx else ddelta, dweight, threads),
        )
        return dx, ddelta, dweight.sum(0).to(weight.dtype), None, None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual stream `x` [T, H] with `delta` [T, H] added, and its RMS norm in `dtype`.

    Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    in_c = fits(x.dtype, dtype, x.device, x.shape[1])
    if not in_c and not x.is_cuda:
        x = x if delta is None else x + delta
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, (F.rms_norm(wide, x.shape[1:], eps=eps) * weight).to(dtype)
    if torch.is_grad_enabled() or current() is not None:
        return _AddNorm.apply(x, delta, weight, eps, dtype)
    if in_c:
        return _add_norm_in_c(x, delta, weight, eps, dtype, None)
    return _add_norm_by_torch(x, delta, weight, eps, dtype)[:2]


@fused
def _add_norm_by_torch(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """And 1 / rms of the rows, [T]."""
    x = x if delta is None else x + delta
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(1) + eps).rsqrt()
    return x, (wide * rstd[:, None] * weight).to(dtype), rstd


@fused
def _add_norm_backward_by_torch(
    out: Tensor, dy: Tensor, carried: Tensor | None, weight: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of delta in `dtype`, and of the weight."""
    normed = out.to(rstd.dtype) * rstd[:, None]
    of_normed = dy.to(rstd.dtype) * weight
    dx = (of_normed - normed * (of_normed * normed).mean(1, keepdim=True)) * rstd[:, None]
    dx = dx if carried is None else dx + carried
    dweight = (dy.to(rstd.dtype) * normed).sum(0)
    return dx.to(out.dtype), dx.to(dtype), dweight.to(weight.dtype)


def _add_norm_in_c(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes 1 / rms of the rows to `rstd` [T], too."""
    out = x if delta is None else torch.empty_like(x)
    y = x.new_empty(x.shape, dtype=dtype)
    call(f"add_norm_{types_of(x.dtype, dtype)}", *x.shape, x, delta, weight, eps, out, y, rstd)
    return out, y


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `gate_up` [T, 2 I] -> [T, I] (SwiGLU, arXiv 2002.05202)."""
    width = gate_up.shape[1] // 2
    if not fits(gate_up.dtype, gate_up.dtype, gate_up.device, width) and not gate_up.is_cuda:
        return _gated_by_torch(gate_up)  # with a gradient
    if (gate_up.requires_grad and torch.is_grad_enabled()) or current() is not None:
        return _Gated.apply(gate_up)
    return _gated_without_gradient(gate_up)


def _gated_without_gradient(gate_up: Tensor) -> Tensor:
    if gate_up.is_cuda:
        return _gated_by_torch(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    call(f"gate_{SUFFIX[gate_up.dtype]}", rows, width, gate_up, out)
    return out


def gated_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient [T, 2 I] with respect to `gate_up`, given `grad` [T, I]."""
    if not fits(gate_up.dtype, gate_up.dtype, gate_up.device, grad.shape[1]):
        return _gated_backward_by_torch(gate_up, grad)
    result = torch.empty_like(gate_up)
    call(f"gate_backward_{SUFFIX[gate_up.dtype]}", *grad.shape, gate_up, grad.contiguous(), result)
    return result


@fused
def _gated_by_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


@fused
def _gated_backward_by_torch(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    of_gate = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return torch.cat([of_gate, grad * gate * sigmoid], dim=1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated_without_gradient(gate_up)  # once more where it is replayed: a sixth less is recorded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(gate_up, grad)
