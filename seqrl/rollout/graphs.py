"""CUDA graphs of decoding: a step is captured once, and from then on one call launches all its kernels.

A captured step reads and writes the tensors that it met, by address: whoever wants another outcome fills
them, and what a step makes for itself lies in memory that all graphs share, since no two run at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Runs a step, and gives back what runs it again."""


class Graphs:
    """By key: a step that has run under a key is replayed there, whatever else is given."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._kept: dict[int, Step] = {}

    def run(self, key: int, step: Step) -> None:
        if key in self._kept:
            self._kept[key]()
        else:
            self._kept[key] = self._capture(step)

    def forget(self) -> None:
        """The tensors that they know move."""
        self._kept.clear()


class CudaCapture:
    """See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Step) -> Step:
        # Once outside of a graph, on the stream of the capture: libraries set themselves up, and what is
        # compiled at the first call is compiled.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may do with the device what they like: nothing of theirs belongs to this graph.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
