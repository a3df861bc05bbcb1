import io

import pytest

from seqrl.report.console import Console, trend
from seqrl.report.wording import duration, number

STEP = {
    "critic/rewards/mean": 0.53,
    "val/accuracy": 0.61,
    "actor/pg_clipfrac": 0.18,
    "actor/seq_clipfrac": 0.21,
    "actor/grad_norm": 0.4,
    "actor/entropy": 0.9,
    "response_length/mean": 23.4,
    "timing_s/step": 0.82,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_line_a_step() -> None:
    stream = io.StringIO()
    console = Console(200, 1, "run", stream=stream)
    console.log({"val/accuracy": 0.41}, 0)
    console.log(STEP, 12)
    console.print("saved")
    console.close()
    assert stream.getvalue().splitlines() == [
        "run: 200 steps",
        "step 0/200 · acc 0.41",
        "step 12/200 · reward 0.53 · acc 0.61 · clip 0.18 tok 0.21 seq · |grad| 0.40 · entropy 0.90"
        " · 23.4 tok · 0.82 s · 2m34s left",
        "saved",
    ]


def test_remaining_time_is_from_the_median() -> None:
    stream = io.StringIO()
    console = Console(103, 1, "run", stream=stream)
    for step, seconds in ((1, 1.0), (2, 60.0), (3, 1.0)):
        console.log({"timing_s/step": seconds}, step)
    assert stream.getvalue().splitlines()[-1] == "step 3/103 · 1.00 s · 1m40s left"


def test_supervised_training_shows_its_loss() -> None:
    stream = io.StringIO()
    Console(9, 1, "sft", stream=stream).log({"train/loss": 0.0123, "timing_s/step": 2.0}, 9)
    assert stream.getvalue().splitlines()[-1] == "step 9/9 · loss 0.012 · 2.00 s · 0.00 s left"


def test_the_live_table_shows_values_and_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = Console(200, 1, "run", stream=stream)
    console.log(STEP, 12)
    console.print("saved [a checkpoint]")
    console.close()
    text = stream.getvalue()
    for expected in (
        "12/200",
        "held-out accuracy",
        "0.61",
        "clip fraction, sequence",
        "saved [a checkpoint]",
    ):
        assert expected in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is visible again


def test_trend_has_the_lowest_value_lowest() -> None:
    assert trend([0.0, 1.0, 0.5]) == "▁█▅"
    assert trend([2.0, 2.0]) == "▄▄"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.53, "0.53"),
        (-0.25, "-0.25"),
        (0.0013, "0.0013"),
        (3.1e-6, "3.1e-06"),
        (23.4, "23.4"),
        (1234.5, "1,234"),
        (float("nan"), "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.82, "0.82 s"),
        (42.3, "42 s"),
        (59.7, "1m00s"),
        (151, "2m31s"),
        (3900, "1h05m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
