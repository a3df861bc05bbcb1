"""The files of a run's directory that grow by a line a step and are cut back on resume.

A killed process can leave at most its last line torn, for each append is one write followed by a
sync; whatever replaces a whole file is written beside it first and then renamed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seqrl.errors import UserError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON object a line and syncs. A UserError where the disk does not take it."""
    text = "".join(_line(row) for row in rows)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room and resume") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON objects, without a torn last line; none where there is no file.

    A UserError names any other line that is no JSON object with an integer `step`.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):  # what follows the last line break is empty or torn
            raise UserError(f"{path}, line {number}: not a JSON object with a `step`; remove the line")
    return rows


def cut_rows(path: Path, upto_step: int) -> list[dict[str, Any]]:
    """Removes the rows after `upto_step` and a torn last line, atomically; returns the rest."""
    rows = [row for row in read_rows(path) if row["step"] <= upto_step]
    if path.exists():
        write_atomic(path, "".join(_line(row) for row in rows))
    return rows


def write_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 so that `path` always holds either its old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _line(row: Mapping[str, Any]) -> str:
    """Strict JSON has no NaN and no infinity: both are written null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
