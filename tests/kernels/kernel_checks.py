"""Numbers that every type holds exactly, one way to take gradients, and one to compare with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ERROR = {F32: 3e-6, BF16: 6e-3}
"""How far off in the norm, relative to what is right; a bfloat16 is rounded by up to 1 in 256."""
TYPES = [(F32, F32), (BF16, BF16), (F32, BF16)]
"""Of the residual stream and of the matrix products."""
TYPE_IDS = ["float32", "bfloat16", "mixed"]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers rounded to bfloat16, held in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def results(
    operation: Callable[..., Any], *inputs: Tensor | None, through: Sequence[int] = (0, 1, 2)
) -> list[Tensor]:
    """The outputs of an operation, then the gradients of its inputs for a loss of the outputs `through`."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    made = operation(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    wanted = [(x, random(*x.shape, seed=7 + i).to(x.dtype)) for i, x in enumerate(outputs) if i in through]
    torch.autograd.backward([x for x, _ in wanted], [toward for _, toward in wanted])
    return [x.detach() for x in outputs] + [x.grad for x in leaves if x is not None and x.grad is not None]


def near(ours: Sequence[Tensor], exact: Sequence[Tensor], error: float) -> None:
    """Holds each of `ours` against float64, all of it and its worst number."""
    assert len(ours) == len(exact)
    for our, right in zip(ours, exact, strict=True):
        assert our.shape == right.shape
        assert right.dtype == F64
        if right.numel():
            off = our.double() - right
            assert off.norm() <= error * right.norm()
            assert off.abs().max() <= 2 * error * right.abs().max()
