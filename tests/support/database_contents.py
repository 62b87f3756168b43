"""The contents of a database, to compare before and after."""

from __future__ import annotations

from typing import Any

from harness import query


async def all_rows(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Read the rows of every table and the values of every sequence."""
    names = await query(
        dsn,
        """select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
           where relkind in ('r', 'S') and nspname not in ('pg_catalog', 'information_schema', 'pg_toast') order by 1""",
    )
    return {name: await query(dsn, f"select x::text from (select * from {name}) x order by 1") for (name,) in names}
