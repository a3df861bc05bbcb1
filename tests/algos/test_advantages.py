"""Group advantages, worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqrl.algos.advantages import ADVANTAGES, EPSILON, all_equal, grpo


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_sample_standard_deviation_and_epsilon():
    reward, group = float64([1, 0, 0, 1]), torch.zeros(4, dtype=torch.long)
    std = math.sqrt(4 * 0.25 / 3)  # of a sample: n - 1
    assert EPSILON == 1e-6
    expected = float64([0.5, -0.5, -0.5, 0.5]) / (std + 1e-6)
    torch.testing.assert_close(grpo(reward, group, norm_by_std=True), expected, rtol=1e-14, atol=0)


def test_epsilon_bounds_the_advantage_of_nearly_equal_rewards():
    reward, group = float64([0, 2e-6]), torch.zeros(2, dtype=torch.long)
    expected = 1e-6 / (math.sqrt(2) * 1e-6 + 1e-6)
    torch.testing.assert_close(
        grpo(reward, group, norm_by_std=True), float64([-expected, expected]), rtol=1e-9, atol=0
    )


def test_dr_grpo_takes_off_the_mean_only():
    reward, group = float64([1, 0, 0, 0, 6, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    advantage = grpo(reward, group, norm_by_std=False)
    assert advantage.tolist() == [0.75, -0.25, -0.25, -0.25, 2, -2]


def test_groups_of_unequal_size_interleaved_under_any_name():
    group = torch.tensor([70, 3, 70, 3, 3, -1])
    reward = float64([4, 1, 2, 2, 3, 9])
    root2 = math.sqrt(2)  # std of (4, 2); that of (1, 2, 3) is 1
    expected = [1 / (root2 + 1e-6), -1 / (1 + 1e-6), -1 / (root2 + 1e-6), 0, 1 / (1 + 1e-6), 0]
    torch.testing.assert_close(
        grpo(reward, group, norm_by_std=True), float64(expected), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 100])
def test_equal_rewards_give_exactly_zero(count, dtype, norm_by_std):
    for value in (0.1, 1 / 3, 1e30, -7.7e-20, 0.0):  # sums of 0.1 round: the mean is not always 0.1
        reward, group = torch.full((count,), value, dtype=dtype), torch.full((count,), 5)
        assert grpo(reward, group, norm_by_std=norm_by_std).tolist() == [0] * count


def test_which_groups_have_nothing_to_teach():
    group = torch.tensor([0, 1, 0, 1, 2])
    assert all_equal(float64([1, 0, 1, 1, 3]), group).tolist() == [True, False, True, False, True]


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.floats(-10, 10, width=32)), min_size=1, max_size=12),
    norm_by_std=st.booleans(),
    data=st.data(),
)
def test_order_does_not_matter_and_groups_sum_to_zero(rows, norm_by_std, data):
    group = torch.tensor([g for g, _ in rows])
    reward = float64([r for _, r in rows])
    advantage = grpo(reward, group, norm_by_std=norm_by_std)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    shuffled = grpo(reward[order], group[order], norm_by_std=norm_by_std)
    torch.testing.assert_close(shuffled, advantage[order], rtol=1e-9, atol=1e-9)
    for g in group.unique():
        assert abs(advantage[group == g].sum()) < 1e-8


def test_the_name_in_the_config():
    assert ADVANTAGES["grpo"] is grpo
