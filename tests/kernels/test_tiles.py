"""Products on the processor's matrix unit against float64; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import BF16, ERROR, F32, near, random
from torch import Tensor

from seqrl.kernels import (
    Tiles,
    expert_products,
    expert_products_backward,
    has_tiles,
    laid_out,
    matrix,
    product,
)
from seqrl.kernels.products import add_weight_gradient, product_backward

pytestmark = pytest.mark.skipif(not has_tiles(BF16, torch.device("cpu")), reason="no matrix unit here")

SHAPES = [(1, 32, 16), (5, 64, 350), (40, 100, 48), (300, 512, 96), (33, 31, 7), (257, 160, 290), (0, 64, 48)]
SHAPES += [(257, 1536, 1100), (70, 1025, 40), (544, 513, 530)]
"""Rows, ins, outs: whole tiles, and what is left over in every direction; more than is added up in one go."""


def tiles(*sources: Tensor) -> Tiles:
    made = matrix(*sources, dtype=BF16)
    assert isinstance(made, Tiles)
    return made


@pytest.mark.parametrize(("rows", "ins", "outs"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_products(threads: int, rows: int, ins: int, outs: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight, grad = random(rows, ins), random(outs, ins, seed=1), random(rows, outs, seed=2)
    bias = random(outs, seed=3) if biased else None
    w = tiles(weight.to(dtype))
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    for each in (w, laid_out(w)):
        near([product(x.to(BF16), each, bias)], [exact], ERROR[BF16])
    near([product_backward(grad.to(BF16), w)], [grad.double() @ weight.double()], ERROR[BF16])
    (of_weight,) = w.gradients(grad.to(BF16), x.to(BF16))
    assert of_weight.dtype == dtype
    near([of_weight], [grad.double().t() @ x.double()], ERROR[dtype])


def test_sources_are_joined_and_have_a_gradient_each(threads: int) -> None:
    sources = [random(rows, 64, seed=rows) for rows in (48, 16, 35)]
    x, grad, whole = random(50, 64), random(50, 99, seed=2), torch.cat(sources).double()
    w = tiles(*sources)
    near([product(x.to(BF16), w)], [x.double() @ whole.t()], ERROR[BF16])
    near([product_backward(grad.to(BF16), w)], [grad.double() @ whole], ERROR[BF16])
    exact = (grad.double().t() @ x.double()).split([48, 16, 35])
    near(w.gradients(grad.to(BF16), x.to(BF16)), exact, ERROR[F32])


def test_sources_that_end_within_a_tile_are_not_joined() -> None:
    assert isinstance(matrix(random(20, 64), random(16, 64), dtype=BF16), Tensor)
    assert isinstance(matrix(random(20, 64).double(), dtype=BF16), Tensor)
    assert isinstance(matrix(random(20, 64), dtype=F32), Tensor)


def test_a_gradient_is_added(threads: int) -> None:
    x, grad, before = random(70, 40), random(70, 33, seed=2), random(33, 40, seed=4)
    into = before.clone()
    add_weight_gradient(into, grad.to(BF16), x.to(BF16), tiles(random(33, 40)))
    near([into], [before.double() + grad.double().t() @ x.double()], ERROR[F32])


@pytest.mark.parametrize("ins", [64, 1536])
def test_a_row_is_the_same_bit_for_bit_in_any_company(threads: int, ins: int) -> None:
    """Decoding, few rows at a time, then says what training says."""
    x, w = random(600, ins).to(BF16), laid_out(tiles(random(80, ins, seed=1)))
    together = product(x, w)
    for rows in (1, 4, 16, 17, 44, 300):
        assert torch.equal(product(x[:rows].contiguous(), w), together[:rows])


def test_a_row_that_is_no_number_stays_alone() -> None:
    x, w = random(40, 64).to(BF16), tiles(random(48, 64, seed=1))
    x[7], x[9, 3] = torch.nan, torch.inf
    y = product(x, w)
    assert y[7].isnan().all() and not y[9].isfinite().any()
    others = torch.ones(40, dtype=torch.bool)
    others[[7, 9]] = False
    assert y[others].isfinite().all()


@pytest.mark.parametrize("counts", [[9, 0, 1, 25], [0, 0, 0, 3], [0, 0, 0, 0], [8, 16, 7, 300]], ids=str)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("ins", [48, 1030])
def test_experts(threads: int, counts: list[int], scattered: bool, dtype: torch.dtype, ins: int) -> None:
    rows, generator = sum(counts), torch.Generator().manual_seed(3)
    token = torch.randint(max(rows // 2, 1), (rows,), generator=generator) if scattered else None
    x = random(max(rows // 2, 1) if scattered else rows, ins)
    weight, grad = random(4, 80, ins, seed=1), random(rows, 80, seed=7)
    ends = torch.tensor(counts).cumsum(0)
    pairs: Any = (x if token is None else x[token]).double().requires_grad_()
    wide: Any = weight.double().requires_grad_()
    parts = zip(pairs.split(counts), wide, strict=True)
    exact = torch.cat([part @ matrix.t() for part, matrix in parts])
    exact.backward(grad.double())
    w = Tiles((weight.to(dtype),))
    for each in (w, w.laid_out()):
        near([expert_products(x.to(BF16), token, each, ends)], [exact.detach()], ERROR[BF16])
    of_rows, of_weight = expert_products_backward(grad.to(BF16), x.to(BF16), token, w, ends)
    near([of_rows], [pairs.grad], ERROR[BF16])
    near([of_weight], [wide.grad], ERROR[dtype])
