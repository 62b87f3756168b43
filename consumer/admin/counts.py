"""Counts of an App: what became of the messages of each handler.

Knows queries. Reads counters and dead letters; only `miscounts` reads rows of the ledger.
"""

from __future__ import annotations

from typing import Any

from consumer.app import App
from consumer.core.outcome import Cause
from consumer.postgres import dead_letter_queries, ledger_queries, positions
from consumer.postgres.protocol import Connection


async def handler_counts(connection: Connection, app: App) -> dict[str, dict[str, Any]]:
    """Count applied, duplicate (by cause), dead-lettered and skipped messages by handler."""
    counts: dict[str, dict[str, Any]] = {
        name: {"applied": 0, "duplicates": {cause.value: 0 for cause in Cause}, "dead_lettered": 0, "skipped": 0}
        for name in app.handlers
    }
    empty: dict[str, Any] = {"applied": 0, "duplicates": {}, "dead_lettered": 0, "skipped": 0}
    for name, outcome, count in await positions.counts(connection, app.name):
        # A handler that is no longer in the code still has a history.
        row = counts.setdefault(name, {**empty, "duplicates": {}})
        kind, _, cause = outcome.partition(":")
        if kind == "duplicate":
            row["duplicates"][cause] = count
        elif kind in ("applied", "kept"):  # in generations of the ledger that were dropped, and in those that exist
            row["applied"] += count
        else:
            row[kind] = count  # dead_lettered, skipped
    return counts


async def miscounts(connection: Connection, app: App) -> dict[str, dict[str, int]]:
    """Return handlers whose counter differs from the ledger's rows.

    Counts every row of the App, which is slow on a large ledger.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await ledger_queries.rows_by_handler(connection, app.name)
        counters = {
            name: count for name, outcome, count in await positions.counts(connection, app.name) if outcome == "kept"
        }
    return {
        name: {"rows": rows.get(name, 0), "counter": counters.get(name, 0)}
        for name in sorted({*rows, *counters})
        if rows.get(name, 0) != counters.get(name, 0)
    }


async def open_dead_letters(connection: Connection, app: App) -> dict[str, dict[str, int]]:
    """Count dead letters that wait for a decision, by handler and state.

    The states are `dead` (an operator must decide) and `waiting` (behind a dead one).
    """
    counts: dict[str, dict[str, int]] = {}
    for name, state, count in await dead_letter_queries.open_counts(connection, app.name):
        counts.setdefault(name, {})[state] = count
    return counts
