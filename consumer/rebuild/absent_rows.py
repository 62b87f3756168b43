"""Notes the rows that handlers update, to find those that are gone.

A table that no handler inserts into begins a rebuild with its real rows. If one was deleted, the copy lacks it as well, and
both agree although the effects of its messages are lost. So what updates look for is noted, and looked up at the end.
PostgreSQL's statistics may show that the table never lost a row: then the row never existed.

Uses the connection of the rebuild; knows no Kafka.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from consumer.core.identifiers import ident
from consumer.postgres.errors import sqlstate_of
from consumer.rebuild.table_model import Name, Table, TableUsage
from consumer.rebuild.update_targets import UpdateTarget, update_target

_KEYS_MAX = 20_000  # keys in memory, before they are looked up
_IDS_MAX = 3  # messages in the answer, of one table

# By the counts since the table was created or loaded, if they add up to its rows.
_NEVER_LOST = """
select coalesce(bool_and(n_tup_del = 0 and n_tup_upd > 0 and n_tup_ins = $2), false) from pg_stat_all_tables where relid = $1
"""

Statement = tuple[str, Sequence[Any]]
# The statements of the running call of a handler: they count when it ends without an error.
sent_statements: ContextVar[list[Statement] | None] = ContextVar("consumer_rebuild_statements", default=None)


@dataclass(slots=True)
class _KeyLookups:
    """Keys that updates of one table looked for, by the same columns.

    keys: not looked up yet. absent: of no row. by: key -> handler and message that looked for it.
    """

    columns: tuple[str, ...]
    keys: set[tuple[Any, ...]] = field(default_factory=set)
    absent: set[tuple[Any, ...]] = field(default_factory=set)
    by: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)


class AbsentRows:
    """Notes what updates look for, in tables that no handler inserts into.

    connection: with the application's codecs, which encode what handlers look for. own: the same without them. usage: as the copies of this pass have it. updating: by name of a table, the SQL that updates it.
    """

    def __init__(self, connection: Any, own: Any, usage: Mapping[Name, TableUsage]) -> None:
        self._connection = connection
        self._own = own
        self._usage = usage
        self._texts: dict[str, tuple[_KeyLookups, tuple[int, ...]] | None] = {}  # with the indexes of the arguments
        self._lookups: dict[tuple[Name, tuple[str, ...]], _KeyLookups] = {}
        self.updating: dict[str, set[str]] = {}

    def note(self, statements: Iterable[Statement], handler: str, message: bytes | None) -> None:
        """Note the statements of a call. message: the id, 16 bytes."""
        for sql, arguments in statements:
            if (target := self._lookups_of(sql)) is None:
                continue
            lookups, places = target
            try:
                key = (arguments[places[0]],) if len(places) == 1 else tuple([arguments[n] for n in places])
                if key in lookups.by or None in key:
                    continue
            except (TypeError, IndexError):  # not a key, or too few arguments: PostgreSQL refuses them
                continue
            lookups.keys.add(key)
            lookups.by[key] = handler, "" if message is None else str(UUID(bytes=message))

    def _lookups_of(self, sql: str) -> tuple[_KeyLookups, tuple[int, ...]] | None:
        if sql not in self._texts:
            self._texts[sql] = None
            if (read := self._read(sql)) is not None:
                name, target = read
                columns = tuple(column for column, _ in target.columns)
                lookups = self._lookups.setdefault((name, columns), _KeyLookups(columns))
                self._texts[sql] = lookups, tuple(n for _, n in target.columns)
        return self._texts[sql]

    def _read(self, sql: str) -> tuple[Name, UpdateTarget] | None:
        target = update_target(sql)
        for name, use in self._usage.items():
            if target is not None and name.table == target.table and not use.inserted:
                # A column that handlers change may have had another value then.
                kept = tuple(pair for pair in target.columns if pair[0] not in use.updated)
                return (name, target._replace(columns=kept)) if kept else None
        return None

    async def shrink(self, tables: Sequence[Table]) -> None:
        """Look up the keys if there are many; forget existing rows."""
        if sum(len(lookups.keys) for lookups in self._lookups.values()) > _KEYS_MAX:
            await self._look_up(tables)

    async def _look_up(self, tables: Sequence[Table]) -> None:
        by_name = {table.name: table for table in tables}
        for (name, columns), lookups in self._lookups.items():
            keys = list(lookups.keys)
            lookups.keys.clear()
            gone = await self._absent(by_name[name], columns, keys) if keys else ()
            lookups.absent |= {keys[n] for n in gone}
            for key in keys:
                if key not in lookups.absent:
                    del lookups.by[key]

    async def _absent(self, table: Table, columns: Sequence[str], keys: Sequence[tuple[Any, ...]]) -> Collection[int]:
        by_name = {column.name: column for column in table.columns}
        if not all(column in by_name and by_name[column].built_in for column in columns):
            return range(len(keys))
        arrays = ", ".join(
            f"${n}::pg_catalog.{ident(by_name[column].type_name)}[]" for n, column in enumerate(columns, 1)
        )
        names = ", ".join(f"k{n}" for n in range(len(columns)))
        same = " and ".join(f"t.{ident(column)} = k.k{n}" for n, column in enumerate(columns))
        absent_sql = (
            f"select k.place - 1 from unnest({arrays}) with ordinality as k({names}, place) "  # noqa: S608 - by ident
            f"where not exists (select from {table.name.copy} t where {same})"
        )
        await self._connection.execute("savepoint rebuild_absent")
        try:
            rows = await self._connection.fetch(absent_sql, *map(list, zip(*keys, strict=True)))
        except Exception as error:
            if sqlstate_of(error) is None and self._connection.is_closed():
                raise
            rows = None  # keys of another type than the column
        await self._connection.execute("rollback to savepoint rebuild_absent; release savepoint rebuild_absent")
        return range(len(keys)) if rows is None else [row[0] for row in rows]

    async def reasons(self, tables: Sequence[Table], rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return why tables that no handler inserts into may lack rows.

        rows: how many each table has.
        """
        await self._look_up(tables)
        reasons: list[dict[str, Any]] = []
        for table, count in zip(tables, rows, strict=True):
            use = self._usage[table.name]
            if use.inserted or not use.updated:
                continue
            texts = self._reasons(table.name)
            if texts and not await self._own.fetchval(_NEVER_LOST, table.oid, count):
                reasons += texts
        return reasons

    def _reasons(self, name: Name) -> list[dict[str, Any]]:
        reasons: list[dict[str, Any]] = []
        for (table, columns), lookups in self._lookups.items():
            if table == name and lookups.absent:
                by = [lookups.by[key] for key in lookups.absent]
                handlers = ", ".join(sorted({handler for handler, _ in by}))
                messages = ", ".join(sorted({message for _, message in by if message})[:_IDS_MAX])
                text = (
                    f"{name}: {len(lookups.absent)} rows that handler {handlers} updates by {', '.join(columns)} are not there, so what "
                    f"messages did to them was not compared{f' (messages {messages})' if messages else ''}: deleted since, or never "
                    "there; --base FILE gives the first rows"
                )
                reasons.append({"kind": "rows_gone", "count": len(lookups.absent), "text": text})
        texts = self.updating.get(name.table, set())
        unread = [sql for sql in texts if self._lookups_of(sql) is None]
        if unread or not texts:
            updated = ", ".join(sorted(self._usage[name].updated))
            text = (
                f"{name}: handlers update {updated} of rows that cannot be derived from their statements, and rows may have been deleted "
                "since: what messages did to those was not compared; --base FILE gives the first rows"
            )
            reasons.append({"kind": "rows_gone", "count": max(1, len(unread)), "text": text})
        return reasons
