"""Procedural tasks as a source of rows: `TASK_FAMILY:NAME?param=value&param=value`.

`reasoning_gym:leg_counting?size=100&seed=3` draws from the package reasoning_gym,
`chained_arithmetic:?size=100&split=test` from seqrl's own task. Rows follow verl's schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from seqrl.errors import UserError

REASONING_GYM = "reasoning_gym"
CHAINED_ARITHMETIC = "chained_arithmetic"
TASKS = (REASONING_GYM, CHAINED_ARITHMETIC)


def task_rows(source: str, *, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a procedural source, in verl's schema; `key` is the config key that names it.

    Raises UserError for an unknown task, an unknown parameter or a value the task does not take.
    """
    family, _, rest = source.partition(":")
    name, _, query = rest.partition("?")
    make = _reasoning_gym if family == REASONING_GYM else _chained_arithmetic
    try:
        yield from make(name, query)
    except UserError as error:
        raise UserError(f"{key}: {source}: {error}") from error
    except (AssertionError, ValueError, TypeError) as error:
        # How the tasks say that their parameters do not go together.
        reason = str(error) or type(error).__name__
        raise UserError(f"{key}: {source}: {reason}; change the parameters") from error


def _chained_arithmetic(name: str, query: str) -> Iterator[dict[str, Any]]:
    from seqrl.data import chained_arithmetic

    if name:
        raise UserError(f"there is one task of this kind; write chained_arithmetic:?{query}")
    parameters = inspect.signature(chained_arithmetic.rows).parameters
    hints = get_type_hints(chained_arithmetic.rows)
    yield from chained_arithmetic.rows(**_parse(query, {p: hints[p] for p in parameters}))


def _reasoning_gym(name: str, query: str) -> Iterator[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise UserError(f"reasoning_gym has no task {name!r}; {_nearest(name, DATASETS)}")
    config_class = DATASETS[name][1]
    hints = get_type_hints(config_class)
    parameters = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    # Without a seed reasoning_gym draws one: every start would then see other prompts.
    config = {"seed": 0, **_parse(query, parameters)}
    for entry in create_dataset(name, **config):
        yield {
            "data_source": f"reasoning_gym/{name}",
            "prompt": entry["question"],
            # Some tasks have many right answers and no answer of their own; their scorer needs none.
            "reward_model": {"ground_truth": "" if entry["answer"] is None else entry["answer"]},
            # The entry as it is, tuples included: some scorers compare it exactly.
            "extra_info": {"task": name, "config": config, "entry": entry},
        }


def _parse(query: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`a=1&b=x` to values of the types in `parameters` (name to annotation)."""
    values: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, equals, text = part.partition("=")
        if name not in parameters:
            raise UserError(f"no parameter {name!r}; {_nearest(name, parameters)}")
        if not equals or name in values:
            raise UserError(f"write each parameter once, as {name}=value")
        try:
            values[name] = _value(text, parameters[name])
        except ValueError as error:
            wanted = getattr(parameters[name], "__name__", str(parameters[name]))
            raise UserError(f"{name}={text!r} is not {wanted}; correct the value") from error
    return values


def _value(text: str, annotation: Any) -> Any:
    """Raises ValueError where `text` does not fit. What is no scalar is read as JSON."""
    if get_origin(annotation) in (Union, types.UnionType):
        if type(None) in get_args(annotation) and text == "null":
            return None
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if annotation in (int, float):
        return annotation(text)
    if annotation is str or get_origin(annotation) is Literal:
        return text
    if annotation not in (bool, list, tuple) and get_origin(annotation) is None:
        raise ValueError(f"no way to write a {annotation}")
    value = json.loads(text.lower() if annotation is bool else text)
    if annotation is bool and not isinstance(value, bool):
        raise ValueError(text)
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    """Advice on an unknown name: the names like it, or all of them."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
