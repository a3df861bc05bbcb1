"""Few kernels out of many: on CUDA, what lies between products is compiled by torch.

A gate or a norm in torch's own operations reads and writes the whole batch once for each of them; compiled,
once in all. Torch compiles at the first call, which takes seconds, and keeps the result in a cache folder of
its own. Numbers of rows may change without a new compilation; widths are compiled in, so that rows are known
to be aligned.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from seqrl.kernels.build import SWITCH

_log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


_failures: list[Exception] = []
"""Of the compiler, in this process; one is enough."""


def compiles() -> bool:
    """Whether there is what it takes; where there is not, it is told once."""
    return not _failures and _has_triton()


@functools.cache
def _has_triton() -> bool:
    if os.environ.get(SWITCH) == "0":
        return False
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _warn("there is no Triton here, and `pip install triton` makes up for it")
    return found


def _warn(reason: str) -> None:
    _log.warning(
        "kernels: torch's operations on CUDA are not compiled into fewer, which is slower: %s; %s=0 silences "
        "this",
        reason,
        SWITCH,
    )


def fused(function: Function) -> Function:
    """`function` of tensors, the first of which has rows, and of numbers; without gradient. Compiled where
    the first is on CUDA; elsewhere as it is."""
    compiled = compiled_by_rows(function)

    @functools.wraps(function)
    def run(x: Tensor, *others: Any) -> Any:
        if x.is_cuda and compiles():
            try:
                return compiled(x, *others)
            except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
                _failures.append(error)
                _warn(str(error).strip().splitlines()[0])
        return function(x, *others)

    return cast(Function, run)


def compiled_by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, for any number of rows."""
    compiled = functools.cache(lambda: torch.compile(function))  # at the first call: no work at import

    def run(*arguments: Any) -> Any:
        # One version for training and for decoding: whether a gradient is asked for makes no difference.
        # What is given twice stays one tensor, for it may be written to.
        detached = {id(x): x.detach() for x in arguments if isinstance(x, Tensor)}
        for x in arguments:
            # A weight may have as many numbers as there are rows, by chance.
            if isinstance(x, Tensor) and len(x) == len(arguments[0]) and not isinstance(x, Parameter):
                torch._dynamo.maybe_mark_dynamic(detached[id(x)], 0)
        with torch.no_grad():
            return compiled()(*(detached.get(id(x), x) for x in arguments))

    return run
