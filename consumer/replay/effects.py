"""Ask PostgreSQL what a transaction has written.

Reads statistics views and sequences through the caller's connection. Rows of schema `consumer` belong to the framework,
and are not counted. Limitations:

- A row that a savepoint's rollback has undone was written, and counts.
- TRUNCATE and other DDL show as rows of the system catalogs (TRUNCATE as updates of pg_catalog.pg_class).
- Locks (SELECT … FOR UPDATE, advisory) and NOTIFY are no rows; `wrote_anything` detects row locks.
- What a deferred trigger will write is not counted yet: check the constraints first (SET CONSTRAINTS ALL IMMEDIATE).
- Other connections, other databases, foreign tables, and anything outside PostgreSQL are not seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consumer.core.errors import Misconfigured

_ROWS = """
select format('%I.%I', case when schemaname like 'pg\\_temp\\_%' then 'pg_temp' else schemaname end, relname),
       n_tup_ins, n_tup_upd, n_tup_del
from pg_stat_xact_all_tables
where schemaname <> 'consumer' and schemaname not like 'pg\\_toast%' and n_tup_ins + n_tup_upd + n_tup_del > 0
"""
# currval raises where this session has called neither nextval nor setval, and where the role has no right to the
# sequence. The error is caught on the server, whose log would be full of it otherwise.
_SEQUENCES = """
do $$
declare
    candidate record;
    moved text[] := '{}';
begin
    for candidate in
        select c.oid, format('%I.%I', n.nspname, c.relname) as name
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind = 'S' and n.nspname <> 'consumer'
    loop
        begin
            perform currval(candidate.oid);
            moved := moved || candidate.name;
        exception when others then
            null;
        end;
    end loop;
    perform set_config('consumer.sequences_moved', array_to_json(moved)::text, true);
end $$
"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table that were inserted, updated and deleted."""

    inserted: int
    updated: int
    deleted: int

    @property
    def total(self) -> int:
        return self.inserted + self.updated + self.deleted

    def __sub__(self, other: Rows) -> Rows:
        return Rows(self.inserted - other.inserted, self.updated - other.updated, self.deleted - other.deleted)

    def __str__(self) -> str:
        counts = (("inserted", self.inserted), ("updated", self.updated), ("deleted", self.deleted))
        return ", ".join(f"{count} {verb}" for verb, count in counts if count) or "nothing"


async def rows_written(connection: Any, since: Mapping[str, Rows] | None = None) -> dict[str, Rows]:
    """Return the rows that the current transaction has written, by table.

    Only tables with any; names are quoted if needed. System catalogs are among them (DDL shows there), TOAST tables are
    not (their owner counts), temporary tables are `pg_temp.name`, and of a partitioned table the partitions count.

    since: what this function returned early in the same transaction; that is subtracted. A caller that began the
    transaction after others on this connection must give it: PostgreSQL flushes its counts about once a second, and
    until then those of earlier transactions, even of rolled-back ones, are still among these (measured with 18).
    Raises what the connection raises.
    """
    tables = {row[0]: Rows(row[1], row[2], row[3]) for row in await connection.fetch(_ROWS)}
    if since:
        nothing = Rows(0, 0, 0)
        tables = {table: rows - since.get(table, nothing) for table, rows in tables.items()}
    return {table: rows for table, rows in sorted(tables.items()) if rows.total}


async def wrote_anything(connection: Any) -> bool:
    """Return whether PostgreSQL gave the current transaction an id.

    It did where the transaction wrote or locked a row. False does not prove that there was no effect: nextval and
    advisory locks may need no id.
    """
    return bool(await connection.fetchval("select pg_current_xact_id_if_assigned() is not null"))


async def sequences_moved(connection: Any) -> list[str]:
    """Return the sequences that this session has moved, sorted.

    They move by nextval, setval or an identity column. Names are quoted where needed. Call it outside a transaction: it
    runs one of its own and rolls it back. Sequences that the role may not read are left out. Behind a pooler the
    session may not be the one that called. Raises what the connection raises.
    """
    await connection.execute("begin")
    try:
        await connection.execute(_SEQUENCES)
        moved: list[str] = json.loads(
            await connection.fetchval("select current_setting('consumer.sequences_moved')") or "[]"
        )
    finally:
        await connection.execute("rollback")
    return sorted(moved)


async def check_countable(connection: Any, where: str) -> None:
    """Raise Misconfigured where PostgreSQL does not count rows.

    where: the server and database, for the text.
    """
    if await connection.fetchval("select current_setting('track_counts')") != "on":
        raise Misconfigured(f"{where}: it does not count written rows; turn track_counts on")
