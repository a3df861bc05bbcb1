import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from seqrl.errors import UserError
from seqrl.report.files import append_rows
from seqrl.report.page import (
    BeforeAfter,
    SampleRow,
    append_samples,
    report_from_run,
    save_answers,
    write_report,
)

VOID = {"meta", "rect", "line", "polyline", "polygon", "circle", "br"}
CONFIG = """
actor_rollout_ref:
  actor: {clip_ratio_low: 3.0e-4, clip_ratio_high: 4.0e-4, policy_loss: {loss_mode: gspo}}
trainer: {experiment_name: first <light>}
"""


class Page(HTMLParser):
    """Checks that tags close in order; keeps the tags, the attributes and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def history(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "critic/rewards/mean": 0.4 + 0.01 * step,
            "val/accuracy": 0.4 + 0.01 * step,
            "actor/pg_clipfrac": 0.15,
            "actor/seq_clipfrac": None if step == 3 else 0.16,
            "actor/seq_ratio_p10": 0.9997,
            "actor/seq_ratio_p50": 1.0,
            "actor/seq_ratio_p90": 1.0003,
            "timing_s/gen": 0.3,
            "timing_s/step": 0.9,
        }
        for step in range(steps)
    ]


def test_report_round_trip_from_the_files_of_a_run(tmp_path: Path) -> None:
    append_rows(tmp_path / "metrics.jsonl", history(20))
    attack = "1 < 2\n<script>alert('http://evil')</script>"
    append_samples(tmp_path, [SampleRow(5, "2+2?", attack, "4", 1.0, 0.87, 1.00021)])
    append_samples(tmp_path, [SampleRow(6, "3+3?", "7", "6", float("nan"))])
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "summary.json").write_text(
        json.dumps({"accuracy_cold_start": 0.41, "accuracy_final": 0.93, "seconds_gspo": 151.0, "seed": 7})
    )
    answers = [BeforeAfter("1+1?", "2", "3", "it is 2")]
    save_answers(tmp_path, answers)
    path = report_from_run(tmp_path)
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    assert path == tmp_path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)

    assert attack in page.text  # shown as it is, whitespace kept
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # ours alone
    for expected in ("first <light>", "41%", "93%", "2m31s", "+0.87", "1.00021", "it is 2", "clip range"):
        assert expected in page.text
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    clip = ["Clip fraction by token", "Clip fraction by sequence"]
    assert titles == ["Reward", "Held-out accuracy", *clip, "Sequence ratio − 1", "Time of a step"]


def test_nothing_outside_the_file_is_asked_for(tmp_path: Path) -> None:
    append_rows(tmp_path / "metrics.jsonl", history(5))
    source = report_from_run(tmp_path).read_text(encoding="utf-8")
    for forbidden in ("http://", "https://", "@import", "url(http", "//cdn"):
        assert forbidden not in source
    for tag, attributes in Page(source).tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & attributes.keys()
    assert "default-src 'none'" in source


def test_charts_carry_their_numbers_for_the_script(tmp_path: Path) -> None:
    append_rows(tmp_path / "metrics.jsonl", history(5))
    page = Page(report_from_run(tmp_path).read_text(encoding="utf-8"))
    charts = [json.loads(a["data-chart"] or "") for t, a in page.tags if t == "figure"]
    assert charts[0]["series"][0]["values"] == [[0.4, 0.41, 0.42, 0.43, 0.44]]
    (both,) = [one for one in charts[3]["series"] if one["name"] == "both"]
    assert both["values"] == [[0.16, 0.16, 0.16, None, 0.16]]
    keys = [attributes for tag, attributes in page.tags if tag == "b"]
    assert len(keys) == 1 + sum(len(chart["series"]) for chart in charts)  # a place for each value


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_histories(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "report.html"
    write_report(
        path, title="t", history=history(steps), samples=[], summary=None, config_yaml="", before_after=None
    )
    source = path.read_text(encoding="utf-8")
    Page(source)
    assert ("No step has been logged" in source) == (steps == 0)
    assert not re.search(r"\bnan\b", source)


def test_an_empty_run_directory_gives_a_report(tmp_path: Path) -> None:
    Page(report_from_run(tmp_path).read_text(encoding="utf-8"))


def test_few_samples_of_few_steps_are_shown(tmp_path: Path) -> None:
    rows = [SampleRow(step, "p", f"answer {step}.", "t", 0.0) for step in range(1, 101) for _ in range(9)]
    append_samples(tmp_path, rows)
    text = Page(report_from_run(tmp_path).read_text(encoding="utf-8")).text
    shown = re.findall(r"answer (\d+)\.", text)
    assert shown.count("1") == shown.count("100") == 6
    assert len(set(shown)) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "[1", "summary.json: not a JSON object"),
        ("samples.jsonl", '{"step": 1}\n', r"samples.jsonl, line 1: not a sample"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        report_from_run(tmp_path)
