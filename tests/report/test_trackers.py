import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from seqrl.config.schema import TrainerConfig
from seqrl.errors import UserError
from seqrl.report.files import append_rows, read_rows
from seqrl.report.page import SampleRow, append_samples
from seqrl.report.trackers import History, Trackers, make_trackers


def test_history_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History.open(path, -1)
    for step in range(1, 6):
        history.log({"reward": step / 10}, step)
    resumed = History.open(path, 3)
    assert [row["step"] for row in resumed.rows] == [1, 2, 3]
    resumed.log({"reward": 0.9}, 4)
    assert read_rows(path) == resumed.rows
    assert read_rows(path)[-1] == {"step": 4, "reward": 0.9}


@pytest.mark.parametrize("torn", [b'{"step": 3, "rew', b'{"step": 3, "x": "\xe2', b"\0\0\0\0", b"3"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.25}\n'
    path.write_bytes(whole + torn)
    history = History.open(path, 10)
    assert [row["step"] for row in history.rows] == [1, 2]
    assert path.read_bytes() == whole
    history.log({}, 3)
    assert len(read_rows(path)) == 3


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        History.open(path, 10)


def test_floats_come_back_bit_by_bit_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1, "a": 0.1 + 0.2, "b": float("nan"), "c": float("inf")}])
    assert read_rows(path) == [{"step": 1, "a": 0.1 + 0.2, "b": None, "c": None}]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_metrics_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    history = History.open(tmp_path / "metrics.jsonl", -1)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        history.log({"reward": 1.0}, 1)


class FullDisk:
    """A tracker that fails from its second step on."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step > 1:
            raise OSError("No space left on device")
        self.steps.append(step)

    def close(self) -> None:
        raise RuntimeError("closed after it was switched off")


def test_a_failing_tracker_is_switched_off_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = FullDisk()
    trackers = Trackers(History.open(tmp_path / "metrics.jsonl", -1), {"tensorboard": full})
    for step in (1, 2, 3):
        trackers.log({"reward": 1.0}, step)
    trackers.close()
    assert full.steps == [1]
    assert [row["step"] for row in trackers.history.rows] == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["tensorboard is switched off for the rest of the run (OSError: No space left on device)"]


def test_resume_cuts_metrics_and_samples_and_a_fresh_run_starts_empty(tmp_path: Path) -> None:
    config = TrainerConfig(logger=[])
    trackers = make_trackers(config, {}, tmp_path, total_steps=5, first_step=1)
    for step in range(5):
        trackers.log({"reward": 0.0}, step)
        append_samples(tmp_path, [SampleRow(step, "p", "r", "t", 1.0)])
    trackers = make_trackers(config, {}, tmp_path, total_steps=5, first_step=3)
    assert [row["step"] for row in trackers.history.rows] == [0, 1, 2]
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [0, 1, 2]
    trackers = make_trackers(config, {}, tmp_path, total_steps=5, first_step=1)
    assert trackers.history.rows == []
    assert read_rows(tmp_path / "samples.jsonl") == []


def test_an_unknown_logger_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.logger: `tensorbord`.*try `tensorboard`"):
        make_trackers(TrainerConfig(logger=["tensorbord"]), {}, tmp_path, total_steps=1, first_step=1)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'seqrl\[wandb\]'"):
        make_trackers(TrainerConfig(logger=["wandb"]), {}, tmp_path, total_steps=1, first_step=1)


FAKE_WANDB = """
import json, pathlib
class Run:
    def __init__(self, directory, **facts):
        self.path = pathlib.Path(directory) / "fake_wandb.jsonl"
        self.note(facts)
    def note(self, what):
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, metrics, step):
        self.note({"step": step, **metrics})
    def finish(self):
        self.note("finished")
def init(dir, **facts):
    return Run(dir, **facts)
"""


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = TrainerConfig(logger=["wandb"], project_name="p", experiment_name="e")
    for first_step in (1, 2, 1):
        trackers = make_trackers(config, {"a": 1}, tmp_path, total_steps=2, first_step=first_step)
        trackers.log({"reward": 0.5}, first_step)
        trackers.close()
    monkeypatch.delitem(sys.modules, "wandb")
    noted = [json.loads(line) for line in (tmp_path / "fake_wandb.jsonl").read_text().splitlines()]
    assert noted[1:3] == [{"step": 1, "reward": 0.5}, "finished"]
    first, resumed, fresh = noted[0], noted[3], noted[6]
    assert first["config"] == {"a": 1}
    assert first["id"] == resumed["id"] != fresh["id"]


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = make_trackers(TrainerConfig(logger=["tensorboard"]), {}, tmp_path, total_steps=2, first_step=1)
    trackers.log({"actor/entropy": 0.5}, 1)
    trackers.log({"actor/entropy": 0.25}, 2)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("actor/entropy")] == [(1, 0.5), (2, 0.25)]
