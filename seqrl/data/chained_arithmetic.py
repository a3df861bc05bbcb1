"""Chained arithmetic: sums and differences worked out one step at a time.

    prompt     17+8-6
    solution   17+8=25;25-6=19;19

The last item is the answer. `rows` yields problems in verl's row schema, `worked_rows` the same
problems with a worked solution that is often wrong, as a student's would be: a step that carries or
borrows tends to forget it (17+8=15), any other is now and then off by one, and the chain goes on
from the wrong number. A model that learns from them knows the form, and errs as they do.

Training and held-out problems never overlap: a problem belongs to one split by its hash.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from seqrl.errors import UserError

DATA_SOURCE = "chained_arithmetic"
FORGOTTEN_CARRY_RATE = 0.55
"""How often a worked step that carries or borrows forgets it."""
OFF_BY_ONE_RATE = 0.14
"""How often any other worked step is off by one. Together: about 30% of the steps are wrong."""
HELD_OUT_SHARE = 1 / 8
MAX_DRAWS_IN_VAIN = 20_000


def rows(
    *, size: int = 1000, seed: int = 0, split: str = "train", terms: int = 3, limit: int = 20
) -> Iterator[dict[str, Any]]:
    """Yields `size` distinct problems of `terms` numbers whose running value stays within 0..limit.

    Raises UserError where `split` is neither `train` nor `test`, or fewer than `size` problems are found.
    """
    seen: set[tuple[int, ...]] = set()
    in_vain = 0
    for problem in _problems(f"{split} {seed}", split, terms, limit):
        if len(seen) == size:
            return
        if problem in seen:
            in_vain += 1
            if in_vain == MAX_DRAWS_IN_VAIN:
                raise UserError(
                    f"{DATA_SOURCE}: found only {len(seen)} of size={size} distinct problems with "
                    f"terms={terms}, limit={limit}, split={split}; raise terms or limit, or lower size"
                )
            continue
        in_vain = 0
        yield _row(problem, split, len(seen))
        seen.add(problem)


def worked_rows(
    *, size: int = 1000, seed: int = 0, split: str = "train", terms: int = 3, limit: int = 20
) -> Iterator[dict[str, Any]]:
    """Yields `size` problems, some more than once, each with an `answer`: a worked solution.

    About 30% of the steps are wrong.
    """
    slips = random.Random(f"slips {seed}")
    problems = _problems(f"worked {split} {seed}", split, terms, limit)
    for index, problem in zip(range(size), problems, strict=False):
        yield {**_row(problem, split, index), "answer": _solution(problem, _work_out(problem, slips))}


def _problems(seed: str, split: str, terms: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Problems of one split without end: the first number, then signed one-digit steps."""
    if split not in ("train", "test"):
        raise UserError(f"{DATA_SOURCE}: split={split!r} is not known; write split=train or split=test")
    if terms < 2 or limit < 1:
        raise UserError(f"{DATA_SOURCE}: terms={terms} must be 2 or more, and limit={limit} 1 or more")
    rng = random.Random(seed)
    while True:
        problem = _draw(rng, terms, limit)
        if _is_held_out(problem) == (split == "test"):
            yield problem


def _row(problem: tuple[int, ...], split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": _expression(problem)}],
        "reward_model": {"style": "rule", "ground_truth": str(_work_out(problem)[-1])},
        "extra_info": {"split": split, "index": index},
    }


def _draw(rng: random.Random, terms: int, limit: int) -> tuple[int, ...]:
    value = rng.randint(1, limit)
    problem = [value]
    while len(problem) < terms:
        step = rng.choice((1, -1)) * rng.randint(1, 9)
        if 0 <= value + step <= limit:
            problem.append(step)
            value += step
    return tuple(problem)


def _is_held_out(problem: tuple[int, ...]) -> bool:
    digest = hashlib.sha256(_expression(problem).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def _expression(problem: tuple[int, ...]) -> str:
    return str(problem[0]) + "".join(f"{step:+d}" for step in problem[1:])


def _work_out(problem: tuple[int, ...], slips: random.Random | None = None) -> list[int]:
    """The running values after each step, right ones, or with the slips of a careless student."""
    value, values = problem[0], []
    for step in problem[1:]:
        right = value + step
        written = right
        if slips is not None:
            carries = right // 10 != value // 10
            if carries and slips.random() < FORGOTTEN_CARRY_RATE:
                written = value // 10 * 10 + right % 10
            elif not carries and slips.random() < OFF_BY_ONE_RATE:
                written = max(0, right + slips.choice((1, -1)))
        value = written
        values.append(value)
    return values


def _solution(problem: tuple[int, ...], values: list[int]) -> str:
    before = [problem[0], *values]
    steps = [f"{a}{step:+d}={b}" for a, step, b in zip(before, problem[1:], values, strict=False)]
    return ";".join([*steps, str(values[-1])])
