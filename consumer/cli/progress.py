"""Show progress on standard error: a bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from consumer.admin.progress_lines import as_line
from consumer.cli.output import err, printable

# Between two lines of progress, without a terminal for a bar: from the first to the longest pause.
_LINE_SECONDS_MIN, _LINE_SECONDS_MAX = 1.0, 5.0


class Bar:
    """Progress with rate and time left."""

    def __init__(self, bars: Progress | None, unit: str) -> None:
        self._bars = bars
        self._unit = unit
        self._pause = _LINE_SECONDS_MIN
        self._tasks: dict[str, Any] = {}
        self._begun_at = self._printed_at = time.monotonic()
        self._first: dict[str, tuple[float, int]] = {}

    def line(self, text: str) -> None:
        """Print a line above the bar; only on a terminal."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)

    def announce(self, text: str) -> None:
        """Print a line on standard error, with a terminal or without."""
        if self._bars is not None:
            self.line(text)
        else:
            err.print(f"consumer: {printable(text)}", markup=False, highlight=False)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how much of a phase is done."""
        now = time.monotonic()
        at, before = self._first.setdefault(phase, (now, done))
        rate = (done - before) / (now - at) if now - at > 0.5 else 0.0
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, rate="")
            self._bars.update(self._tasks[phase], completed=done, total=total, rate=f"{rate:,.0f}/s" if rate else "")
        elif now - self._printed_at > self._pause:
            self._printed_at = now
            self._pause = min(2 * self._pause, _LINE_SECONDS_MAX)
            err.print(f"consumer: {as_line(phase, done, total, self._unit, rate)}", markup=False, highlight=False)


@contextmanager
def progress(unit: str) -> Iterator[Bar]:
    """Show progress of the block on standard error, counted in `unit`."""
    if not err.is_terminal:
        yield Bar(None, unit)
        return
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        yield Bar(bars, unit)
