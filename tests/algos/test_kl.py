"""KL estimators: values and gradients by hand, and what they estimate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqrl.algos.kl import KL_ESTIMATORS, k1, k2, k3

HALF, QUARTER = math.log(0.5), math.log(0.25)
LOG2 = math.log(2)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1, [LOG2, -LOG2, 0]), (k2, [LOG2**2 / 2, LOG2**2 / 2, 0]), (k3, [LOG2 - 0.5, 1 - LOG2, 0])],
)
def test_values(estimator, expected):
    logprobs, ref_logprobs = float64([HALF, QUARTER, HALF]), float64([QUARTER, HALF, HALF])
    torch.testing.assert_close(estimator(logprobs, ref_logprobs), float64(expected), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [(k1, lambda d: 1.0), (k2, lambda d: d), (k3, lambda d: 1 - math.exp(-d))],
)
def test_gradients(estimator, derivative):
    difference = [-25.0, -1.0, 0.0, 0.5, 30.0]  # log(policy / reference); no clamp at +-20
    logprobs = float64([-40.0 + d for d in difference]).requires_grad_()
    ref_logprobs = float64([-40.0] * 5)
    (gradient,) = torch.autograd.grad(estimator(logprobs, ref_logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, float64([derivative(d) for d in difference]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradcheck(estimator):
    logprobs = float64([-0.3, -1.7, -4.0]).requires_grad_()
    assert torch.autograd.gradcheck(estimator, (logprobs, float64([-0.9, -1.7, -2.0])))


@given(st.floats(-80, 0), st.floats(-80, 0))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    for dtype in (torch.float32, torch.float64):
        pair = torch.tensor([logprob], dtype=dtype), torch.tensor([ref_logprob], dtype=dtype)
        assert k2(*pair).item() >= 0
        # of a log ratio x, exp(x) - 1 may round below x by one unit in the last place
        assert k3(*pair).item() >= -torch.finfo(dtype).eps * abs(logprob - ref_logprob)


POLICY, REFERENCE = float64([0.4, 0.3, 0.2, 0.1]), float64([0.3, 0.3, 0.15, 0.25])
KL = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))


def test_k1_and_k3_expect_the_exact_divergence_and_k2_does_not():
    logprobs, ref_logprobs = POLICY.log(), REFERENCE.log()
    for estimator, unbiased in ((k1, True), (k3, True), (k2, False)):
        expected = (POLICY * estimator(logprobs, ref_logprobs)).sum().item()
        assert (abs(expected - KL) < 1e-12) == unbiased


def test_their_mean_over_samples_is_the_divergence_and_k3_spreads_less():
    drawn = torch.multinomial(POLICY, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    logprobs, ref_logprobs = POLICY.log()[drawn], REFERENCE.log()[drawn]
    spread = {}
    for estimator in (k1, k3):
        sample = estimator(logprobs, ref_logprobs)
        spread[estimator] = sample.std().item()
        assert abs(sample.mean().item() - KL) < 4 * spread[estimator] / math.sqrt(len(drawn))
    assert spread[k3] < 0.5 * spread[k1]


def test_the_names_in_the_config():
    for name, estimator in {"kl": k1, "k1": k1, "mse": k2, "k2": k2, "low_var_kl": k3, "k3": k3}.items():
        assert KL_ESTIMATORS[name] is estimator
