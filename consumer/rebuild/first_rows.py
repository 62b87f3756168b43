"""Finds rows from before the first message, which may explain differences.

A rebuild lets tables that handlers insert into begin empty. PostgreSQL keeps the transaction that wrote each row (xmin), so
no message made a row that is older than all rows of the handlers in the ledger and than their entries in
`consumer.handlers`. A restored dump writes all rows again. Then the ledger has rows of several transactions under one xmin,
or none of the table's rows belongs to a transaction of the ledger, and the ages say nothing.

Uses the connection of the rebuild. Limitation: the age of a row that a message has updated since is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from consumer.postgres import applied_queries, generations
from consumer.postgres.protocol import Connection
from consumer.rebuild.compare import ComparisonResult
from consumer.rebuild.compare_sql import TableComparison
from consumer.rebuild.first_rows_rules import beginning_doubt
from consumer.rebuild.table_model import Name

# By the counts since the table was created or loaded. Otherwise an early row may be gone, and this would not show.
_NEVER_LOST = """
select coalesce(bool_and(n_tup_del = 0 and n_tup_ins = $2), false) from pg_stat_all_tables where relid = $1
"""
# These may change rows without a statement that names the table.
_FUNCTIONS = """
select exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
               where p.provolatile = 'v' and p.prorettype <> 'trigger'::regtype and l.lanname not in ('internal', 'c')
                 and n.nspname not in ('pg_catalog', 'information_schema', 'consumer'))
"""


async def older_than_handlers(
    connection: Connection, names: Collection[Name], handlers: Sequence[int], tables: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a doubt for each table that may not have begun empty.

    tables: as the comparison counted.
    """
    doubts: list[dict[str, Any]] = []
    counts = {table["table"]: table for table in tables}
    age, restored = await applied_queries.oldest_age(connection, list(handlers)) if names else (None, False)
    for name in names:
        older, linked = await applied_queries.rows_and_ledger(connection, name.real, list(handlers), age)
        if doubt := beginning_doubt(name, older, counts[str(name)], knows=linked and not restored):
            doubts.append(doubt)
    return doubts


async def leave_out_older(connection: Connection, compared: ComparisonResult, handlers: Sequence[int]) -> list[str]:
    """Leave out rows older than these handlers, if then all tables agree.

    Returns notes for the answer. compared: handlers only insert into its differing tables, on conflict perhaps. So a message
    that changed such a row has also changed its age, or left it different from the rebuilt row.
    """
    differing = compared.differing()
    age, restored = await applied_queries.oldest_age(connection, list(handlers))
    # The age of forgotten ledger rows is unknown: a foreign row of that time would pass for an older one.
    has_forgotten = await generations.has_forgotten(connection)
    if age is None or restored or has_forgotten or await connection.fetchval(_FUNCTIONS):
        return []
    notes: list[str] = []
    for comparison, table in zip(compared.comparisons, compared.tables, strict=True):
        if table["table"] not in differing:
            continue
        if not await connection.fetchval(_NEVER_LOST, comparison.table.oid, table["rows"]):
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


def _younger(comparison: TableComparison, age: int) -> TableComparison:
    """Return the comparison without older rows.

    invariant: the age of a row stays the same during a transaction.
    """
    return replace(comparison, where=f"age(xmin) <= {age:d}")
