"""Reads the record of operators' actions, and records long ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from consumer.admin.ledger_access import with_ledger
from consumer.core.audit import ActedBy, Entry
from consumer.core.errors import ConsumerError
from consumer.postgres import audit
from consumer.postgres.protocol import Connection
from consumer.settings import Settings


async def entries(
    connection: Connection, app: str, action: str | None, since: float | None, limit: int
) -> list[dict[str, Any]]:
    """Return the newest entries, as `--json` prints them.

    since: Unix seconds. None: all.
    """
    rows = await audit.entries(connection, app, action, since, limit)
    return [{**dict(row), "at": row["at"].isoformat(), "numbers": json.loads(row["numbers"])} for row in rows]


@asynccontextmanager
async def recording(
    settings: Settings, action: str, by: ActedBy, app: str, topic: str
) -> AsyncIterator[dict[str, int | float | None]]:
    """Record that an action begins, and how it ends.

    For an action of many transactions: if its process is killed, the beginning stays on record. Yields the numbers to
    record at the end. Raises Misconfigured, ServiceUnavailable; then nothing has begun.
    """
    entry = Entry(action, by, "begun", app, topic)
    await with_ledger(settings, lambda connection: audit.record(connection, entry))
    numbers: dict[str, int | float | None] = {}
    result = "stopped"
    try:
        yield numbers
        result = "done"
    finally:
        with suppress(ConsumerError):  # PostgreSQL is away, which the action itself reports
            ended = entry._replace(result=result, numbers=numbers)
            await with_ledger(settings, lambda connection: audit.record(connection, ended))
