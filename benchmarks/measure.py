"""What all benchmarks share: turns, ratios, peaks, and where results go."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch.nn.functional import linear

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PEAK_SHAPES = (
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (8192, 512, 1536),
    (16384, 512, 512),
    (4096, 1024, 4096),
)
"""Rows, inner and columns of what `matrix_peak` multiplies: square, and tall as in training."""
PEAK_WAYS = 3
"""To multiply each of them."""
PEAK_SECONDS = 0.1
"""How long each of these is repeated."""
PEAK_WINDOW = len(PEAK_SHAPES) * PEAK_WAYS * PEAK_SECONDS
"""In so many seconds `matrix_peak` finds the best."""


def take_turns(
    sides: Mapping[str, Callable[[], Any]], turns: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side's `turns` runs, taken A B A B after `warmup` runs of each.

    The first side is ours and its exceptions are raised. The others are peers: one that raises is told on
    standard error and left out, also of the answer.
    """
    ours = next(iter(sides))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + turns):
        for name in list(seconds):
            start = time.perf_counter()
            try:
                sides[name]()
            except Exception as error:
                if name == ours:
                    raise
                print(f"*** {name} is left out: {type(error).__name__}: {error} ***", file=sys.stderr)
                del seconds[name]
                continue
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times as much one side has as the other, taken within each turn."""

    median: float
    low: float
    high: float
    """The smallest and the largest of all turns."""

    @classmethod
    def of(cls, theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
        """Raises ValueError for sides with unlike numbers of turns."""
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s, at 2 a multiplication and addition: the best that torch's libraries, MKL and oneDNN, reach on
    this machine's processor with the threads it has now, over several shapes and both orders of the second
    factor."""
    from seqrl.kernels.products import product  # not before: a process of a peer imports this module

    best = 0.0
    for rows, inner, columns in PEAK_SHAPES:
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        transposed = weight.t().contiguous()
        ways = (
            lambda: torch.mm(x, transposed),  # noqa: B023
            lambda: linear(x, weight),  # noqa: B023
            lambda: product(x, weight),  # noqa: B023
        )
        assert len(ways) == PEAK_WAYS
        for run in ways:
            best = max(best, 2 * rows * inner * columns / _shortest(run))
    return best


def _shortest(run: Callable[[], Any]) -> float:
    """Seconds of the quickest run of those that fit into `PEAK_SECONDS`."""
    run()
    shortest, stop = math.inf, time.perf_counter() + PEAK_SECONDS
    while (start := time.perf_counter()) < stop:
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def peak_memory(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run()` gives back, and the bytes by which the resident set at its highest was above its start;
    on Linux with glibc.

    Memory that was freed before goes back to the system first: taken again, it would not be counted.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts anew
    before = status_bytes("VmRSS")
    answer = run()
    return answer, max(status_bytes("VmHWM") - before, 0)


class Elsewhere:
    """A process of its own, with as many threads as this one has when it is made, for sides that take turns.

    What a family sets for its whole process (seqrl's kernels have the allocator keep memory) then holds for
    no other one. Functions, arguments and answers have to be importable or picklable; exceptions come back.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        threads = (torch.get_num_threads(),)
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=threads)
        self._numbers = itertools.count()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` there."""
        return self._pool.submit(function, *arguments).result()

    def side(self, make: Callable[..., Callable[[], T]], *arguments: Any) -> Callable[[], T]:
        """Calls what `make(*arguments)` gives back there, and stays there, until `forget`."""
        number = next(self._numbers)
        self.run(_make_side, number, make, arguments)
        return lambda: self.run(_run_side, number)

    def forget(self) -> None:
        """Lets all sides go, and what they hold."""
        self.run(_forget_sides)


def _begin(threads: int) -> None:
    """In a process of an `Elsewhere`: as many threads, and an end with the process that made it."""
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


_sides: dict[int, Callable[[], Any]] = {}
"""In the process of an `Elsewhere`: its sides."""


def _make_side(number: int, make: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> None:
    _sides[number] = make(*arguments)


def _run_side(number: int) -> Any:
    return _sides[number]()


def _forget_sides() -> None:
    _sides.clear()
    gc.collect()


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a process that ends with it: no memory is there that something else has left.
    See `Elsewhere`."""
    with Elsewhere() as elsewhere:
        return elsewhere.run(function, *arguments)


def status_bytes(key: str) -> int:
    """A field of /proc/self/status: `VmRSS` is the memory of this process, `VmHWM` the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def setting(*packages: str, **more: Any) -> dict[str, Any]:
    """Where and when this runs, with the versions of seqrl, torch, transformers and `packages`; `more` is
    added as it is, underscores as spaces."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x] if cpuinfo.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.machine()
    versions = [f"{x} {importlib.metadata.version(x)}" for x in ("seqrl", "torch", "transformers", *packages)]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(versions),
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load average before": round(os.getloadavg()[0], 1),
        **{key.replace("_", " "): value for key, value in more.items()},
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_results(
    name: str,
    setting: Mapping[str, Any],
    markdown: str,
    numbers: Mapping[str, Any],
    *,
    directory: Path = RESULTS,
) -> None:
    """Writes NAME.md and, with all `numbers`, NAME.json, and prints the former.

    `markdown` begins with its title, behind which the setting is listed.
    """
    setting = {**setting, "load average after": round(os.getloadavg()[0], 1)}
    title, _, body = markdown.strip().partition("\n")
    listed = "\n".join(f"- {key}: {value}" for key, value in setting.items())
    report = f"{title}\n\n{listed}\n\n{body.strip()}\n"
    print(report)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(report)
    content = json.dumps({"setting": setting, "numbers": numbers}, indent=1, default=asdict)
    (directory / f"{name}.json").write_text(content + "\n")
