"""What other transactions than a worker's changed in a database's tables.

A row version has a place (ctid) and the transaction that made it (xmin), so every stored change shows in them, whatever
connection, driver or process made it and whatever values it wrote. While the worker's transaction is open, another
session sees all stored changes but its own; what it is about to store is read in it just before its COMMIT.

Knows tables and transactions; knows no handler. Limitations: rows that were inserted and deleted again between two looks,
sequences, schema `consumer`, temporary tables, system catalogs, tables that the role may not read, and other databases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, TypeAlias

_XIDS_MAX = 100_000  # between two looks; above it, the tables are looked at

# Others cannot read, or change, what a transaction has locked for itself (TRUNCATE); so it is as it was.
_TABLES = r"""
select c.oid, format('%I.%I', n.nspname, c.relname),
       exists (select from pg_locks l where l.locktype = 'relation' and l.relation = c.oid and l.granted
               and l.mode = 'AccessExclusiveLock' and l.pid is distinct from pg_backend_pid()
               and l.database = (select oid from pg_database where datname = current_database()))
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where (c.relkind = 'r' or (c.relkind = 'm' and c.relispopulated)) and c.relpersistence <> 't'
  and n.nspname not in ('consumer', 'information_schema') and n.nspname !~ '^pg_'
  and has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
"""
# Tables that a transaction has locked as a writer does, if it has an id: without one it has written nothing.
_OPEN = r"""
select l.virtualtransaction, format('%I.%I', n.nspname, c.relname)
from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
where l.locktype = 'relation' and l.granted and l.database = (select oid from pg_database where datname = current_database())
  and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
  and c.relkind in ('r', 'p', 'm') and c.relpersistence <> 't'
  and n.nspname not in ('consumer', 'information_schema') and n.nspname !~ '^pg_'
  and (l.pid is null or l.pid <> all($1::int[]))
  and not exists (select from pg_stat_activity a where a.pid = l.pid and a.backend_type <> 'client backend')
  and exists (select from pg_locks x where x.locktype = 'transactionid' and x.granted and x.mode = 'ExclusiveLock'
              and x.virtualtransaction = l.virtualtransaction)
order by 1, 2
"""

Tables: TypeAlias = dict[str, tuple[int, int, str]]  # name -> oid, rows, and a sum over their versions

_UNKNOWN = (0, 0, "")  # locked at the start by somebody


class Snapshot(NamedTuple):
    """Which transactions of the server had ended."""

    first: int  # the oldest that was running
    end: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """What pg_current_snapshot() answers: xmin:xmax:list."""
        first, end, running = text.split(":")
        return cls(int(first), int(end), frozenset(int(number) for number in running.split(",") if number))

    def sees(self, xid: int) -> bool:
        return xid < self.end and xid not in self.running

    def is_after(self, before: Snapshot, own: Collection[int]) -> bool:
        """Whether any transaction but `own` has ended since."""
        if self.end - before.first > _XIDS_MAX:
            return True
        return any(self.sees(xid) and not before.sees(xid) and xid not in own for xid in range(before.first, self.end))


class OutsideRows:
    """Follows the tables of a database from `start` on.

    connection: one of its own, in no transaction.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._possible: list[Tables] = [
            {}
        ]  # what the tables are without changes by others; two after a COMMIT in doubt
        self._snapshot = Snapshot(0, 0, frozenset())
        self._own: set[int] = set()  # transactions of ours that were committed since the snapshot
        self._committing: tuple[int | None, Tables] | None = None
        self._open: set[tuple[str, str]] = set()

    async def start(self, own: Collection[int]) -> None:
        """Note the present state. own: server processes of this test."""
        self._open = set(await self._open_now(own))
        self._snapshot = await self._now()
        tables, locked = await _tables(self._connection)
        self._possible = [tables | dict.fromkeys(locked, _UNKNOWN)]

    async def changed(self) -> list[str]:
        """Return the tables that others have changed since the last look.

        Looks at none if no transaction has ended.
        """
        now = await self._now()
        changed: list[str] = []
        if now.is_after(self._snapshot, self._own):
            there, locked = await _tables(self._connection)
            before = min(self._possible, key=lambda state: len(_differing(state, there, locked)))
            changed = _differing(before, there, locked)
            self._possible = [there | {name: before[name] for name in locked if name in before}]
        self._snapshot, self._own = now, set()
        return changed

    async def left_open(self, own: Collection[int]) -> list[str]:
        """Return the tables that open transactions of others seem to have changed.

        Only transactions that began since the start.
        """
        now = await self._open_now(own)
        new = sorted({table for transaction, table in now if (transaction, table) not in self._open})
        self._open |= set(now)
        return new

    async def committing(self, transaction: Any, written: Iterable[str]) -> None:
        """Note what a transaction of ours is about to store.

        Call it right before the COMMIT, and `changed` next. written: the tables that the transaction wrote to.
        """
        names = set(written)
        everything = any(name.startswith("pg_catalog.") for name in names)  # TRUNCATE and other DDL
        after, _ = await _tables(transaction, None if everything else names)
        if not everything:
            after = {**self._possible[0], **after}
        xid = await transaction.fetchval("select pg_current_xact_id_if_assigned()::text")
        self._committing = (None if xid is None else int(xid), after)

    def in_doubt(self) -> None:
        """Note that the COMMIT was sent: both states are possible."""
        if self._committing is not None:
            self._possible.append(self._committing[1])

    def committed(self) -> None:
        """Note that the COMMIT has succeeded."""
        if self._committing is not None:
            xid, after = self._committing
            self._possible = [after]
            self._own |= set() if xid is None else {xid}
            self._committing = None

    async def _now(self) -> Snapshot:
        return Snapshot.parse(await self._connection.fetchval("select pg_current_snapshot()::text"))

    async def _open_now(self, own: Collection[int]) -> list[tuple[str, str]]:
        return [(row[0], row[1]) for row in await self._connection.fetch(_OPEN, list(own))]


async def _tables(connection: Any, only: Collection[str] | None = None) -> tuple[Tables, list[str]]:
    """Return tables with a sum over their row versions, and locked ones."""
    rows = [row for row in await connection.fetch(_TABLES) if only is None or row[1] in only]
    there = [(row[0], row[1]) for row in rows if not row[2]]
    locked = [row[1] for row in rows if row[2]]
    if not there:
        return {}, locked
    # PostgreSQL's format() has quoted the names.
    asked = " union all ".join(
        f"select {n}, count(*), coalesce(sum(hashtextextended(ctid::text || ' ' || xmin::text, 0)), 0)::text from only {name}"  # noqa: S608
        for n, (_, name) in enumerate(there)
    )
    return {there[row[0]][1]: (there[row[0]][0], row[1], row[2]) for row in await connection.fetch(asked)}, locked


def _differing(before: Tables, after: Tables, locked: Collection[str]) -> list[str]:
    return sorted(
        name
        for name in {*before, *after}.difference(locked)
        if before.get(name) != after.get(name) and before.get(name) != _UNKNOWN
    )
