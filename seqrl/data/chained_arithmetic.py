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
FORGOTTEN_CARRY_RATE = 0.6
"""How often a worked step that carries or borrows forgets it."""
OFF_BY_ONE_RATE = 0.1
"""How often any other worked step is off by one. Together: about 30% of the steps are wrong."""
HELD_OUT_SHARE = 1 / 8
MAX_DRAWS_PER_ROW = 1000


def rows(
    *, size: int = 1000, seed: int = 0, split: str = "train", terms: int = 3, limit: int = 20
) -> Iterator[dict[str, Any]]:
    """Yields `size` distinct problems of `terms` numbers whose running value stays within 0..limit.

    Raises UserError where `split` is neither `train` nor `test`, or fewer than `size` problems exist.
    """
    for index, problem in enumerate(_problems(size, seed, split, terms, limit)):
        steps = _work_out(problem)
        yield {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": _expression(problem)}],
            "reward_model": {"style": "rule", "ground_truth": str(steps[-1])},
            "extra_info": {"split": split, "index": index},
        }


def worked_rows(
    *, size: int = 1000, seed: int = 0, split: str = "train", terms: int = 3, limit: int = 20
) -> Iterator[dict[str, Any]]:
    """Like `rows`, with an `answer`: a worked solution about 30% of whose steps are wrong."""
    rng = random.Random(f"worked {seed}")
    for row, problem in zip(
        rows(size=size, seed=seed, split=split, terms=terms, limit=limit),
        _problems(size, seed, split, terms, limit),
        strict=True,
    ):
        yield {**row, "answer": _solution(problem, _work_out(problem, rng))}


def _problems(size: int, seed: int, split: str, terms: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Distinct problems of one split: the first number, then signed one-digit steps."""
    if split not in ("train", "test"):
        raise UserError(f"{DATA_SOURCE}: split={split!r} is not known; write split=train or split=test")
    rng = random.Random(f"{split} {seed}")
    seen: set[tuple[int, ...]] = set()
    for _ in range(size * MAX_DRAWS_PER_ROW):
        if len(seen) == size:
            return
        problem = _draw(rng, terms, limit)
        if problem not in seen and _is_held_out(problem) == (split == "test"):
            seen.add(problem)
            yield problem
    if len(seen) < size:
        raise UserError(
            f"{DATA_SOURCE}: found only {len(seen)} of size={size} distinct problems with "
            f"terms={terms}, limit={limit}, split={split}; raise terms or limit, or lower size"
        )


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
