"""What a transaction has written, by PostgreSQL's own counting: the proof that a handler's effects are new, or are not.

Knows statistics views and sequences; knows no handler, no message and no driver (connections come in). Rows of schema
`consumer` are ours, and are not counted. What it does not know:

- Whether a row is still there: one that a savepoint's rollback took back was written, and counts.
- TRUNCATE and other DDL as such: they show as rows of the system catalogs (TRUNCATE as updates of pg_catalog.pg_class).
- A lock that was only taken (SELECT … FOR UPDATE), an advisory lock, a NOTIFY: `wrote_anything` tells of the first.
- What a deferred trigger will write: have the constraints checked first (SET CONSTRAINTS ALL IMMEDIATE).
- Other connections, other databases, foreign tables, and whatever is not PostgreSQL.
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
# currval raises where this session has called neither nextval nor setval, and where the role may not look. It is caught
# on the server, whose log would be full of it otherwise.
_SEQUENCES = """
do $$
declare
    each record;
    moved text[] := '{}';
begin
    for each in
        select c.oid, format('%I.%I', n.nspname, c.relname) as name
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind = 'S' and n.nspname <> 'consumer'
    loop
        begin
            perform currval(each.oid);
            moved := moved || each.name;
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
    """Table -> rows that the current transaction has written to it; only tables with any. Names are quoted if needed.

    System catalogs are among them (DDL shows there), TOAST tables are not (their owner counts), temporary tables are
    `pg_temp.name`, and of a partitioned table it is the partitions that count.

    since: what this function returned early in the same transaction; that is taken off. A caller that began the
    transaction after others on this connection must give it: PostgreSQL hands its counts on about once a second, and
    until then those of earlier transactions, even of rolled-back ones, are still among these (measured with 18).
    Raises whatever the connection raises.
    """
    found = {row[0]: Rows(row[1], row[2], row[3]) for row in await connection.fetch(_ROWS)}
    if since:
        nothing = Rows(0, 0, 0)
        found = {table: rows - since.get(table, nothing) for table, rows in found.items()}
    return {table: rows for table, rows in sorted(found.items()) if rows.total}


async def wrote_anything(connection: Any) -> bool:
    """Whether PostgreSQL gave the current transaction an id: it wrote or locked something, whatever it was.

    A caller may not assume that False means no effect at all: nextval may go without an id, and so do advisory locks.
    """
    return bool(await connection.fetchval("select pg_current_xact_id_if_assigned() is not null"))


async def sequences_moved(connection: Any) -> list[str]:
    """The sequences that this session has moved, by nextval, setval or an identity column; sorted, quoted where needed.

    Call it outside a transaction (it runs one of its own, which it undoes). Sequences that this role may not look at
    are left out, and behind a pooler the session may not be the one that called. Raises whatever the connection raises.
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
    """Raise Misconfigured where PostgreSQL does not count rows. where: the server and database, for the text."""
    if await connection.fetchval("select current_setting('track_counts')") != "on":
        raise Misconfigured(f"{where} does not count written rows: turn track_counts on")
