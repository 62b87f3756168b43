"""Write counts and problems as the findings show them."""

from __future__ import annotations

from typing import Any


def problem(kind: str, count: int, text: str) -> dict[str, Any]:
    """Return a problem or a doubt as JSON has it."""
    return {"kind": kind, "count": count, "text": text}


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun; `many` defaults to one + "s"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def rows_were(count: int) -> str:
    """Return "1 row was" or "2 rows were"."""
    return f"{counted(count, 'row')} {'was' if count == 1 else 'were'}"
