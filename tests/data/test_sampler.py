from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqrl.data.sampler import PromptSampler
from seqrl.errors import UserError


def test_each_epoch_is_a_permutation_of_its_own():
    sampler = PromptSampler(12, 4, shuffle=True, seed=1)
    assert sampler.steps_per_epoch == 3
    epochs = [[i for _ in range(3) for i in sampler.next_batch()] for _ in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sampler.epoch == 3


def test_seed_and_nothing_else_decides_the_order():
    def order(seed):
        return PromptSampler(50, 50, shuffle=True, seed=seed).next_batch()

    assert order(3) == order(3)
    assert order(3) != order(4)
    # Pinned: a change of the order would break resuming a run.
    assert PromptSampler(8, 8, shuffle=True, seed=1).next_batch() == [6, 3, 0, 7, 2, 4, 5, 1]


def test_without_shuffle_the_order_is_the_files_and_the_rest_is_dropped():
    sampler = PromptSampler(5, 2, shuffle=False, seed=1)
    assert sampler.steps_per_epoch == 2
    assert [sampler.next_batch() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@given(n=st.integers(1, 9), batch=st.integers(1, 9), seed=st.integers(0, 99), shuffle=st.booleans())
def test_restored_at_any_position_it_goes_on_the_same(n, batch, seed, shuffle):
    batch = min(n, batch)
    whole = PromptSampler(n, batch, shuffle=shuffle, seed=seed)
    steps = 3 * whole.steps_per_epoch + 1
    states, batches = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(whole.next_batch())
    for at, state in enumerate(states):
        restored = PromptSampler(n, batch, shuffle=shuffle, seed=seed)
        restored.load_state_dict(state)
        assert [restored.next_batch() for _ in range(steps - at)] == batches[at:]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"n_prompts": 11}, "n_prompts=10, this run n_prompts=11"),
        ({"seed": 2}, "seed=1, this run seed=2"),
        ({"shuffle": False}, "shuffle=1, this run shuffle=0"),
    ],
)
def test_state_of_another_run_is_refused(other, says):
    arguments = {"n_prompts": 10, "shuffle": True, "seed": 1}
    state = PromptSampler(batch_size=2, **arguments).state_dict()
    with pytest.raises(UserError, match=says):
        PromptSampler(batch_size=2, **(arguments | other)).load_state_dict(state)


@pytest.mark.parametrize(
    ("n", "batch", "says"), [(3, 4, "more than the 3 prompts"), (0, 4, "no prompts"), (3, 0, "at least 1")]
)
def test_too_few_prompts(n, batch, says):
    with pytest.raises(UserError, match=says):
        PromptSampler(n, batch, shuffle=True, seed=1)
