"""Products of decoding that are the library's to the last bit (kernels/strips.c)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import near, random

from seqrl.kernels import Strips, laid_out, linear

BITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SIZES = [(96, 32), (64, 512), (352, 576), (1024, 1024), (32, 1088), (512, 1536), (64, 3072)]


@pytest.fixture(params=BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def strips(weight: torch.Tensor) -> Strips:
    made = laid_out(weight)
    if not isinstance(made, Strips):
        pytest.skip("the library adds up in a way of its own on this processor")
    return made


@pytest.mark.parametrize(("outs", "ins"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_they_say_what_training_says(
    threads: int, dtype: torch.dtype, outs: int, ins: int, with_bias: bool
) -> None:
    weight, bias = random(outs, ins).to(dtype), random(outs, seed=2).to(dtype) if with_bias else None
    made = strips(weight)
    x = random(1000, ins, seed=3).to(dtype)
    theirs = linear(x, weight, bias)
    for rows in (4, 5, 130, 1000):
        if not torch.equal(linear(x[:rows], weight, bias), theirs[:rows]):
            pytest.skip("the library's sums depend on the number of rows on this processor")
        assert torch.equal(linear(x[:rows], made, bias), theirs[:rows])
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    near([linear(x, made, bias)], [exact], BITS[dtype])


@pytest.mark.parametrize(("outs", "ins"), SIZES)
def test_no_number_depends_on_how_many_rows_there_are(dtype: torch.dtype, outs: int, ins: int) -> None:
    made, x = strips(random(outs, ins).to(dtype)), random(300, ins, seed=1).to(dtype)
    whole = linear(x, made)
    for first, count in ((0, 0), (0, 1), (3, 2), (120, 9), (7, 200)):
        assert torch.equal(linear(x[first : first + count], made), whole[first : first + count])


def test_other_sizes_stay_with_the_library(dtype: torch.dtype) -> None:
    for outs, ins in ((351, 64), (64, 48)):
        assert not isinstance(laid_out(random(outs, ins).to(dtype)), Strips)
