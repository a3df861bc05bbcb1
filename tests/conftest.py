"""What holds for every test: one thread, a fresh logger, and examples that are the same each time."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqrl.config.load as load

# Drawn anew, a rare example would fail a change that has nothing to do with it; `make fuzz` draws anew.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("anew", deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes each of seqrl's own recipes once a process, not anew for each command line."""
    compose, kept = load._compose, dict[Any, Any]()

    def composed(defaults: dict[str, Any], name: str, directory: Path | None) -> dict[str, Any]:
        if directory is not None:  # a test's own folder, whose files may change
            return compose(defaults, name, directory)
        if (key := (name, load.RECIPES, *defaults)) not in kept:
            kept[key] = compose(defaults, name, directory)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_compose", composed)
        yield


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """`main` sets up logging for a process of its own; the next test is another process to it."""
    yield
    logger = logging.getLogger("seqrl")
    logger.handlers.clear()
    logger.propagate = True


class Transfers(TorchDispatchMode):
    """Sees each tensor that goes from the host to a device without numbers, and holds that nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.sent = 0

    def pin(self, x: Tensor) -> Tensor:
        """Stands for pinned memory, which only a machine with CUDA has."""
        x = x.clone()
        self.pinned.add(x.data_ptr())
        return x

    def _see(self, x: Tensor, non_blocking: Any) -> None:
        if x.device.type == "cpu":
            assert non_blocking and x.data_ptr() in self.pinned, "the host waits for it"
            self.sent += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            self._see(args[0], kwargs.get("non_blocking"))
        if func is torch.ops.aten.copy_.default and args[0].device == META:
            self._see(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if func is torch.ops.aten.segment_reduce.default:
            assert args[0].device.type == "cpu" or kwargs.get("unsafe"), "its check waits for the device"
        return func(*args, **kwargs)


META = torch.device("meta")


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    """Has the device `meta` stand for CUDA in half precision. It has shapes and no numbers, so that whoever
    looks at one, and would make the host wait for a GPU, gets an error. `with` it, transfers are watched."""
    transfers = Transfers()
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: self.device == META))
    monkeypatch.setattr("seqrl.kernels.transfer.pinned", transfers.pin)
    fused = sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(*fused, lambda: ["meta"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype=None, enabled=True: nullcontext())
    return transfers
