"""Chained arithmetic: right problems, disjoint splits, and slips where a careless student makes them."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from seqrl.data.chained_arithmetic import FORGOTTEN_CARRY_RATE, OFF_BY_ONE_RATE, rows, worked_rows
from seqrl.errors import UserError


def expression(row):
    return row["prompt"][0]["content"]


def numbers(row):
    """The first number and the signed steps, read from the text."""
    return [int(number) for number in re.findall(r"[+-]?\d+", expression(row))]


def steps(row):
    """(before, step, written) of each worked step."""
    return [
        tuple(int(number) for number in re.fullmatch(r"(-?\d+)([+-]\d)=(-?\d+)", part).groups())
        for part in row["answer"].split(";")[:-1]
    ]


@pytest.mark.parametrize(("terms", "limit"), [(2, 9), (3, 20), (6, 99)])
def test_the_ground_truth_is_the_sum_and_every_value_on_the_way_is_in_range(terms, limit):
    for row in rows(size=40, seed=3, terms=terms, limit=limit):
        parts = numbers(row)
        assert len(parts) == terms
        running = [sum(parts[: i + 1]) for i in range(terms)]
        assert row["reward_model"]["ground_truth"] == str(running[-1])
        assert all(0 <= value <= limit for value in running)
        assert all(1 <= abs(step) <= 9 for step in parts[1:])


def test_problems_are_distinct_and_rows_are_numbered():
    found = list(rows(size=500))
    assert len({expression(row) for row in found}) == 500
    assert [row["extra_info"] for row in found] == [{"split": "train", "index": i} for i in range(500)]
    assert {row["data_source"] for row in found} == {"chained_arithmetic"}


def test_no_held_out_problem_is_ever_a_training_problem_whatever_the_seed():
    train = {expression(row) for seed in range(3) for row in rows(size=800, seed=seed)}
    worked = {expression(row) for row in worked_rows(size=2000, seed=1)}
    held_out = {expression(row) for seed in range(3) for row in rows(size=200, seed=seed, split="test")}
    assert len(held_out) > 200, "else there is little to overlap"
    assert not held_out & (train | worked)


def test_the_seed_decides_the_problems():
    first, same, other = (list(rows(size=20, seed=seed)) for seed in (1, 1, 2))
    assert first == same and first != other
    assert list(worked_rows(size=20, seed=1)) == list(worked_rows(size=20, seed=1))


def test_a_larger_size_only_appends():
    assert list(rows(size=50))[:20] == list(rows(size=20))


def test_a_worked_solution_goes_on_from_what_it_wrote():
    for row in worked_rows(size=200, seed=2):
        parts = numbers(row)
        assert [step for _, step, _ in steps(row)] == parts[1:]
        written = [parts[0], *(after for _, _, after in steps(row))]
        assert [before for before, _, _ in steps(row)] == written[:-1]
        assert row["answer"].endswith(f";{written[-1]}"), "the last item repeats the result"


def test_about_three_in_ten_steps_are_wrong_carries_far_more_often():
    worked = [step for row in worked_rows(size=3000, seed=4) for step in steps(row)]
    carries = [(b, s, w) for b, s, w in worked if (b + s) // 10 != b // 10]
    others = [(b, s, w) for b, s, w in worked if (b + s) // 10 == b // 10]

    def wrong(of):
        return sum(b + s != w for b, s, w in of) / len(of)

    assert wrong(worked) == pytest.approx(0.3, abs=0.05)
    assert wrong(carries) == pytest.approx(FORGOTTEN_CARRY_RATE, abs=0.04) and wrong(carries) > 0.4
    assert wrong(others) == pytest.approx(OFF_BY_ONE_RATE, abs=0.03) and wrong(others) < 0.2
    assert {w - b - s for b, s, w in others} <= {-1, 0, 1}, "off by one at most"
    assert all(w % 10 == (b + s) % 10 for b, s, w in carries), "the last digit is right, the carry is lost"


def test_worked_rows_have_the_right_ground_truth_even_where_the_work_is_wrong():
    wrong = [
        row
        for row in worked_rows(size=200, seed=5)
        if row["answer"].rpartition(";")[2] != row["reward_model"]["ground_truth"]
    ]
    assert wrong
    assert all(row["reward_model"]["ground_truth"] == str(sum(numbers(row))) for row in wrong)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"split": "val"}, "split='val'"),
        ({"terms": 1}, "terms=1"),
        ({"limit": 0}, "limit=0"),
        ({"size": 10_000, "terms": 2, "limit": 5}, "size=10000"),
    ],
)
def test_what_cannot_be_made_is_refused(parameters, says):
    with pytest.raises(UserError, match=re.escape(says)):
        list(islice(rows(**parameters), 20_000))
