"""Policy losses on hand-worked batches; their gradients are in test_policy_gradient.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqrl.algos.losses import LOSSES, gspo, vanilla

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "clip_c": 3.0}
LOG2 = math.log(2)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def check(surrogate, values, low, high, dual):
    torch.testing.assert_close(surrogate.values, float64(values), rtol=1e-13, atol=1e-15)
    assert surrogate.clipped_low.tolist() == [bool(x) for x in low]
    assert surrogate.clipped_high.tolist() == [bool(x) for x in high]
    assert surrogate.clipped_dual.tolist() == [bool(x) for x in dual]


def ratios(*values):
    """Log-probs and old log-probs whose token ratios are these."""
    old = float64([-1.0 - i for i in range(len(values))])
    return old + float64(values).log(), old


def test_gspo_takes_the_geometric_mean_of_the_token_ratios():
    logprobs, old = ratios(1.5, 1 / 1.5, 0.5, 2.42, 1.21)  # s = 1, and sqrt(1.21) = 1.1 (of 0.5 * 2.42)
    surrogate = gspo(logprobs, old, float64([2, 2, -3, -3, 4]), torch.tensor([0, 2, 4, 5]), **CLIP)
    check(surrogate, [-2, -2, 3.3, 3.3, -4.84], [0] * 5, [0] * 5, [0] * 5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.25, 2.0, -2.5, None),
        (1.31, 2.0, -2.6, "high"),  # -A * 1.3
        (0.5, 2.0, -1.0, None),  # a good answer that has become rarer may come back: no clip
        (0.9, -2.0, 1.8, None),
        (0.5, -2.0, 1.6, "low"),  # -A * 0.8
        (2.5, -2.0, 5.0, None),  # a bad answer that has become commoner: no clip up to clip_c
        (3.5, -2.0, 6.0, "dual"),  # -A * clip_c
        (3.5, 0.0, 0.0, None),
        (0.1, 0.0, 0.0, None),
    ],
)
@pytest.mark.parametrize("loss", [gspo, vanilla])
def test_each_side_of_the_clip(loss, ratio, advantage, value, clipped):
    # Two tokens of that ratio: under both losses each token stands for the same clip.
    logprobs, old = ratios(ratio, ratio)
    surrogate = loss(logprobs, old, float64([advantage] * 2), torch.tensor([0, 2]), **CLIP)
    check(surrogate, [value] * 2, *([clipped == side] * 2 for side in ("low", "high", "dual")))


def test_gspo_clips_whole_sequences_where_vanilla_clips_tokens():
    logprobs, old = ratios(4.0, 0.3)  # s = sqrt(1.2) = 1.095
    advantages, offsets = float64([1, 1]), torch.tensor([0, 2])
    root = math.sqrt(1.2)
    check(gspo(logprobs, old, advantages, offsets, **CLIP), [-root, -root], [0, 0], [0, 0], [0, 0])
    check(vanilla(logprobs, old, advantages, offsets, **CLIP), [-1.3, -0.3], [0, 0], [1, 0], [0, 0])


def test_gspo_at_the_papers_clip_range():
    clip = {"clip_low": 3e-4, "clip_high": 4e-4, "clip_c": 10.0}
    log_ratio = [3.9e-4, 4.1e-4, -2.9e-4, -3.1e-4]
    old = float64([-1.0] * 8)
    logprobs = old + float64(log_ratio).repeat_interleave(2)
    advantages = float64([1, 1, -1, -1]).repeat_interleave(2)
    surrogate = gspo(logprobs, old, advantages, torch.tensor([0, 2, 4, 6, 8]), **clip)
    by_sequence = [-math.exp(3.9e-4), -1.0004, math.exp(-2.9e-4), 0.9997]
    values = [v for v in by_sequence for _ in range(2)]
    check(surrogate, values, [0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0], [0] * 8)


@pytest.mark.parametrize("loss", [gspo, vanilla])
def test_an_empty_response_among_others_changes_nothing(loss):
    logprobs, old = ratios(1.1, 0.7, 1.2)
    advantages = float64([1, 1, -1])
    without = loss(logprobs, old, advantages, torch.tensor([0, 2, 3]), **CLIP)
    with_empty = loss(logprobs, old, advantages, torch.tensor([0, 0, 2, 2, 3, 3]), **CLIP)
    assert with_empty.values.tolist() == without.values.tolist()
    nothing = loss(logprobs[:0], old[:0], advantages[:0], torch.tensor([0, 0]), **CLIP)
    assert nothing.values.shape == (0,)


def expected_value(ratio, advantage, clip_low, clip_high, clip_c):
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    value = max(-advantage * ratio, -advantage * clipped)
    return min(value, -advantage * clip_c) if advantage < 0 else value


SEQUENCE = st.tuples(st.lists(st.floats(-3, 3), max_size=5), st.floats(-4, 4))


@given(st.lists(SEQUENCE, max_size=6))
def test_against_the_formulas_in_plain_python(sequences):
    log_ratios = [d for ds, _ in sequences for d in ds]
    advantages = float64([a for ds, a in sequences for _ in ds])
    offsets = torch.tensor([0, *(len(ds) for ds, _ in sequences)]).cumsum(0)
    batch = (float64(log_ratios), torch.zeros_like(advantages), advantages, offsets)
    by_token = [expected_value(math.exp(d), a, **CLIP) for ds, a in sequences for d in ds]
    by_sequence = [expected_value(math.exp(sum(ds) / len(ds)), a, **CLIP) for ds, a in sequences for _ in ds]
    torch.testing.assert_close(vanilla(*batch, **CLIP).values, float64(by_token), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gspo(*batch, **CLIP).values, float64(by_sequence), rtol=1e-9, atol=1e-12)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-4, 4)), max_size=8))
def test_one_token_responses_make_gspo_and_vanilla_agree(tokens):
    logprobs = float64([d for d, _ in tokens])
    advantages = float64([a for _, a in tokens])
    offsets = torch.arange(len(tokens) + 1)
    results = []
    for loss in (gspo, vanilla):
        leaf = logprobs.clone().requires_grad_()
        surrogate = loss(leaf, torch.zeros_like(leaf), advantages, offsets, **CLIP)
        (gradient,) = torch.autograd.grad(surrogate.values.sum(), leaf)
        flags = torch.stack([surrogate.clipped_low, surrogate.clipped_high, surrogate.clipped_dual])
        results.append((surrogate.values.detach(), gradient, flags))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
@pytest.mark.parametrize(
    ("logprob", "old_logprob"),
    [
        (0.0, -1e4),
        (-1e4, 0.0),
        (-1.0, -math.inf),  # the rollout engine gave the token no chance at all
        (-1e38, 0.0),
        (0.0, -1e38),
    ],
)
@pytest.mark.parametrize("loss", [gspo, vanilla])
def test_extreme_ratios_stay_finite_in_value_and_gradient(loss, logprob, old_logprob, advantage, dtype):
    """One such token among ordinary ones, in a sequence of its own and as a neighbour's."""
    logprobs = torch.tensor([logprob, -1.0, -0.5, -2.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([old_logprob, -1.0, -0.5, -2.0], dtype=dtype)
    advantages = torch.full((4,), advantage, dtype=dtype)
    surrogate = loss(logprobs, old, advantages, torch.tensor([0, 2, 4]), **CLIP)
    (gradient,) = torch.autograd.grad(surrogate.values.sum(), logprobs)
    assert surrogate.values.dtype == dtype
    assert surrogate.values.isfinite().all() and gradient.isfinite().all()
    assert gradient[0] == 0  # clipped, or a ratio of 0
    torch.testing.assert_close(gradient[2:], -advantages[2:])  # ratio 1: the neighbour is not touched
    if advantage < 0:
        assert surrogate.values.max() <= -advantage * CLIP["clip_c"]


def test_the_names_in_the_config():
    assert LOSSES["gspo"] is gspo and LOSSES["vanilla"] is vanilla
