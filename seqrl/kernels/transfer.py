"""Tensors between the host and a device, neither of which waits for the other."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of the host, on `device`. Work that is queued there goes on; nobody waits."""
    return x if device.type == "cpu" else pinned(x).to(device, non_blocking=True)


def fill(target: Tensor, x: Tensor) -> None:
    """Likewise, into `target`."""
    target.copy_(pinned(x), non_blocking=True)


def pinned(x: Tensor) -> Tensor:
    """In memory that a device fetches from by itself; without CUDA as it is."""
    return x.pin_memory() if torch.cuda.is_available() else x


class Arriving:
    """A tensor on its way to the host: whatever is queued after it goes on meanwhile."""

    def __init__(self, x: Tensor) -> None:
        """`x` is of its own memory, and nobody writes to it any more."""
        self._x, self._event = x, None
        if x.is_cuda:
            self._x = torch.empty_like(x, device="cpu", pin_memory=True)
            self._x.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """On the host; waits for it, and for nothing that was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._x
