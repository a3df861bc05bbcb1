"""Calling the C functions with tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from seqrl.kernels.build import library

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""Of the functions for a storage type."""
LANES = 16
"""Numbers of a vector."""


def fits(stream: torch.dtype, compute: torch.dtype, device: torch.device, *widths: int) -> bool:
    """Whether there is C for a residual stream and products of these types and rows of these widths."""
    return _has_c(stream, compute, device, widths) and library() is not None


@functools.cache  # a token step asks dozens of times
def _has_c(stream: torch.dtype, compute: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> bool:
    return (
        device.type == "cpu"
        and compute in SUFFIX
        and stream in (torch.float32, compute)
        and all(width % LANES == 0 for width in widths)
    )


def has_tiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in this type go through the processor's matrix unit (tiles.c)."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    loaded = library()
    return loaded is not None and bool(loaded.tiles_here())


def call(name: str, *arguments: Any) -> None:
    """Calls the C function with tensors as pointers. Raises MemoryError where it found none."""
    loaded = library()
    assert loaded is not None, "asked without a look at `fits`"
    said = [address(x) if isinstance(x, Tensor) else x for x in arguments]
    if getattr(loaded, name)(*said):
        raise MemoryError(f"{name}: no memory for scratch space")


def address(x: Tensor | None) -> int | None:
    """Of its numbers; NULL of None."""
    if x is None:
        return None
    assert x.is_contiguous(), "the C reads numbers side by side"
    return x.data_ptr()


def words_of(numbers: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of `numbers` of each of 16 rows whose words lie across the lanes of vectors (words.h)."""
    return (numbers // 2, LANES, 2) if dtype == torch.bfloat16 else (numbers, LANES)


def types_of(stream: torch.dtype, compute: torch.dtype) -> str:
    """The end of the name of a function for both."""
    return f"{SUFFIX[stream]}_{SUFFIX[compute]}"
