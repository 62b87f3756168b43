"""Show progress on standard error: a bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from consumer.cli.output import err, printable

_LINE_SECONDS = 5.0  # between two lines of progress, without a terminal for a bar


class Bar:
    """Progress with rate and time left."""

    def __init__(self, bars: Progress | None, unit: str) -> None:
        self._bars = bars
        self._unit = unit
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
        elif now - self._printed_at > _LINE_SECONDS:
            self._printed_at = now
            left = f", {(total - done) / rate:,.0f} s left" if rate else ""
            err.print(
                f"consumer: {phase}: {done:,} of {total:,} {self._unit} ({done / max(total, 1):.0%}), {rate:,.0f}/s{left}",
                markup=False,
                highlight=False,
            )


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
