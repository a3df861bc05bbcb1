"""The head tile by tile, against log_softmax over all logits at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import seqrl.kernels.call
import seqrl.training.head
from seqrl.kernels import library
from seqrl.kernels.head import Sums, Tile, fold, gradient
from seqrl.training.head import Logits, TokenStatistics, token_statistics

R, H, V = 37, 24, 1301
AT_ONCE, IN_TILES = 2**25, 37 * 200


@pytest.fixture(params=["C", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C kernels and with torch's own operations in their place."""
    if request.param == "torch":
        monkeypatch.setattr(seqrl.kernels.call, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C compiler")


def made(dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, ...]:
    """Hidden states [R, H], weight [V, H], bias [V] that ask for gradients, and tokens [R]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((R, H), (V, H), (V,))
    numbers = [spread * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tokens = torch.randint(0, V, (R,), generator=generator)
    tokens[:2] = torch.tensor([0, V - 1])
    return *(x.to(dtype).requires_grad_() for x in numbers), tokens


def by_definition(
    logits: Tensor, tokens: Tensor, temperature: float, ref_logits: Tensor | None = None
) -> list[Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(exact) / temperature).log_softmax(-1)
    found = [
        log_p.gather(1, tokens[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(1),
        log_p.exp().square().sum(1),
    ]
    if ref_logits is not None:
        log_q = (ref_logits.to(exact) / temperature).log_softmax(-1).detach()
        found.append((log_p.exp() * (log_p - log_q)).sum(1))
    return found


def values(said: TokenStatistics) -> list[Tensor]:
    return [x for x in (said.logprobs, said.entropy, said.sum_pi_squared, said.full_kl) if x is not None]


def gradients(found: list[Tensor], of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum in which each number has a weight of its own."""
    generator = torch.Generator().manual_seed(9)
    weights = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found)
    return torch.autograd.grad(sum((x * w).sum() for x, w in zip(found, weights, strict=True)), of)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [AT_ONCE, IN_TILES])
@pytest.mark.parametrize("with_reference", [False, True])
def test_values_and_gradients_are_those_of_all_logits(
    temperature: float, max_logits: int, with_reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are some of the tokens, too."""
    monkeypatch.setattr(seqrl.training.head, "TILE_ROWS", 16)
    *inputs, tokens = made()
    hidden, weight, bias = inputs
    theirs = made(seed=1)[:3] if with_reference else None
    said = token_statistics(
        Logits(*inputs),
        tokens,
        temperature=temperature,
        entropy_gradient=True,
        sum_pi_squared=True,
        reference=Logits(*theirs) if theirs else None,
        max_logits=max_logits,
    )
    ref_logits = torch.nn.functional.linear(*theirs) if theirs else None
    expected = by_definition(hidden @ weight.t() + bias, tokens, temperature, ref_logits)
    torch.testing.assert_close(values(said), expected, rtol=1e-10, atol=1e-12)
    ours, by_hand = gradients(values(said), (*inputs,)), gradients(expected, (*inputs,))
    torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("max_logits", [AT_ONCE, IN_TILES, 37 * 16])
def test_the_size_of_tiles_changes_nothing(max_logits: int) -> None:
    """Float32, against all logits in float64: no size is farther off than rounding."""
    *inputs, tokens = made(torch.float32)
    said = token_statistics(
        Logits(*inputs),
        tokens,
        temperature=0.9,
        entropy_gradient=True,
        sum_pi_squared=True,
        max_logits=max_logits,
    )
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = by_definition(exact[0] @ exact[1].t() + exact[2], tokens, 0.9)
    torch.testing.assert_close(values(said), [x.float() for x in expected], rtol=2e-6, atol=3e-6)
    ours, by_hand = gradients(values(said), (*inputs,)), gradients(expected, exact)
    torch.testing.assert_close(ours, tuple(x.float() for x in by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("max_logits", [AT_ONCE, IN_TILES])
def test_under_autocast_it_is_as_exact_as_all_logits_at_once(max_logits: int) -> None:
    """Products in bfloat16, statistics in float32: errors no larger than those of torch's own operations."""
    *inputs, tokens = made(torch.float32)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    truth = by_definition(exact[0] @ exact[1].t() + exact[2], tokens, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        said = token_statistics(
            Logits(*inputs),
            tokens,
            temperature=1.0,
            entropy_gradient=True,
            sum_pi_squared=True,
            max_logits=max_logits,
        )
        plain = by_definition(torch.nn.functional.linear(*inputs), tokens, 1.0)
    assert all(x.dtype == torch.float32 for x in values(said))
    sides = [(*values(said), *gradients(values(said), (*inputs,)))]
    sides.append((*plain, *gradients(plain, (*inputs,))))
    for ours, theirs, true in zip(*sides, (*truth, *gradients(truth, exact)), strict=True):
        assert 0 < (ours - true).norm() < 1.3 * (theirs - true).norm() < 0.05 * true.norm()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_entropy_has_gradient_only_if_asked_to(entropy_gradient: bool) -> None:
    *inputs, tokens = made()
    said = token_statistics(
        Logits(*inputs), tokens, temperature=1.0, entropy=True, entropy_gradient=entropy_gradient
    )
    assert said.logprobs.requires_grad and said.entropy is not None
    assert said.entropy.requires_grad == entropy_gradient
    assert said.sum_pi_squared is None and said.full_kl is None


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.add(tuple(out.shape))
        return out

    def largest(self) -> int:
        return max(map(math.prod, self.seen))


@contextmanager
def kept() -> Iterator[list[int]]:
    """Sizes of what is kept for the backward pass."""
    sizes: list[int] = []
    with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        yield sizes


def test_no_tensor_is_of_all_tokens_and_the_whole_vocabulary() -> None:
    *inputs, tokens = made(torch.float32)
    with Sizes() as sizes, kept() as saved:
        said = token_statistics(
            Logits(*inputs), tokens, temperature=0.8, entropy_gradient=True, max_logits=IN_TILES
        )
        sum(x.sum() for x in values(said)).backward()
    assert sizes.largest() <= max(IN_TILES, V * H) < R * V
    assert sum(saved) <= sum(x.numel() for x in inputs) + 8 * R, "inputs, and a few numbers a token"
    with Sizes() as sizes:
        token_statistics(Logits(*inputs), tokens, temperature=0.8)
    assert sizes.largest() == R * V, "the check sees logits where there are some"


def test_without_gradient_nothing_is_kept() -> None:
    *inputs, tokens = made(torch.float32)
    with torch.no_grad(), Sizes() as sizes, kept() as saved:
        said = token_statistics(Logits(*inputs), tokens, temperature=1.0, max_logits=IN_TILES)
    assert not saved and not said.logprobs.requires_grad and sizes.largest() <= IN_TILES


def test_what_asks_for_no_gradient_costs_none() -> None:
    hidden, weight, bias, tokens = made(torch.float32)
    for frozen in (weight, bias):
        frozen.requires_grad_(False)
    said = token_statistics(Logits(hidden, weight, bias), tokens, temperature=1.0, max_logits=IN_TILES)
    with Sizes() as sizes:
        said.logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    assert (V, H) not in sizes.seen and (V,) not in sizes.seen


def test_logits_that_are_given_keep_their_values() -> None:
    """Some models do more to their logits than a product: then these come ready."""
    logits, tokens = made()[0].detach().requires_grad_(), torch.arange(R) % H
    before = logits.detach().clone()
    said = token_statistics(Logits(logits), tokens, temperature=0.7, entropy_gradient=True)
    expected = by_definition(logits, tokens, 0.7)[:2]
    torch.testing.assert_close(values(said), expected)
    torch.testing.assert_close(gradients(values(said), (logits,)), gradients(expected, (logits,)))
    assert torch.equal(logits, before)


def test_a_second_backward_pass_is_refused_where_the_first_used_up_the_logits() -> None:
    *inputs, tokens = made()
    said = token_statistics(Logits(*inputs), tokens, temperature=1.0)
    said.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        said.logprobs.sum().backward()


@pytest.mark.usefixtures("either")
def test_a_token_outside_the_vocabulary_has_no_log_prob() -> None:
    *inputs, tokens = made(torch.float32)
    tokens[3] = V
    said = token_statistics(Logits(*inputs), tokens, temperature=1.0)
    assert said.logprobs.isnan().tolist() == [i == 3 for i in range(R)]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("max_logits", [AT_ONCE, IN_TILES])
def test_impossible_tokens_add_nothing(max_logits: int) -> None:
    """A logit of minus infinity, as masks give: the rest is as if it were not there."""
    hidden, weight, bias, _ = made(torch.float32)
    with torch.no_grad():
        bias[400:] = -math.inf
    tokens = torch.arange(R)
    ours, fewer = (
        token_statistics(
            Logits(hidden, weight[:size], bias[:size]),
            tokens,
            temperature=1.0,
            entropy_gradient=True,
            max_logits=max_logits,
        )
        for size in (V, 400)
    )
    torch.testing.assert_close(values(ours), values(fewer))
    torch.testing.assert_close(gradients(values(ours), (hidden,)), gradients(values(fewer), (hidden,)))


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 1024, 1040, 2500])
def test_c_and_torch_make_the_same_of_a_tile(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that begins in the middle of the vocabulary and of a wider tensor, after another tile."""
    generator = torch.Generator().manual_seed(width)
    logits = 30 * torch.randn(R, width + 7, generator=generator).to(dtype)
    tokens = torch.randint(90, 100 + width, (R,), generator=generator)
    ends = []
    for loaded in (seqrl.kernels.call.library, lambda: None):
        monkeypatch.setattr(seqrl.kernels.call, "library", loaded)
        sums = Sums.nothing_yet(R, torch.float32, logits.device)
        fold(Tile(logits[:, :7].clone(), 0, tokens, 0.5), sums)
        tile = Tile(logits[:, 7:].clone(), 100, tokens, 0.5)
        fold(tile, sums)
        gradient(tile, sums.log_total, *(torch.full((R,), x) for x in (0.3, -0.2, 0.7, 1.1)), out=tile.logits)
        ends.append([sums.log_total, sums.entropy, sums.sum_pi_squared, sums.chosen, tile.logits])
    torch.testing.assert_close(
        *ends, rtol=2e-5 if dtype == torch.float32 else 8e-3, atol=1e-5, equal_nan=True
    )
