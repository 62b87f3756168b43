"""Show numbers, times, names and other values of findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from consumer.replay.html.elements import Html, el

JsonRow: TypeAlias = Mapping[str, Any]

ABSENT = "\u2013"


def number(value: object) -> object:
    """Return a number with separators, a dash for None, anything else unchanged."""
    match value:
        case None:
            return ABSENT
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case float():
            return f"{value:,.1f}"
        case _:
            return value


def drawn_count(value: object) -> int:
    """Return the number to draw; 0 for anything else."""
    return max(0, value) if isinstance(value, int) else 0


def code(value: object) -> Html:
    """Return a value or a name as code.

    Its direction of writing is isolated from the text around it.
    """
    if value is None:
        return el("em", "null")
    if value == "":
        return el("em", "empty text")
    return el("bdi", el("code", value))


def name_or_dash(value: object) -> Html:
    """Return a name, or a dash where it is not given."""
    return Html(ABSENT) if value is None else code(value)


def when(value: object) -> Html:
    """Return a time in UTC, or anything else unchanged."""
    at = moment(value)
    if at is None:
        return code(value)
    return el("time", at.strftime("%Y-%m-%d %H:%M:%S UTC"), datetime=at.strftime("%Y-%m-%dT%H:%M:%SZ"))


def moment(value: object) -> datetime | None:
    """Parse an ISO 8601 time with a zone; None for anything else."""
    try:
        at = datetime.fromisoformat(str(value))
        return at.astimezone(UTC) if at.tzinfo else None
    except (ValueError, OverflowError):
        return None


def duration(value: object) -> object:
    """Return seconds in units that suit their length."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return number(None) if value is None else value
    if value < 60:
        return f"{value:,.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def several(count: int, one: str, many: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else many}"


def shown_value(value: object) -> Html:
    """Return a filter or a key, as names with values."""
    match value:
        case Mapping():
            parts = [Html(f"{code(key)} = {shown_value(inner)}") for key, inner in value.items()]
        case list() | tuple() | set() | frozenset():
            parts = [shown_value(inner) for inner in value]
        case _:
            return code(value)
    return Html(", ".join(parts)) if parts else el("em", "none")


def partition_name(row: JsonRow) -> Html:
    """Return topic and partition on one line."""
    return Html(f"{name_or_dash(row.get('topic'))} {el('span', number(row.get('partition')), class_='partition')}")
