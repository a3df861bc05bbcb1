"""Runs of a test with the C and without, on one thread and on two."""

from __future__ import annotations

import pytest
import torch

from seqrl.kernels import call, fused, library


@pytest.fixture(params=["C", "torch", "as on CUDA"])
def in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the C, with torch's own operations in its place, and with those that CUDA has."""
    if request.param != "C":
        monkeypatch.setattr(call, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C compiler here")
    if request.param == "as on CUDA":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(fused, "compiles", lambda: False)
    return request.param == "C"
