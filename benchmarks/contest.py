"""Contestants measured in turns, and tables of their results."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import sysconfig
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

Row = dict[str, str]


def machine() -> str:
    """Cores and interpreter.

    A Python that was built without optimizations takes 8 to 15 % more CPU time.
    """
    is_optimized = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    build = "optimized" if is_optimized else "built without --enable-optimizations"
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()} ({build})"


@dataclass
class Options:
    messages: int
    rounds: int
    only: str | None = None
    ledger_rows: int = 5_000_000
    seconds: float = 15.0


@dataclass
class ScenarioResult:
    """The result of a scenario.

    A sentence about it, its rows, and bars for the plot.
    """

    about: str
    rows: list[Row]
    bars: dict[str, float] = field(default_factory=dict)


Contestant = Callable[[], Awaitable[float]]


async def turns(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Let contestants take turns, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, contestant in contestants.items():
            seconds[name].append(await contestant())
            print(f"round {number}  {name:42} {seconds[name][-1]:12,.0f} msg/s", file=sys.stderr, flush=True)
    return seconds


def rows_of(seconds: dict[str, list[float]], base: str) -> list[Row]:
    middle = statistics.median(seconds[base])
    return [
        {
            "contestant": name,
            "msg/s": f"{statistics.median(speeds):,.0f}",
            "lowest": f"{min(speeds):,.0f}",
            "highest": f"{max(speeds):,.0f}",
            f"times {base}": f"{statistics.median(speeds) / middle:.2f}"
            if statistics.median(speeds) < 10 * middle
            else f"{statistics.median(speeds) / middle:.1f}",
        }
        for name, speeds in seconds.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in rows]
    return "\n".join(lines)
