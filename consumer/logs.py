"""Structured logs: one event a line, as text on a terminal and as JSON otherwise.

An event is a short text and fields. Fields are names, counts, places and durations; payloads, keys, message ids and
the texts of exceptions are not among them (they are in the dead letters, where access is controlled).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

from consumer.places import place

log = logging.getLogger("consumer")


def event(level: int, text: str, /, **fields: Any) -> None:
    """Log an event with fields. The text is constant: what varies goes into the fields."""
    if log.isEnabledFor(level):
        log.log(level, text, extra={"fields": fields})


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send logs to `stream` (stderr by default). level: debug … error. style: auto, text or json."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    handler.setFormatter(_Text() if as_text else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level.upper())
    # The client tells of every rebalance and every refused connection; what matters of that is an event of ours.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL if level != "debug" else logging.INFO)


def unhandled(_: object, context: dict[str, Any]) -> None:
    """An event loop's exception handler: what nobody awaited, told without the text that may quote a payload."""
    event(logging.WARNING, "an error that nobody awaited", error=describe(context.get("exception")))


def guard() -> None:
    """What Python itself would print of an exception that nobody caught (of a thread, of a finalizer) is told without its text."""

    def of_thread(found: threading.ExceptHookArgs) -> None:
        event(logging.WARNING, "an error that ended a thread", error=describe(found.exc_value))

    def of_finalizer(found: sys.UnraisableHookArgs) -> None:
        event(logging.WARNING, "an error that could not be raised", error=describe(found.exc_value))

    threading.excepthook = of_thread
    sys.unraisablehook = of_finalizer


def _clean(value: Any) -> Any:
    """One line, printable, short: a name from outside must not forge a line or drive a terminal."""
    if isinstance(value, str):
        return "".join(each if each.isprintable() else "?" for each in value[:500])
    return value


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _clean(record.getMessage()),
            "pid": record.process,
        }
        line |= {name: _clean(value) for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = _where(record)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {name}={_clean(value)}" for name, value in getattr(record, "fields", {}).items())
        error = f" error={_where(record)}" if record.exc_info and record.exc_info[0] is not None else ""
        return f"{time} {record.levelname.lower():7} [{record.process}] {_clean(record.getMessage())}{fields}{error}"


def _where(record: logging.LogRecord) -> str:
    """Type and place of an exception, without its text."""
    assert record.exc_info
    return describe(record.exc_info[1])


def describe(error: BaseException | None) -> str:
    """Type of an exception and its place in the user's code, else its innermost place; never its text."""
    if error is None:
        return "unknown"
    at = place(error)
    return f"{type(error).__name__} at {at}" if at else type(error).__name__
