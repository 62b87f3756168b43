"""What a table held before the first message, where that may explain a difference: rows that are older than the handlers.

Knows SQL through a connection that is handed in. A rebuild lets tables that handlers insert into begin empty. PostgreSQL
keeps the transaction that wrote each row (xmin), so a row that is older than the handlers' entries in `consumer.handlers` was made
by no message. Limitations: a row that a message has updated since has lost that trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consumer.rebuild.scratch import Name


async def older_than_handlers(connection: Any, names: Sequence[Name], handlers: Sequence[int]) -> list[dict[str, Any]]:
    """A reason for doubt for each table with rows that were written before these handlers first ran."""
    found: list[dict[str, Any]] = []
    for name in names:
        count = await connection.fetchval(
            f"select count(*) from {name.real} where age(xmin) > "  # noqa: S608 - `real` is quoted
            "(select max(age(xmin)) from consumer.handlers where handler = any($1))",
            list(handlers),
        )
        if count:
            text = (
                f"{name}: {count} rows were there before its handlers first ran, and they insert into it, so it did not "
                "begin empty: give the first rows of all tables with --base FILE"
            )
            found.append({"kind": "began_with_rows", "count": count, "text": text})
    return found
