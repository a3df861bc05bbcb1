"""Our experts against transformers' own, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqrl.training import experts


@pytest.fixture
def layer(make_model: Callable[..., Any]) -> Any:
    experts.register()
    return make_model("qwen3_moe").model.layers[0].mlp.experts.double()


def run(layer: Any, implementation: str, chosen: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the hidden states, the weights of the choice and the experts."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(chosen), layer.hidden_dim)
    hidden = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(chosen.shape, dtype=torch.float64, generator=generator).requires_grad_()
    toward = torch.randn(shape, dtype=torch.float64, generator=generator)
    layer.config._experts_implementation = implementation
    layer.zero_grad()
    out = layer(hidden, chosen, weights)
    (out * toward).sum().backward()
    return [out.detach(), hidden.grad, weights.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 1], [3, 2], [1, 3], [2, 0], [0, 3]],
        [[1, 2], [2, 1], [1, 2]],  # two experts have nobody
        [[3, 0]],
    ],
)
def test_sorted_experts_are_transformers_own(layer: Any, chosen: list[list[int]]) -> None:
    ours, theirs = (run(layer, name, torch.tensor(chosen)) for name in ("sorted", "eager"))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)
    idle = sorted(set(range(4)) - {expert for pair in chosen for expert in pair})
    assert not ours[-1][idle].any(), "an expert nobody chose has no gradient"


def test_under_autocast_the_products_are_of_the_lower_type(layer: Any) -> None:
    layer = layer.float()
    layer.config._experts_implementation = "sorted"
    hidden, chosen, weights = torch.randn(6, layer.hidden_dim), torch.tensor([[0, 1]] * 6), torch.rand(6, 2)
    with torch.no_grad():
        exact = layer(hidden, chosen, weights)
        with torch.autocast("cpu", torch.bfloat16):
            rough = layer(hidden, chosen, weights)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
