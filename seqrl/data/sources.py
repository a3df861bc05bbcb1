"""Where rows come from: Parquet and JSONL files, and procedural tasks (see `tasks.py`).

A row is a mapping of columns that remembers where it stood, so that whoever reads a column can name
the file and the row in an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqrl.data.tasks import TASKS, task_rows
from seqrl.errors import UserError


@dataclass(frozen=True)
class Row:
    uid: str
    """`file:row` (both counted from 1) or `task:index` (from 0)."""
    counted: str
    """What the number in `uid` counts: `line`, `row` or `index`."""
    columns: Mapping[str, Any]
    generated: bool = False
    """True for a procedural task, whose columns have verl's own names whatever the config calls them."""

    @property
    def place(self) -> str:
        """The row as an error names it."""
        return f"{self.uid} ({self.counted})"

    def column(self, name: str, *, hint: str) -> Any:
        """The column's value; raises UserError, ending in `hint`, where it is missing or null."""
        value = self.columns.get(name)
        if value is None:
            found = ", ".join(self.columns) or "none"
            raise UserError(f"{self.place}: column `{name}` is missing or null (columns: {found}); {hint}")
        return value


def read_rows(sources: Sequence[str], *, key: str) -> Iterator[Row]:
    """Yields the rows of each source in turn; `key` is the config key that lists them.

    Raises UserError for a source that is missing, unknown, broken, empty or listed twice.
    """
    seen: set[str] = set()
    for source in sources:
        is_task = source.partition(":")[0] in TASKS
        path = Path(source).expanduser()
        identity = source if is_task else str(path.resolve())
        if identity in seen:
            raise UserError(f"{key}: {source} is listed twice; remove one")
        seen.add(identity)
        empty = True
        for row in _generated(source, key) if is_task else _from_file(path, key):
            empty = False
            yield row
        if empty:
            raise UserError(f"{key}: {source} holds no rows; remove it from the list or fill it")


def as_text(value: Any, what: str) -> str:
    """`value`, where it is text a tokenizer can take; raises UserError naming it as `what`."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, not {type(value).__name__}; correct the row")
    if not value.strip():
        raise UserError(f"{what} is empty; fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a surrogate pair, which is no text; write it as UTF-8") from error
    return value


def _generated(source: str, key: str) -> Iterator[Row]:
    for index, columns in enumerate(task_rows(source, key=key)):
        yield Row(f"{source}:{index}", "index", columns, generated=True)


def _from_file(path: Path, key: str) -> Iterator[Row]:
    readers = {".parquet": _parquet, ".jsonl": _jsonl}
    if path.suffix not in readers:
        tasks = ", ".join(f"{task}:..." for task in TASKS)
        raise UserError(f"{key}: {path} is neither a .parquet nor a .jsonl file, nor a task ({tasks})")
    if not path.is_file():
        raise UserError(f"{key}: no file {path}; check the path")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {_first_line(error)}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number} (line)"
            try:
                columns = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8"
                ) from error
            except ValueError as error:
                raise UserError(f"{place}: not valid JSON: {error}; write one object a line") from error
            if not isinstance(columns, dict):
                raise UserError(f"{place}: a {type(columns).__name__}, not a JSON object; write one a line")
            yield Row(f"{path}:{number}", "line", columns)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for i in range(batch.num_rows):
                    number += 1
                    # Row by row, so that text which is not UTF-8 is found with its row.
                    (columns,) = batch.slice(i, 1).to_pylist()
                    yield Row(f"{path}:{number}", "row, from 1", columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} (row, from 1): text that is not UTF-8; write it anew") from error
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a readable Parquet file: {_first_line(error)}; write it anew, or name it .jsonl "
            "if it is one"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
