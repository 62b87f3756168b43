"""What workers in this process have logged."""

from __future__ import annotations

from typing import Any

import pytest
from harness import until


def fields_of(record: object) -> dict[str, Any]:
    """The fields of a log event; none where a record has none."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    """Whether an event or its fields contain a text."""
    return any(text in f"{record.getMessage()} {fields_of(record)}" for record in caplog.records)


class WorkerLog:
    """The log events of a test's workers, as dicts of fields.

    `text` has the event's text.
    """

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def events(self, text: str) -> list[dict[str, Any]]:
        """The events whose text contains this one."""
        return [
            {"text": record.message, **fields_of(record)} for record in self._caplog.records if text in record.message
        ]

    async def wait(self, text: str, count: int = 1, seconds: float = 30) -> list[dict[str, Any]]:
        """Wait until there are so many such events, and return them."""

        async def enough() -> bool:
            return len(self.events(text)) >= count

        await until(f"{count} times: {text}", enough, seconds)
        return self.events(text)
