"""A forward whose results are taken over by one of fewer tokens.

What of a micro-batch has a gradient is known only after its forward: GSPO clips many sequences, which have
none then. So the forward runs without autograd while its operations keep what they made (`recording`). Then
they run once more, with autograd, over the tokens that matter (`replaying`), and each takes its rows of what
was made instead of computing them. The backward pass is that of these tokens alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

Made = tuple[Any, ...]
"""Tensors with a row for each token, or None."""


class Record:
    """What the operations of one forward made, in their order."""

    def __init__(self) -> None:
        self._made: deque[Made] = deque()
        self._replaying = False
        self.rows: Tensor | None = None
        """While it is replayed: the rows to take; None: all."""

    def forget(self, x: Tensor) -> None:
        """What the last operation made, if that is `x`: no gradient needs it."""
        last = self._made[-1][0] if self._made and not self._replaying else None
        if last is x:
            self._made[-1] = (None, *self._made[-1][1:])

    def rows_of(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)

    def made(self, compute: Callable[[], Made]) -> Made:
        """As it was made, all rows of it."""
        if self._replaying:
            return self._made.popleft()
        with _current_is(None):  # what it is made of is not asked for
            self._made.append(compute())
        return self._made[-1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        with _current_is(self):
            yield

    @contextmanager
    def replaying(self, rows: Tensor | None) -> Iterator[None]:
        """The operations within are those that were recorded, over `rows` of their tokens."""
        self._replaying, self.rows = True, rows
        with _current_is(self):
            yield


_current: ContextVar[Record | None] = ContextVar("record", default=None)


@contextmanager
def _current_is(record: Record | None) -> Iterator[None]:
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Record | None:
    """The record that operations keep to or take from, if any."""
    return _current.get()


def made(compute: Callable[[], Made]) -> Made:
    """What an operation makes: computed, or its rows of what was."""
    record = current()
    if record is None:
        return compute()
    return tuple(None if x is None else record.rows_of(x) for x in record.made(compute))
