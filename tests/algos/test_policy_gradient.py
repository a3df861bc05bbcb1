"""Policy gradients against the papers' formulas, written out sequence by sequence and token by token.

The policy is a table of logits `theta[previous token][next token]`, softmax in each row, so that the
gradient of a log-prob is known in closed form: d log p_k / d theta_j = [j = k] - p_j. The references
below are plain Python: no torch, no autograd, and nothing of seqrl.
"""

import math
import random

import pytest
import torch

from seqrl.algos.aggregate import AGGREGATIONS
from seqrl.algos.losses import gspo, vanilla

VOCABULARY = 4
UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e9, "clip_c": 1e9}


def table(seed, scale=1.0):
    generator = random.Random(seed)
    return [[generator.gauss(0, scale) for _ in range(VOCABULARY)] for _ in range(VOCABULARY)]


# Two prompts (their last tokens are 0 and 3) with three responses each: (prompt, response, advantage).
BATCH = [
    (0, [1, 2, 3, 0, 1], 1.2),
    (0, [2], -0.4),
    (0, [3, 3, 1], -0.8),
    (3, [0, 1], 0.5),
    (3, [2, 2, 2, 2], 0.7),
    (3, [1, 0, 3], -1.2),
]
NEW, OLD = table(1), table(2)


# The reference


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def steps(prompt, response):
    """(previous token, token) of each response token."""
    return list(zip([prompt, *response[:-1]], response, strict=True))


def probability(theta, prompt, response):
    return math.prod(softmax(theta[previous])[token] for previous, token in steps(prompt, response))


def sequence_ratio(theta, old, prompt, response):
    """Eq. 7: (pi_theta(y|x) / pi_old(y|x)) ^ (1 / |y|)."""
    ratio = probability(theta, prompt, response) / probability(old, prompt, response)
    return ratio ** (1 / len(response))


def add_grad_logprob(gradient, theta, previous, token, weight):
    """gradient += weight * grad_theta log pi(token | previous)."""
    for j, p in enumerate(softmax(theta[previous])):
        gradient[previous][j] += weight * ((j == token) - p)


def zeros():
    return [[0.0] * VOCABULARY for _ in range(VOCABULARY)]


def is_clipped(ratio, advantage, clip):
    if advantage > 0:
        return ratio > 1 + clip["clip_high"]
    return ratio < 1 - clip["clip_low"] or ratio > clip["clip_c"]


def gspo_gradient(theta, old, batch, clip):
    """GSPO paper, section 4.2, eq. 10: the mean over sequences of
    s_i A_i / |y_i| * sum over t of grad log pi(y_it); a clipped sequence gives none."""
    gradient = zeros()
    for prompt, response, advantage in batch:
        ratio = sequence_ratio(theta, old, prompt, response)
        if is_clipped(ratio, advantage, clip):
            continue
        for previous, token in steps(prompt, response):
            weight = ratio * advantage / len(response) / len(batch)
            add_grad_logprob(gradient, theta, previous, token, weight)
    return gradient


def grpo_gradient(theta, old, batch, clip):
    """GSPO paper, eq. 12, for GRPO: each token weighted by its own ratio; a clipped token gives none."""
    gradient = zeros()
    for prompt, response, advantage in batch:
        for previous, token in steps(prompt, response):
            ratio = softmax(theta[previous])[token] / softmax(old[previous])[token]
            if not is_clipped(ratio, advantage, clip):
                weight = ratio * advantage / len(response) / len(batch)
                add_grad_logprob(gradient, theta, previous, token, weight)
    return gradient


def reinforce_gradient(theta, batch):
    gradient = zeros()
    for prompt, response, advantage in batch:
        for previous, token in steps(prompt, response):
            weight = advantage / len(response) / len(batch)
            add_grad_logprob(gradient, theta, previous, token, weight)
    return gradient


def gspo_objective(theta, old, batch, clip):
    """Eq. 5 itself, with the dual clip."""
    total = 0.0
    for prompt, response, advantage in batch:
        ratio = sequence_ratio(theta, old, prompt, response)
        clipped = min(max(ratio, 1 - clip["clip_low"]), 1 + clip["clip_high"])
        value = min(ratio * advantage, clipped * advantage)
        total += value if advantage > 0 else max(value, clip["clip_c"] * advantage)
    return total / len(batch)


# What is tested


def ours(loss, theta, old, batch, clip, micro_batches=None):
    """Loss and gradient with respect to theta, summed over the micro-batches (lists of indices)."""
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(old, dtype=torch.float64)
    counts = {"tokens": sum(len(y) for _, y, _ in batch), "sequences": len(batch), "scale": 1.0}
    total = 0.0
    for indices in micro_batches or [range(len(batch))]:
        part = [batch[i] for i in indices]
        previous, token = torch.tensor([s for x, y, _ in part for s in steps(x, y)]).T
        advantages = torch.tensor([a for _, y, a in part for _ in y], dtype=torch.float64)
        offsets = torch.tensor([0, *(len(y) for _, y, _ in part)]).cumsum(0)
        logprobs = theta.log_softmax(-1)[previous, token]
        old_logprobs = old.log_softmax(-1)[previous, token]
        surrogate = loss(logprobs, old_logprobs, advantages, offsets, **clip)
        value = AGGREGATIONS["seq-mean-token-mean"](surrogate.values, offsets, **counts)
        value.backward()
        total += value.item()
    return total, theta.grad


def assert_ascends(gradient, reference):
    """We minimise: our gradient is the objective's, turned round."""
    torch.testing.assert_close(
        -gradient, torch.tensor(reference, dtype=torch.float64), rtol=1e-11, atol=1e-14
    )


RATIOS = [sequence_ratio(NEW, OLD, x, y) for x, y, _ in BATCH]
# Bounds that fall between this batch's ratios, so that some sequences are clipped and some are not.
SOME_CLIPPED = {"clip_low": 0.1, "clip_high": 0.1, "clip_c": 1.5}


def test_the_batch_meets_every_case():
    """Else the tests below would show less than they say."""
    cases = {
        (a > 0, is_clipped(s, a, SOME_CLIPPED), s > 1) for s, (_, _, a) in zip(RATIOS, BATCH, strict=True)
    }
    assert cases >= {
        (True, True, True),  # clipped high
        (True, False, False),
        (False, True, False),  # clipped low
        (False, True, True),  # dual clip
    }


@pytest.mark.parametrize("clip", [UNCLIPPED, SOME_CLIPPED], ids=["unclipped", "some clipped"])
def test_gspo_gradient_is_the_papers_section_4_2(clip):
    value, gradient = ours(gspo, NEW, OLD, BATCH, clip)
    assert_ascends(gradient, gspo_gradient(NEW, OLD, BATCH, clip))
    assert value == pytest.approx(-gspo_objective(NEW, OLD, BATCH, clip), rel=1e-12)


@pytest.mark.parametrize("clip", [UNCLIPPED, SOME_CLIPPED], ids=["unclipped", "some clipped"])
def test_gspo_gradient_is_the_slope_of_the_papers_objective(clip):
    _, gradient = ours(gspo, NEW, OLD, BATCH, clip)
    h = 1e-5
    for i in range(VOCABULARY):
        for j in range(VOCABULARY):
            up, down = ([row[:] for row in NEW] for _ in range(2))
            up[i][j] += h
            down[i][j] -= h
            slope = (gspo_objective(up, OLD, BATCH, clip) - gspo_objective(down, OLD, BATCH, clip)) / (2 * h)
            assert -gradient[i, j].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("clip", [UNCLIPPED, SOME_CLIPPED], ids=["unclipped", "some clipped"])
def test_vanilla_gradient_is_grpos(clip):
    _, gradient = ours(vanilla, NEW, OLD, BATCH, clip)
    assert_ascends(gradient, grpo_gradient(NEW, OLD, BATCH, clip))


@pytest.mark.parametrize("loss", [gspo, vanilla])
def test_at_ratio_one_both_are_reinforce(loss):
    _, gradient = ours(loss, OLD, OLD, BATCH, SOME_CLIPPED)
    assert_ascends(gradient, reinforce_gradient(OLD, BATCH))


def test_away_from_ratio_one_gspo_and_vanilla_differ():
    _, one = ours(gspo, NEW, OLD, BATCH, UNCLIPPED)
    _, other = ours(vanilla, NEW, OLD, BATCH, UNCLIPPED)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("loss", [gspo, vanilla])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3], [4, 5]], [[5, 0], [3], [2, 4, 1]], [[i] for i in range(6)]])
def test_any_split_into_micro_batches_gives_the_same_gradient(loss, split):
    whole_value, whole = ours(loss, NEW, OLD, BATCH, SOME_CLIPPED)
    value, gradient = ours(loss, NEW, OLD, BATCH, SOME_CLIPPED, split)
    torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-15)
    assert value == pytest.approx(whole_value, rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gradcheck_of_vanilla_on_every_side_of_the_clip(advantage):
    log_ratio = torch.tensor([-2.0, -0.3, 0.0, 0.2, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    rest = (torch.zeros(6).double(), torch.full((6,), advantage).double(), torch.tensor([0, 6]))
    clip = {"clip_low": 0.2, "clip_high": 0.3, "clip_c": 3.0}
    assert torch.autograd.gradcheck(lambda x: vanilla(x, *rest, **clip).values, (log_ratio,))
