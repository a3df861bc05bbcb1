"""CUDA graphs of decoding: a step is captured once, and from then on one call launches all its kernels.

A captured step reads and writes the tensors that it met, by address: whoever wants another outcome fills
them, and what a step makes for itself lies in memory that all graphs share, since no two run at once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger(__name__)

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
        self._stream = torch.cuda.Stream()
        self._latest: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def __call__(self, step: Step) -> Step:
        # Once outside of a graph, on the stream of the capture: libraries set themselves up, and what is
        # compiled at the first call is compiled.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, latest = torch.cuda.CUDAGraph(), self._latest()
        pool = None if latest is None else latest.pool()  # that of one which is no more is not used again
        # Other threads may do with the device what they like: nothing of theirs belongs to this graph.
        how: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, pool=pool, **how):
                step()
        except RuntimeError as error:
            _log.warning("rollout: a step cannot be captured, which makes it slower: %s", error)
            return step
        self._latest = weakref.ref(graph)
        return graph.replay
