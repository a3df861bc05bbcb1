"""What CUDA runs compiled, compiled here for the CPU: the same numbers, for any number of rows.

Compiling takes seconds, twenty the first time on a machine, so there are few of these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seqrl.kernels import fused, head, layers

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def gradient_arguments(rows: int) -> tuple[Any, ...]:
    """In the place of the logits."""
    logits, at = random(rows, 40).to(BF16), torch.arange(rows) % 50 - 5
    return logits, at, 0.7, random(rows) + 4, *(random(rows) for _ in "abcd"), logits, None


ARGUMENTS = {
    layers._add_norm_by_torch: lambda n: (random(n, 64), random(n, 64).to(BF16), random(64), 1e-6, BF16),
    head._gradient_by_torch: gradient_arguments,
}


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda f: f.__name__)
def test_compiled_it_says_the_same_of_any_number_of_rows(function: Any) -> None:
    plain, compiled = function.__wrapped__, fused.compiled_by_rows(function.__wrapped__)
    for rows in (5, 33, 200):
        ours, right = ARGUMENTS[function](rows), ARGUMENTS[function](rows)
        made, expected = compiled(*ours), plain(*right)
        torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours[0], right[0], rtol=1e-2, atol=1e-2)  # written to by the second
        torch.compiler.set_stance("fail_on_recompile")


def test_it_is_compiled_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    monkeypatch.setattr(fused, "compiled_by_rows", lambda function: lambda x: "compiled")
    function, x = fused.fused(doubled), torch.ones(3)
    assert torch.equal(function(x), 2 * x) and function.__name__ == "doubled"
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for can, expected in ((True, "compiled"), (False, "tensor")):
        monkeypatch.setattr(fused, "compiles", lambda can=can: can)
        assert ("compiled" if isinstance(function(x), str) else "tensor") == expected


@pytest.mark.parametrize("switch", ["1", "0"])
def test_where_there_is_no_triton_it_is_told_once(
    switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SEQRL_KERNELS", switch)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    fused._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING, logger="seqrl"):
        assert not fused.compiles() and not fused.compiles()
    fused._has_triton.cache_clear()
    assert len(caplog.messages) == int(switch)
    assert all("Triton" in message and "SEQRL_KERNELS=0" in message for message in caplog.messages)


def test_where_the_compiler_fails_it_is_told_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    tried = []

    def fails(*arguments: Any) -> None:
        tried.append(arguments)
        raise TorchDynamoException("no C compiler\nand more")

    monkeypatch.setattr(fused, "compiled_by_rows", lambda function: fails)
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    monkeypatch.setattr(fused, "_failures", [])
    monkeypatch.setattr(Tensor, "is_cuda", True)
    doubled, x = fused.fused(lambda x: 2 * x), torch.ones(3)
    with caplog.at_level(logging.WARNING, logger="seqrl"):
        assert all(torch.equal(doubled(x), 2 * x) for _ in range(3))
    assert len(tried) == 1
    assert [message.count("no C compiler;") for message in caplog.messages] == [1]
