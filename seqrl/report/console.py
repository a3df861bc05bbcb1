"""Progress of a run on the console: a live table on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from seqrl.report.wording import duration, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# key: name in the table, text in a plain line; a run shows those it logs, in this order
SHOWN = {
    "train/loss": ("loss", "loss {}"),
    "critic/rewards/mean": ("reward", "reward {}"),
    "val/accuracy": ("held-out accuracy", "acc {}"),
    "actor/pg_clipfrac": ("clip fraction, token", "clip {} tok"),
    "actor/seq_clipfrac": ("clip fraction, sequence", "{} seq"),
    "actor/grad_norm": ("gradient norm", "|grad| {}"),
    "actor/entropy": ("entropy", "entropy {}"),
    "response_length/mean": ("response length, tokens", "{} tok"),
}
JOINED = "actor/seq_clipfrac"  # a plain line says `clip 0.18 tok 0.21 seq`
RECENT = 10  # values behind the column of recent means
TREND = 30  # values behind a trend line
BLOCKS = "▁▂▃▄▅▆▇█"


class Console:
    """Shows each step it is told of; `close` leaves the last picture and gives the terminal back."""

    def __init__(
        self, total_steps: int, first_step: int, title: str, *, stream: TextIO | None = None
    ) -> None:
        """`first_step` is the step about to be taken: 1 in a fresh run, later in a resumed one."""
        self.total_steps = total_steps
        self.first_step = first_step
        self.title = title
        self.stream = stream or sys.stdout
        self.step = first_step - 1
        self.values: dict[str, deque[float]] = {key: deque(maxlen=TREND) for key in SHOWN}
        self.seconds: deque[float] = deque(maxlen=TREND)
        self.started = self.last = time.monotonic()
        self.live: Live | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self.live = self._start_live()
        else:
            print(f"{title}: {total_steps} steps", file=self.stream, flush=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.step = step
        for key, values in self.values.items():
            if math.isfinite(metrics.get(key, math.nan)):
                values.append(metrics[key])
        now = time.monotonic()
        if step >= self.first_step:  # before the first step there may be a validation
            self.seconds.append(metrics.get("timing_s/step", now - self.last))
        self.last = now
        if self.live is None:
            print(self._plain_line(metrics), file=self.stream, flush=True)

    def print(self, line: str) -> None:
        """A message between the steps, above the table."""
        if self.live is None:
            print(line, file=self.stream, flush=True)
        else:
            self.live.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()

    def _remaining(self) -> float | None:
        """Seconds to go, from the median so that a step with a validation or a save does not sway it."""
        return statistics.median(self.seconds) * (self.total_steps - self.step) if self.seconds else None

    def _plain_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self.step}/{self.total_steps}"]
        for key, (_, text) in SHOWN.items():
            if key not in metrics:
                continue
            part = text.format(number(metrics[key]))
            if key == JOINED and "actor/pg_clipfrac" in metrics:
                parts[-1] += f" {part}"
            else:
                parts.append(part)
        remaining = self._remaining()
        if remaining is not None and self.step >= self.first_step:
            parts += [duration(self.seconds[-1]), f"{duration(remaining)} left"]
        return " · ".join(parts)

    def _start_live(self) -> Live:
        from rich.console import Console as RichConsole
        from rich.live import Live

        console = RichConsole(file=self.stream)
        live = Live(get_renderable=self._picture, console=console, refresh_per_second=2)
        live.start()
        return live

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding

        return Padding(Group(self._bar(), self._table()), (1, 0, 0, 0))

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        facts = [f"{self.step}/{self.total_steps}"]
        if self.seconds:
            rate = 1 / max(statistics.median(self.seconds), 1e-9)
            facts.append(f"{number(rate)} steps/s")
        facts.append(f"{duration(time.monotonic() - self.started)} elapsed")
        remaining = self._remaining()
        if remaining is not None:
            facts.append(f"{duration(remaining)} left")
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(
            Text(self.title, style="bold"),
            ProgressBar(
                total=max(self.total_steps, 1), completed=max(self.step, 0), width=28, complete_style="blue"
            ),
            Text(" · ".join(facts)),
        )
        return row

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
        table.add_column("")
        for heading in ("now", f"last {RECENT}"):
            table.add_column(heading, justify="right")
        table.add_column("trend")
        rows = [(SHOWN[key][0], values) for key, values in self.values.items() if values]
        if self.seconds:
            rows.append(("step, seconds", self.seconds))
        for name, values in rows:
            recent = statistics.fmean(list(values)[-RECENT:])
            table.add_row(name, number(values[-1]), number(recent), Text(trend(list(values)), style="blue"))
        return table


def trend(values: list[float]) -> str:
    """A line of block characters, the lowest value lowest."""
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)
