"""What is drawn for rows that come and go, and who of them has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from seqrl.rollout.rows import DecodedRows, Request
from seqrl.types import SamplingParams

END, GO_ON = 1, 2


def logits(*tokens: int) -> Tensor:
    """Of which each row draws its own of `tokens`."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 4).float().log()


def make_rows(*, lag: int = 0, capacity: int = 3, limit: int = 5) -> DecodedRows:
    return DecodedRows(torch.device("cpu"), [END], SamplingParams(limit), capacity, room=4, lag=lag)


def join(rows: DecodedRows, *tokens: int, first: int = 0) -> None:
    requests = [Request(0, first + i) for i in range(len(tokens))]
    rows.join(requests, ["p"] * len(tokens), 0, logits(*tokens))


def step(rows: DecodedRows, *tokens: int) -> None:
    rows.draw(slice(0, len(tokens)), logits(*tokens))
    rows.took(1)


def test_rows_leave_with_what_was_drawn_for_them_and_others_move_up() -> None:
    rows = make_rows()
    join(rows, GO_ON, GO_ON, GO_ON)
    step(rows, 3, END, 0)
    assert rows.going() == [0, 2]
    (left,) = rows.leave([0, 2]).responses(rows.eos_on_host)
    assert left[0] == Request(0, 1) and left[1].tokens.tolist() == [GO_ON, END] and left[1].finished
    join(rows, 3, first=3)
    assert rows.requests == [Request(0, 0), Request(0, 2), Request(0, 3)] and rows.drawn == [2, 2, 1]
    step(rows, 0, 3, 0)
    step(rows, 0, 0, 0)
    assert rows.going() is None
    step(rows, 0, 0, 3)  # the fifth of the first two, which is the limit
    assert rows.going() == [2]
    made = dict(rows.leave([2]).responses(rows.eos_on_host))
    assert made[Request(0, 0)].tokens.tolist() == [GO_ON, 3, 0, 0, 0]
    assert made[Request(0, 2)].tokens.tolist() == [GO_ON, 0, 3, 0, 0]
    assert not any(response.finished for response in made.values())


def test_what_is_drawn_after_the_end_and_after_the_limit_is_lost() -> None:
    rows = make_rows(lag=1, limit=3)
    join(rows, GO_ON, GO_ON)
    for tokens in ((END, 3), (3, 0), (0, GO_ON), (GO_ON, GO_ON)):
        step(rows, *tokens)
    made = dict(rows.leave([]).responses(rows.eos_on_host))
    assert made[Request(0, 0)].tokens.tolist() == [GO_ON, END]
    assert made[Request(0, 1)].tokens.tolist() == [GO_ON, 3, 0]


def test_an_ending_is_told_a_look_later() -> None:
    rows = make_rows(lag=1)
    join(rows, GO_ON, END)
    assert rows.going() is None
    step(rows, 3, 3)
    assert rows.going() == [0]


def test_a_row_in_the_place_of_one_that_has_ended_goes_on() -> None:
    """Also where it is the same request, which was put back and joins again."""
    for again in (1, 2):
        rows = make_rows(lag=1)
        join(rows, GO_ON, END)
        assert rows.going() is None
        rows.keep([0])
        step(rows, 3)
        join(rows, GO_ON, first=again)
        assert rows.going() is None, "the look that saw the end was at another row"


def test_rows_of_nobody_stay_where_they_are() -> None:
    rows = make_rows()
    join(rows, GO_ON, GO_ON)
    rows.keep([1])
    for _ in range(9):
        step(rows, 3, END, 3)
    assert rows.count.tolist() == [5, 0, 0, 0] and rows.place[1:].tolist() == [3, 3, 3]
