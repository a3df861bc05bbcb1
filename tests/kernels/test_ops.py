"""What stands between matrix products, in C and in torch's own operations, against its formula in float64:
values and gradients. Attention, the cache and the draw have files of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import BF16, ERROR, F32, F64, TYPE_IDS, TYPES, double, near, random, results
from torch import Tensor

from seqrl.kernels import (
    PackedExperts,
    Spans,
    Turn,
    add_norm,
    combined,
    combined_backward,
    expert_products_backward,
    fits,
    gated,
    gated_backward,
    linear,
    pairs_by_expert,
    product,
    self_attention,
    turned,
)
from seqrl.kernels.products import recurring

CPU = torch.device("cpu")
EPS = 1e-2  # large enough to show


def test_what_fits(in_c: bool) -> None:
    assert [fits(*types, CPU, 32, 48) for types in TYPES] == [in_c] * 3
    assert fits(F32, F32, CPU) == in_c
    assert not fits(F32, F32, CPU, 32, 40)
    assert not fits(BF16, F32, CPU, 32)
    assert not fits(F64, F64, CPU, 32)
    assert not fits(torch.float16, torch.float16, CPU, 32)
    assert not fits(F32, F32, torch.device("meta"), 32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("biased", [True, False])
def test_linear(dtype: torch.dtype, rows: int, biased: bool) -> None:
    tensors = random(rows, 48), random(35, 48, seed=1), random(35, seed=2) if biased else None
    inputs = [None if x is None else x.to(dtype) for x in tensors]
    exact = results(F.linear, *double(*tensors))
    near(results(linear, *inputs), exact, ERROR[dtype])
    with torch.no_grad():
        near([linear(*inputs), product(*inputs)], 2 * exact[:1], ERROR[dtype])


@pytest.mark.parametrize("by_mkl", [True, False])
def test_inputs_gradients_are_the_same_by_either_library(
    by_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever this processor's maker decides for."""
    monkeypatch.setattr("seqrl.kernels.products._mkl_is_fast", lambda: by_mkl)
    tensors = random(50, 48), random(35, 48, seed=1)
    near(results(linear, *tensors), results(F.linear, *double(*tensors)), ERROR[F32])


def test_linear_takes_no_gradient_that_nobody_wants() -> None:
    x, weight = random(3, 16).requires_grad_(), random(5, 16)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 16))


def added_and_normed(x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone() if delta is None else x + delta
    return x, x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * weight


# 40: not a multiple of 16; 300 rows: enough for several threads.
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (300, 64), (3, 40)])
@pytest.mark.parametrize(("stream", "dtype"), TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm(
    in_c: bool,
    threads: int,
    rows: int,
    width: int,
    stream: torch.dtype,
    dtype: torch.dtype,
    with_delta: bool,
) -> None:
    x, weight = random(rows, width), random(width, seed=1)
    delta = random(rows, width, seed=2) if with_delta else None
    inputs = x.to(stream), None if delta is None else delta.to(dtype), weight.to(stream)

    def ours(x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, delta, weight, EPS, dtype)

    exact = results(added_and_normed, *double(x, delta, weight))
    made = results(ours, *inputs)
    assert [t.dtype for t in made[:2]] == [stream, dtype]
    assert [t.dtype for t in made[2:]] == [t.dtype for t in inputs if t is not None]
    near(made, exact, ERROR[dtype])
    with torch.no_grad():
        for with_gradient, without in zip(made, ours(*inputs), strict=False):
            assert torch.equal(with_gradient, without)


@pytest.mark.parametrize("through", [0, 1], ids=["stream", "norm"])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm_with_a_gradient_through_one_output(in_c: bool, through: int, with_delta: bool) -> None:
    inputs = random(5, 48), random(5, 48, seed=2) if with_delta else None, random(48, seed=1)
    exact = results(added_and_normed, *double(*inputs), through=(through,))
    near(results(lambda *x: add_norm(*x, EPS, F32), *inputs, through=(through,)), exact, ERROR[F32])


def test_add_norm_of_zeros_and_of_what_is_no_number(in_c: bool) -> None:
    x = random(4, 32)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    _, y = add_norm(x, None, torch.ones(32), 1e-6, F32)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert y[2, 5].isnan() and not y[2, :5].any()
    torch.testing.assert_close(y[3], F.rms_norm(x[3], (32,), eps=1e-6))


def test_a_row_of_add_norm_does_not_depend_on_the_others(in_c: bool) -> None:
    """Decoding, row by row, and training then make the same numbers of the same token."""
    x, delta, weight = random(300, 64), random(300, 64, seed=2), random(64, seed=1)
    together = add_norm(x, delta, weight, EPS, F32)[1]
    assert torch.equal(together[7:8], add_norm(x[7:8], delta[7:8], weight, EPS, F32)[1])


def rotary(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D / 2], as models have them."""
    angles = positions[:, None] * 100.0 ** -(torch.arange(0, size, 2) / size)
    return angles.cos(), angles.sin()


def turned_by_formula(x: Tensor, positions: Tensor, turn: Turn, weight: Tensor | None) -> Tensor:
    """Rotation in the complex plane, of number i with number i + D / 2."""
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + turn.eps).sqrt() * weight
    a, b = x.chunk(2, dim=-1)
    angle = torch.complex(turn.cos.double(), turn.sin.double())[positions][:, None]
    rotated = torch.complex(a, b) * angle
    return torch.cat([rotated.real, rotated.imag], dim=-1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("stream", "dtype"), TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 2, 32), (3, 1, 64), (2, 2, 96), (8, 1, 128), (2, 1, 8)]
)
def test_turned(
    in_c: bool, normed: bool, stream: torch.dtype, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> None:
    positions = torch.tensor([3, 0, 9, 9, 1])
    turn = Turn(heads, kv_heads, size, *rotary(torch.arange(10), size), eps=EPS)
    qkv = random(5, (heads + 2 * kv_heads) * size)
    weights = (random(size, seed=1), random(size, seed=2)) if normed else (None, None)
    q, k, v = qkv.double().view(5, -1, size).split([heads, kv_heads, kv_heads], dim=1)
    exact = [
        turned_by_formula(x, positions, turn, weight)
        for x, weight in zip((q, k), double(*weights), strict=True)
    ]
    cast = [None if weight is None else weight.to(stream) for weight in weights]
    made = turned(qkv.to(dtype), positions, turn, *cast)
    assert [x.dtype for x in made] == [dtype] * 3
    near(made, [*exact, v], ERROR[dtype])


def gated_by_formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (300, 64), (3, 40)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gated(in_c: bool, threads: int, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 2 * random(rows, 2 * width)
    exact = results(gated_by_formula, gate_up.double())
    near(results(gated, gate_up.to(dtype)), exact, 3 * ERROR[dtype])
    grad = random(rows, width, seed=7).to(dtype)  # the one of `results`
    near([gated_backward(gate_up.to(dtype), grad)], exact[1:], 3 * ERROR[dtype])


def test_gates_far_out(in_c: bool) -> None:
    """Where an exponential overflows or underflows; what is no number stays none, and alone."""
    gate = torch.tensor(
        [-1e4, -200.0, -89.0, -87.5, 87.5, 89.0, 200.0, 1e4, torch.nan, torch.inf, *[0.5] * 6]
    )
    gate_up = torch.cat([gate, torch.full((16,), 2.0)])[None]
    exact = 2 * F.silu(gate.double())
    torch.testing.assert_close(gated(gate_up)[0].double(), exact, rtol=1e-6, atol=1e-35, equal_nan=True)
    gradient = gated_backward(gate_up, torch.ones(1, 16))[0].view(2, 16)
    number = gate.isfinite()
    right = torch.stack([2 * (gate > 0).double(), F.silu(gate.double())])
    torch.testing.assert_close(gradient[:, :8].double(), right[:, :8], rtol=1e-6, atol=1e-35)
    assert gradient[:, number].isfinite().all() and gradient[:, 8].isnan().all()


def test_what_is_written_around_the_caches(c_only: None) -> None:
    """Large results are those of parts that are small enough to be written as usual, bit for bit."""
    sequences, length, width = 21, 100, 512
    tokens = sequences * length
    assert tokens * width * 4 > 4 << 20
    turn = Turn(8, 4, 64, *rotary(torch.arange(length), 64), eps=EPS)
    norms = 1 + random(2, 64, seed=5)
    x, delta, weight = random(tokens, width), random(tokens, width, seed=1), random(width, seed=2)
    gate_up, qkv = random(tokens, 2 * width, seed=3), random(tokens, 2 * width, seed=4)

    def made(count: int, first: int) -> list[Tensor]:
        """Of `count` sequences."""
        rows = slice(first * length, (first + count) * length)
        given = [t[rows].clone().requires_grad_() for t in (x, delta, qkv)]
        starts = torch.arange(count) * length
        spans = Spans(0 * starts, 0 * starts, starts, starts * 0 + length)
        positions = torch.arange(length).repeat(count)
        added, normed = add_norm(given[0], given[1], weight, EPS, F32)
        seen = self_attention(given[2], *norms, positions, turn, spans)
        torch.autograd.backward([added, normed, seen], [x[rows], delta[rows], x[rows]])
        gates = gate_up[rows]
        return [
            *(t.grad for t in given if t.grad is not None),
            *(normed.detach(), *turned(qkv[rows], positions, turn, *norms)[:2]),
            *(gated(gates), gated_backward(gates, x[rows])),
        ]

    parts = [made(7, first) for first in (0, 7, 14)]
    for whole, *in_parts in zip(made(sequences, 0), *parts, strict=True):
        assert torch.equal(whole, torch.cat(in_parts))


def sorted_pairs(tokens: int, top_k: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    place = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k)
    return random(tokens * top_k, width), place, torch.rand(tokens, top_k, generator=generator)


@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(1, 1, 16), (5, 2, 48), (50, 8, 64), (3, 2, 40), (0, 2, 16)]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_combined(in_c: bool, threads: int, tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    x, place, weights = sorted_pairs(tokens, top_k, width)

    def formula(x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tk,tkh->th", weights, x[place])

    exact = results(formula, x.double(), weights.double())
    near([combined(x.to(dtype), place, weights)], exact[:1], 2 * ERROR[dtype])
    near([combined(x.to(dtype), place, None)], [x.double()[place].sum(1)], 2 * ERROR[dtype])
    grad = random(tokens, width, seed=7).to(dtype)
    made = combined_backward(x.to(dtype), place, weights, grad)
    assert [t.dtype for t in made] == [dtype, F32]
    near(made, exact[1:], 2 * ERROR[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("counts", [[9, 0, 1, 25], [0, 0, 0, 3], [0, 0, 0, 0], [8, 16, 7, 300]], ids=str)
@pytest.mark.parametrize("scattered", [False, True])
def test_expert_products(
    c_only: None, threads: int, dtype: torch.dtype, counts: list[int], scattered: bool
) -> None:
    """Each expert's rows times its matrix, with the gradients of rows and matrices."""
    rows, generator = sum(counts), torch.Generator().manual_seed(3)
    token = torch.randint(max(rows // 2, 1), (rows,), generator=generator) if scattered else None
    x = random(max(rows // 2, 1) if scattered else rows, 32).to(dtype)
    weight, grad = random(4, 96, 32, seed=1).to(dtype), random(rows, 96, seed=7).to(dtype)
    ends = torch.tensor(counts).cumsum(0)
    assert PackedExperts.fit(weight)

    def formula(pairs: Tensor, weight: Tensor) -> Tensor:
        parts = zip(pairs.split(counts), weight, strict=True)
        return torch.cat([part @ matrix.t() for part, matrix in parts])

    pairs, wide = double((x if token is None else x[token]), weight)
    pairs.requires_grad_(), wide.requires_grad_()
    exact = formula(pairs, wide)
    exact.backward(grad.double())
    made = PackedExperts.of(weight)(x, token, ends)
    of_rows, of_weight = expert_products_backward(grad, x, token, weight, ends)
    assert [t.dtype for t in (made, of_rows, of_weight)] == [dtype] * 3
    near([made, of_rows, of_weight], [exact, pairs.grad, wide.grad], ERROR[dtype])


def test_no_c_for_matrices_of_odd_widths(c_only: None) -> None:
    for outs, ins in ((32, 48), (48, 32), (33, 32)):
        assert not PackedExperts.fit(torch.empty(2, outs, ins))
    assert not PackedExperts.fit(torch.empty(2, 32, 32, dtype=torch.float64))


def test_nothing_to_do(in_c: bool) -> None:
    """0 tokens, as a micro-batch may have them for an expert, give 0 rows and gradients of zeros."""
    weight, wide = random(96, 16).requires_grad_(), random(16).requires_grad_()
    x = torch.empty(0, 16, requires_grad=True)
    out, y = add_norm(x, torch.empty(0, 16), wide, EPS, F32)
    turn = Turn(1, 1, 32, *rotary(torch.arange(4), 32))
    turned_ = turned(linear(y, weight).detach(), torch.empty(0, dtype=torch.long), turn, None, None)
    made = gated(linear(y, weight[:32]))
    (out.sum() + made.sum()).backward()
    assert [tuple(t.shape) for t in turned_] == [(0, 1, 32)] * 3
    assert made.shape == (0, 16)
    assert x.grad.shape == (0, 16) and not weight.grad.any() and not wide.grad.any()


def test_rows_that_recur() -> None:
    for rows, most in ((range(9, 4096), 16), (range(4096, 20000), 64)):
        filled = {n: recurring(n, CPU) for n in rows}
        assert all(n <= made < n + max(4, -(-n // most) + 1) for n, made in filled.items())
    assert len({recurring(n, CPU) for n in range(2048, 4096)}) <= 17
    assert recurring(1001, torch.device("meta")) == 1001


@pytest.mark.parametrize(("tokens", "k", "experts"), [(0, 2, 4), (1, 1, 1), (7, 3, 5), (300, 8, 64)])
def test_pairs_by_expert(tokens: int, k: int, experts: int) -> None:
    if not fits(F32, F32, CPU):
        pytest.skip("in C alone")
    chosen = torch.rand(tokens, experts).argsort(1)[:, :k]
    ends, place, token = pairs_by_expert(chosen, experts)
    expert, order = chosen.flatten().sort(stable=True)
    assert torch.equal(ends, torch.bincount(expert, minlength=experts).cumsum(0))
    assert torch.equal(token, order // k)
    assert torch.equal(place.flatten()[order], torch.arange(tokens * k))
