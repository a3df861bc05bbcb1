"""Log-probs and entropies of response tokens, against the definition written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqrl.training.logprobs import response_logprobs
from seqrl.types import Batch

LENGTHS = [(3, 4), (2, 0), (1, 6)]


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., Batch]) -> Batch:
    return make_batch(LENGTHS)


def by_hand(model: Any, batch: Batch, temperature: float) -> tuple[list[float], list[float]]:
    """Sequence by sequence, token by token, in plain Python from transformers' own logits."""
    logprobs, entropies = [], []
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens = batch.tokens[int(batch.offsets[i]) : int(batch.offsets[i + 1])]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].double() / temperature
        for place in range(prompt, prompt + response):
            row = logits[place - 1].tolist()
            log_sum = math.log(sum(math.exp(x) for x in row))
            logprobs.append(row[int(tokens[place])] - log_sum)
            entropies.append(-sum(math.exp(x - log_sum) * (x - log_sum) for x in row))
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_they_are_those_of_the_distribution_at_this_temperature(
    make_model: Callable[..., Any], batch: Batch, temperature: float
) -> None:
    theirs = make_model(attention="sdpa")
    logprobs, entropies = response_logprobs(make_model(), batch, temperature=temperature)
    expected, expected_entropies = by_hand(theirs, batch, temperature)
    assert logprobs.tolist() == pytest.approx(expected, abs=2e-5)
    assert entropies.tolist() == pytest.approx(expected_entropies, abs=2e-5)


def test_the_entropy_carries_gradient_only_if_asked_to(make_model: Callable[..., Any], batch: Batch) -> None:
    model = make_model()
    _, without = response_logprobs(model, batch, temperature=1.0)
    _, asked = response_logprobs(model, batch, temperature=1.0, entropy_gradient=True)
    assert not without.requires_grad and asked.requires_grad
    asked.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert not response_logprobs(model, batch, temperature=1.0, entropy_gradient=True)[1].requires_grad


def test_bfloat16_is_close_and_comes_back_in_float32(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    exact, rough = (
        make_engine(make_model(), compute_dtype=dtype).logprobs(batch)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.dtype == rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1, "another type, the same log-probs"
    assert torch.equal(rough[~batch.response_mask], torch.zeros_like(rough[~batch.response_mask]))


@pytest.mark.parametrize("max_tokens", [1, 9, 1000])
def test_the_engine_puts_them_where_they_belong(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch, max_tokens: int
) -> None:
    """In the order of the batch, however the sequences were sorted into micro-batches."""
    model = make_model()
    with torch.no_grad():
        expected, _ = response_logprobs(model, batch, temperature=1.0)
    logprobs = make_engine(model, max_tokens=max_tokens).logprobs(batch)
    torch.testing.assert_close(logprobs[batch.response_mask], expected, rtol=1e-5, atol=1e-5)
    assert not logprobs[~batch.response_mask].any()


def test_the_reference_stays_where_it_was(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    from seqrl.training.objective import Likelihood

    engine = make_engine(make_model(), with_reference=True)
    before = engine.logprobs(batch)
    assert torch.equal(engine.ref_logprobs(batch), before)
    engine.update(batch, Likelihood())
    assert torch.equal(engine.ref_logprobs(batch), before)
    assert (engine.logprobs(batch) - before).abs().max() > 1e-3
