"""What a table held before the first message, where that may explain a difference: rows that are older than the handlers.

Knows SQL through a connection that is handed in. A rebuild lets tables that handlers insert into begin empty. PostgreSQL
keeps the transaction that wrote each row (xmin), so a row that is older than all rows of the handlers in the ledger, and than
their entries in `consumer.handlers`, was made by no message. A restored dump writes all rows again: then the ledger has rows
of several transactions under one xmin, or none of the table's rows is of a transaction of the ledger, and nothing is known.
Limitations: a row that a message has updated since has lost that trace.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from consumer.postgres import applied_queries, generations
from consumer.postgres.protocol import Connection
from consumer.rebuild.beginnings import beginning_doubt
from consumer.rebuild.compare import Compared
from consumer.rebuild.compare_sql import Comparison
from consumer.rebuild.table_model import Name

# By the counts since the table was made or loaded: a row from before the first message that was lost would not be missed.
_NEVER_LOST = """
select coalesce(bool_and(n_tup_del = 0 and n_tup_ins = $2), false) from pg_stat_all_tables where relid = $1
"""
# What may change rows without a statement that names their table.
_FUNCTIONS = """
select exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
               where p.provolatile = 'v' and p.prorettype <> 'trigger'::regtype and l.lanname not in ('internal', 'c')
                 and n.nspname not in ('pg_catalog', 'information_schema', 'consumer'))
"""


async def older_than_handlers(
    connection: Connection, names: Collection[Name], handlers: Sequence[int], tables: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A reason for doubt for each of these tables that may not have begun empty. tables: what their comparison found."""
    found: list[dict[str, Any]] = []
    counts = {table["table"]: table for table in tables}
    age, restored = await applied_queries.oldest_age(connection, list(handlers)) if names else (None, False)
    for name in names:
        older, linked = await applied_queries.rows_and_ledger(connection, name.real, list(handlers), age)
        if doubt := beginning_doubt(name, older, counts[str(name)], knows=linked and not restored):
            found.append(doubt)
    return found


async def leave_out_older(connection: Connection, compared: Compared, handlers: Sequence[int]) -> list[str]:
    """Leave out rows from before these handlers first ran, if that makes all tables agree. Returns what to say of them.

    compared: its differing tables are only inserted into, on conflict perhaps. Then no message can have changed such a row
    unless it has lost its age, or differs from the rebuilt one.
    """
    differing = compared.differing()
    age, restored = await applied_queries.oldest_age(connection, list(handlers))
    # Of rows that the ledger has forgotten, nobody knows the age: a foreign row of their time would pass for an older one.
    has_forgotten = await generations.has_forgotten(connection)
    if age is None or restored or has_forgotten or await connection.fetchval(_FUNCTIONS):
        return []
    notes: list[str] = []
    for comparison, told in zip(compared.comparisons, compared.tables, strict=True):
        if told["table"] not in differing:
            continue
        if not await connection.fetchval(_NEVER_LOST, comparison.table.oid, told["rows"]):
            return []
        younger = await connection.fetchrow(_younger(comparison, age).counts())
        if any(younger[2:]):
            return []
        notes.append(
            f"{comparison.table.name}: it has rows from before its handlers first ran, which were left out; the others agree"
        )
    for table in compared.tables:
        if table["table"] in differing:
            table["extra"] = 0
    compared.differences.clear()
    return notes


def _younger(comparison: Comparison, age: int) -> Comparison:
    """Without rows that are older than this. The age of a row stays the same for a whole transaction."""
    return replace(comparison, where=f"age(xmin) <= {age:d}")
