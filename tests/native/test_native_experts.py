"""Mixtures of experts against the formula in float64, token by token: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqrl.kernels import expert_matrices, laid_out_experts
from seqrl.native.experts import Experts, mixture

F32, BF16 = torch.float32, torch.bfloat16
ERROR = {F32: 3e-6, BF16: 2e-2}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def choices(tokens: int, experts: int, top_k: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, top_k, dtype=torch.long)


def by_formula(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, experts, shares in zip(x, chosen.tolist(), weights, strict=True):
        out = torch.zeros_like(token)
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            out = out + share * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
        rows.append(out)
    return torch.stack(rows) if rows else x


def learnt(chosen: Tensor, dtype: torch.dtype, formula: bool, tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input, the routing weights and the experts."""
    x, weights, gate_up, down = (tensor.to(dtype).clone() for tensor in tensors)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    out = (by_formula if formula else mixture)(x, chosen, weights, gate_up, down)
    out.backward(random(*out.shape, seed=7).to(dtype))
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def near(ours: list[Tensor], exact: list[Tensor], error: float) -> None:
    for our, right in zip(ours, exact, strict=True):
        assert our.shape == right.shape
        assert (our.double() - right).norm() <= error * right.norm()


SHAPES = {  # tokens, experts, top_k, hidden, intermediate
    "few": (5, 4, 2, 32, 32),
    "64 experts, top 8": (40, 64, 8, 64, 32),
    "one token": (1, 64, 8, 32, 32),
    "one expert": (6, 1, 1, 96, 32),
    "many rows": (200, 4, 2, 96, 64),
    "multiples of 16, not of 32": (7, 4, 2, 48, 16),
    "widths the C does not take": (7, 4, 2, 20, 10),
    "no tokens": (0, 4, 2, 32, 32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_mixture_and_its_gradients(
    in_c: bool, threads: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tokens, experts, top_k, hidden, intermediate = shape
    chosen = choices(tokens, experts, top_k)
    tensors = [
        random(tokens, hidden),
        random(tokens, top_k, seed=1).abs(),
        random(experts, 2 * intermediate, hidden, seed=2) / 4,
        random(experts, hidden, intermediate, seed=3) / 4,
    ]
    exact = learnt(chosen, torch.float64, True, tensors)
    ours = learnt(chosen, dtype, False, tensors)
    assert {t.dtype for t in ours} == {dtype}
    near(ours, exact, ERROR[dtype])


def test_experts_with_no_rows_have_a_gradient_of_zeros(in_c: bool) -> None:
    chosen = torch.tensor([[1, 6], [6, 1], [3, 6]])
    tensors = [random(3, 32), random(3, 2, seed=1), random(8, 64, 32, seed=2), random(8, 32, 32, seed=3)]
    exact = learnt(chosen, torch.float64, True, tensors)
    ours = learnt(chosen, F32, False, tensors)
    near(ours, exact, ERROR[F32])
    for gradient in ours[3:]:
        assert gradient.flatten(1).any(1).tolist() == [False, True, False, True, False, False, True, False]


def test_frozen_experts_pass_the_gradient_on(in_c: bool) -> None:
    chosen = choices(5, 4, 2)
    x, weights = random(5, 32).requires_grad_(), random(5, 2, seed=1)
    gate_up, down = random(4, 64, 32, seed=2), random(4, 32, 32, seed=3)
    mixture(x, chosen, weights, gate_up, down).sum().backward()
    free = x.detach().clone().requires_grad_()
    by_formula(free.double(), chosen, weights.double(), gate_up.double(), down.double()).sum().backward()
    assert free.grad is not None and x.grad is not None
    torch.testing.assert_close(x.grad, free.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 100])
@pytest.mark.parametrize("intermediate", [32, 16, 10])
def test_a_layer_laid_out_for_many_products_says_the_same(
    in_c: bool, threads: int, intermediate: int, tokens: int, dtype: torch.dtype
) -> None:
    """Of whatever width: with 16 the C takes the first of the two matrices and not the second."""
    chosen = choices(tokens, 64, 8)
    x, weights = random(tokens, 32).to(dtype), random(tokens, 8, seed=1).abs()
    sizes = (2 * intermediate, 32), (32, intermediate)
    gate_up, down = (random(64, *size, seed=2).to(dtype) / 4 for size in sizes)
    layer = laid_out_experts(*(expert_matrices(source, dtype=dtype) for source in (gate_up, down)))
    with torch.no_grad():
        said = mixture(x, chosen, weights, *layer)
    assert said.dtype == dtype
    exact = by_formula(x.double(), chosen, weights.double(), gate_up.double(), down.double())
    near([said], [exact], ERROR[dtype])


@pytest.mark.parametrize("normalise", [True, False])
def test_routing(in_c: bool, normalise: bool) -> None:
    """The `top_k` most probable experts, by their probabilities, scaled to 1 or as they are."""
    y, router = random(9, 32), random(6, 32, seed=5) / 4
    gate_up, down = random(6, 64, 32, seed=2) / 4, random(6, 32, 32, seed=3) / 4
    leaves = [t.clone().requires_grad_() for t in (y, router)]
    out = Experts(leaves[1], gate_up, down, 3, normalise)(leaves[0])
    out.sum().backward()

    exact = [t.double().requires_grad_() for t in (y, router)]
    probs = (exact[0] @ exact[1].t()).softmax(-1)
    chosen = probs.argsort(descending=True)[:, :3]
    weights = probs.gather(1, chosen)
    if normalise:
        weights = weights / weights.sum(1, keepdim=True)
    right = by_formula(exact[0], chosen, weights, gate_up.double(), down.double())
    right.sum().backward()
    near([out, *(t.grad for t in leaves)], [right, *(t.grad for t in exact)], 1e-5)
