"""Runs of a test with the C and without, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from seqrl.kernels import call, library


@pytest.fixture(params=["C", "torch"])
def in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Twice: with the C, and with torch's own operations in its place."""
    if request.param == "torch":
        monkeypatch.setattr(call, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C compiler here")
    return request.param == "C"


@pytest.fixture
def c_only() -> None:
    """For operations whose other form is elsewhere."""
    if library() is None:
        pytest.skip("no C compiler here")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
