"""The line that long commands write about their progress, and reading it.

Pure. The console runs commands and shows how far they are.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"(?:consumer: )?([\w -]+): ([0-9,]+) of ([0-9,]+) ")


class Progress(NamedTuple):
    """How much of a phase is done."""

    phase: str
    done: int
    total: int


def as_line(phase: str, done: int, total: int, unit: str, rate: float) -> str:
    """Return a line of progress.

    rate: a second; 0 for not known yet.
    """
    left = f", {(total - done) / rate:,.0f} s left" if rate else ""
    return f"{phase}: {done:,} of {total:,} {unit} ({done / max(total, 1):.0%}), {rate:,.0f}/s{left}"


def of_line(line: str) -> Progress | None:
    """Return what a line says; None for any other line."""
    match = _LINE.match(line)
    if match is None:
        return None
    return Progress(match[1], int(match[2].replace(",", "")), int(match[3].replace(",", "")))
