"""What the benchmarks share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import (
    Elsewhere,
    Ratio,
    matrix_peak,
    peak_memory,
    setting,
    table,
    take_turns,
    write_results,
)


class Side:
    """Writes its name into a log and fails in the given run."""

    def __init__(self, name: str, log: list[str], fails_in: int = 0) -> None:
        self.name, self.log, self.fails_in, self.runs = name, log, fails_in, 0

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == self.fails_in:
            raise RuntimeError("out of luck")
        self.log.append(self.name)


def test_sides_alternate_and_the_warm_up_is_not_counted() -> None:
    log: list[str] = []
    seconds = take_turns({name: Side(name, log) for name in "ab"}, 2, warmup=1)
    assert "".join(log) == "ababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_peer_that_fails_is_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    sides = {"ours": Side("o", log), "peer": Side("p", log, fails_in=2), "other": Side("x", log)}
    seconds = take_turns(sides, 2, warmup=1)
    assert "".join(log) == "opxoxox"
    assert set(seconds) == {"ours", "other"}
    assert "peer is left out: RuntimeError: out of luck" in capsys.readouterr().err


def test_our_own_failure_is_raised() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        take_turns({"ours": Side("o", [], fails_in=1)}, 1)


def test_a_ratio_is_taken_turn_by_turn() -> None:
    ratio = Ratio.of([2.0, 30.0, 12.0], [1.0, 10.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert str(ratio) == "3.00 (2.00 to 4.00)"
    with pytest.raises(ValueError, match="longer"):
        Ratio.of([1.0], [1.0, 2.0])


def test_the_peak_is_of_the_order_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PEAK_SHAPES", ((256, 256, 256),))
    monkeypatch.setattr(measure, "PEAK_SECONDS", 0.02)
    assert 1e9 < matrix_peak(torch.float32) < 1e14


def test_peak_memory_counts_what_was_freed_again() -> None:
    size = 64 * 2**20

    def run() -> str:
        torch.ones(size // 4)  # all of it is written, and gone at once
        return "done"

    torch.ones(size // 4)
    answer, peak = peak_memory(run)
    assert answer == "done"
    assert size * 0.9 < peak < size * 1.5


def counter(start: int) -> Callable[[], tuple[int, int]]:
    """Counts from `start`, twice, and says in which process."""
    counts = iter(range(start, start + 2))

    def count() -> tuple[int, int]:
        return os.getpid(), next(counts)

    return count


def test_sides_elsewhere_share_a_process_and_keep_what_they_have() -> None:
    with Elsewhere() as elsewhere:
        one, other = elsewhere.side(counter, 1), elsewhere.side(counter, 5)
        pid = elsewhere.run(os.getpid)
        assert pid != os.getpid()
        assert [one(), other(), one()] == [(pid, 1), (pid, 5), (pid, 2)]
        assert elsewhere.run(torch.get_num_threads) == torch.get_num_threads()
        with pytest.raises(StopIteration):
            one()
        assert other() == (pid, 6)  # it goes on after an exception
        elsewhere.forget()
        newer = elsewhere.side(counter, 8)
        with pytest.raises(KeyError):  # and not one that was made since
            one()
        assert newer() == (pid, 8)


def test_an_exception_while_a_side_is_made_elsewhere_comes_back() -> None:
    with Elsewhere() as elsewhere, pytest.raises(FileNotFoundError, match="nowhere"):
        elsewhere.side(os.chdir, "/nowhere")  # type: ignore[arg-type]


def test_results_are_written_with_their_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = setting("numpy", turns_of_each=3)
    assert "numpy" in here["versions"] and here["turns of each"] == 3
    text = f"# Title\n\n{table(['a', 'b'], [[1, 2]])}"
    write_results("name", here, text, {"ratio": Ratio.of([4.0], [2.0])}, directory=tmp_path)
    report = (tmp_path / "name.md").read_text()
    assert report.startswith("# Title\n\n- date: ")
    assert report.endswith("\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert report in capsys.readouterr().out
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["numbers"] == {"ratio": {"median": 2.0, "low": 2.0, "high": 2.0}}
    assert written["setting"]["turns of each"] == 3
