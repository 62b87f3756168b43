"""Rows that handlers update and that are not there: with such a row goes everything that messages have done to it.

A table that no handler inserts into begins a rebuild with its real rows. If one was deleted, its copy lacks it as well,
and the two agree. So what updates look for is noted, and looked up at the end. PostgreSQL's statistics may show that the
table has never lost a row; then there never was one.

Knows SQL through a connection that is handed in; knows no Kafka.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from consumer.core.identifiers import ident
from consumer.postgres.errors import sqlstate_of
from consumer.rebuild.beginnings import Sought, sought_by
from consumer.rebuild.table_model import Name, Table, TableUsage

_KEYS_MAX = 20_000  # that are kept before they are looked up
_IDS_MAX = 3  # messages told of a table

# Counts since the table was made or loaded, if they add up to the rows that are there.
_NEVER_LOST = """
select coalesce(bool_and(n_tup_del = 0 and n_tup_upd > 0 and n_tup_ins = $2), false) from pg_stat_all_tables where relid = $1
"""

Statement = tuple[str, Sequence[Any]]
# The statements of a handler's call that is running: they count when it has ended without an error.
statements: ContextVar[list[Statement] | None] = ContextVar("consumer_rebuild_statements", default=None)


@dataclass(slots=True)
class _Keys:
    """What updates of one table looked for, by the same columns, with the handlers and a few messages."""

    columns: tuple[str, ...]
    keys: set[tuple[Any, ...]] = field(default_factory=set)
    absent: set[tuple[Any, ...]] = field(default_factory=set)
    by: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)  # key -> handler, message


class AbsentRows:
    """Notes what updates look for, of tables that no handler inserts into. known: as the copies of this pass have it."""

    def __init__(self, connection: Any, known: Mapping[Name, TableUsage]) -> None:
        self._connection = connection
        self._known = known
        self._texts: dict[str, tuple[_Keys, tuple[int, ...]] | None] = {}  # and where the keys are among the arguments
        self._found: dict[tuple[Name, tuple[str, ...]], _Keys] = {}
        self.updating: dict[str, set[str]] = {}  # table -> texts that update it

    def note(self, done: Iterable[Statement], handler: str, message: bytes | None) -> None:
        """Note the statements of a call."""
        for sql, arguments in done:
            if (place := self._place(sql)) is None:
                continue
            found, places = place
            try:
                key = (arguments[places[0]],) if len(places) == 1 else tuple([arguments[n] for n in places])
                if key in found.by or None in key:
                    continue
            except (TypeError, IndexError):  # not a key, or not enough arguments: PostgreSQL will say so
                continue
            found.keys.add(key)
            found.by[key] = handler, "" if message is None else str(UUID(bytes=message))

    def _place(self, sql: str) -> tuple[_Keys, tuple[int, ...]] | None:
        if sql not in self._texts:
            self._texts[sql] = None
            if (read := self._read(sql)) is not None:
                name, sought = read
                columns = tuple(column for column, _ in sought.columns)
                found = self._found.setdefault((name, columns), _Keys(columns))
                self._texts[sql] = found, tuple(n for _, n in sought.columns)
        return self._texts[sql]

    def _read(self, sql: str) -> tuple[Name, Sought] | None:
        sought = sought_by(sql)
        for name, use in self._known.items():
            if sought is not None and name.table == sought.table and not use.inserted:
                # A row may have had another value of what handlers change.
                kept = tuple(each for each in sought.columns if each[0] not in use.updated)
                return (name, sought._replace(columns=kept)) if kept else None
        return None

    async def shrink(self, tables: Sequence[Table]) -> None:
        """Look up what was noted, if that is much, and forget what is there."""
        if sum(len(each.keys) for each in self._found.values()) > _KEYS_MAX:
            await self._look_up(tables)

    async def _look_up(self, tables: Sequence[Table]) -> None:
        by_name = {each.name: each for each in tables}
        for (name, columns), found in self._found.items():
            keys = list(found.keys)
            found.keys.clear()
            gone = await self._absent(by_name[name], columns, keys) if keys else ()
            found.absent |= {keys[n] for n in gone}
            for key in keys:
                if key not in found.absent:
                    del found.by[key]

    async def _absent(self, table: Table, columns: Sequence[str], keys: Sequence[tuple[Any, ...]]) -> Collection[int]:
        types = {each.name: each for each in table.columns}
        if not all(each in types and types[each].built_in for each in columns):
            return range(len(keys))
        arrays = ", ".join(f"${n}::pg_catalog.{ident(types[each].type_name)}[]" for n, each in enumerate(columns, 1))
        names = ", ".join(f"k{n}" for n in range(len(columns)))
        same = " and ".join(f"t.{ident(each)} = k.k{n}" for n, each in enumerate(columns))
        asked = (
            f"select k.place - 1 from unnest({arrays}) with ordinality as k({names}, place) "  # noqa: S608 - by ident
            f"where not exists (select from {table.name.copy} t where {same})"
        )
        await self._connection.execute("savepoint rebuild_absent")
        try:
            rows = await self._connection.fetch(asked, *map(list, zip(*keys, strict=True)))
        except Exception as error:
            if sqlstate_of(error) is None and self._connection.is_closed():
                raise
            rows = None  # keys of several types, or of none that the column has
        await self._connection.execute("rollback to savepoint rebuild_absent; release savepoint rebuild_absent")
        return range(len(keys)) if rows is None else [row[0] for row in rows]

    async def reasons(self, tables: Sequence[Table], rows: Sequence[int]) -> list[dict[str, Any]]:
        """Why the tables may have lost rows, for those that no handler inserts into. rows: how many each has."""
        await self._look_up(tables)
        found: list[dict[str, Any]] = []
        for table, count in zip(tables, rows, strict=True):
            use = self._known[table.name]
            if use.inserted or not use.updated:
                continue
            texts = self._reasons(table.name)
            if texts and not await self._connection.fetchval(_NEVER_LOST, table.oid, count):
                found += texts
        return found

    def _reasons(self, name: Name) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for (table, columns), each in self._found.items():
            if table == name and each.absent:
                by = [each.by[key] for key in each.absent]
                handlers = ", ".join(sorted({handler for handler, _ in by}))
                messages = ", ".join(sorted({message for _, message in by if message})[:_IDS_MAX])
                text = (
                    f"{name}: {len(each.absent)} rows that handler {handlers} updates by {', '.join(columns)} are not there, so what "
                    f"messages did to them was not compared{f' (messages {messages})' if messages else ''}: deleted since, or never "
                    "there; --base FILE gives the first rows"
                )
                found.append({"kind": "rows_gone", "count": len(each.absent), "text": text})
        texts = self.updating.get(name.table, set())
        unread = [sql for sql in texts if self._place(sql) is None]
        if unread or not texts:
            updated = ", ".join(sorted(self._known[name].updated))
            text = (
                f"{name}: handlers update {updated} of rows that cannot be told from their statements, and rows may have been deleted "
                "since: what messages did to those was not compared; --base FILE gives the first rows"
            )
            found.append({"kind": "rows_gone", "count": max(1, len(unread)), "text": text})
        return found
