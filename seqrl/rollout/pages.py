"""The key-value cache of decoding as pages: a row takes another when its last is full, and rows that continue
one prompt look at the same pages of it. Memory follows the tokens that there are.

Shape legend: K key heads, D head size; a page is C columns of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from seqrl.native.weights import Weights

_GROWTH = 1.25
"""Pages after it, by those before: each time everything is copied, and graphs are captured anew."""
_SPARED = 1 / 16
"""Share of a GPU's memory that is left for what a step makes."""


class Pages:
    """Of all layers. Page 0 belongs to nobody, and takes what is written for nobody's rows."""

    def __init__(self, weights: Weights, columns: int, moving: Callable[[], None]) -> None:
        """`moving` is called before pages come to lie elsewhere."""
        self.columns, self._moving = columns, moving
        turn, self._device = weights.turn, weights.embedding.device
        # Zeros: what lies behind the last column of a row still enters a product.
        empty = torch.zeros(0, columns, turn.kv_heads, turn.size, dtype=weights.dtype, device=self._device)
        self.keys, self.values = ([empty] * len(weights.layers) for _ in range(2))
        """[pages, C, K, D] of each layer."""
        self.bytes_each = 2 * len(weights.layers) * empty.element_size() * math.prod(empty.shape[1:])
        self.count = 0
        self.free: list[int] = []

    @property
    def share(self) -> float:
        """Of the device's memory; 0 without CUDA."""
        if self._device.type != "cuda":
            return 0.0
        return self.count * self.bytes_each / torch.cuda.mem_get_info(self._device)[1]

    def begin(self) -> None:
        """All are free."""
        self.free = list(range(1, self.count))

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "taken without a look at `make`"
        return taken

    def make(self, count: int) -> int:
        """Has `count` pages free, as far as there is memory; how many are."""
        if count > len(self.free):
            wanted = self.count + count - len(self.free) + (self.count == 0)
            most = self.count + free_bytes(self._device) / self.bytes_each
            self._grow(int(min(max(wanted, self.count * _GROWTH), most)))
        return len(self.free)

    def _grow(self, count: int) -> None:
        """To so many pages in all, layer by layer: at no time is more than one layer there twice."""
        if count <= self.count:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is queued still reads them
        self._moving()
        try:
            for store in (self.keys, self.values):
                for layer, before in enumerate(store):
                    larger = before.new_zeros(count, *before.shape[1:])
                    larger[: self.count] = before[: self.count]
                    store[layer] = larger
                    del before, larger
        except torch.OutOfMemoryError:  # memory in pieces: those that are larger by now are no harm
            return
        self.free += range(max(self.count, 1), count)
        self.count = count


def free_bytes(device: torch.device) -> float:
    """That a cache may take."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free + kept - _SPARED * total, 0)
