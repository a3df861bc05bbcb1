"""The draw: its distribution, its log-probs and its randomness."""

from __future__ import annotations

import pytest
import torch

from seqrl.rollout.sampling import request_uniforms, sample
from seqrl.types import SamplingParams

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0, -0.5])


def reference(sampling: SamplingParams) -> list[float]:
    """The sampling distribution over LOGITS, token by token in plain Python."""
    import math

    weights = {i: math.exp(x / sampling.temperature) for i, x in enumerate(LOGITS.tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.7),
        SamplingParams(1, top_k=3),
        SamplingParams(1, top_p=0.8),
        SamplingParams(1, temperature=1.5, top_k=5, top_p=0.7),
        SamplingParams(1, top_p=1e-6),
        SamplingParams(1, top_k=100),
    ],
)
def test_frequencies_and_logprobs_follow_the_distribution(sampling: SamplingParams) -> None:
    draws = 40_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = sample(LOGITS.expand(draws, -1), uniforms, sampling)
    expected = torch.tensor(reference(sampling), dtype=torch.float64)
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=0)
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
    assert chi_square < 24.3  # 99.9% quantile at 7 degrees of freedom


def test_greedy_takes_the_largest_and_gives_its_logprob_at_temperature_one() -> None:
    tokens, logprobs = sample(
        LOGITS[None], torch.zeros(1).double(), SamplingParams(1, temperature=0, top_k=2)
    )
    assert tokens.item() == 0
    assert logprobs.item() == pytest.approx(LOGITS.log_softmax(-1)[0].item(), abs=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)) * 4
    logits[:, :3] = -torch.inf
    logits[:, -3:] = -torch.inf
    logits[:, 400:410] = -1e4  # underflows
    tokens, logprobs = sample(logits, torch.full((64,), uniform, dtype=torch.float64), SamplingParams(1))
    assert logprobs.isfinite().all()
    assert (logits[torch.arange(64), tokens] > -1e3).all()


def test_uniforms_depend_on_seed_prompt_and_response_alone() -> None:
    one = request_uniforms(1, "file:3", 0, 10)
    assert one.dtype == torch.float64
    torch.testing.assert_close(request_uniforms(1, "file:3", 0, 30)[:10], one, atol=0, rtol=0)
    for other in ((2, "file:3", 0), (1, "file:4", 0), (1, "file:3", 1)):
        assert (request_uniforms(*other, 10) != one).all()
