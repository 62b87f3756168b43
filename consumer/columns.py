"""Deferred writes of one shape, sent as arrays or as sums: one execution for many, where that cannot be told from many.

core/columns.py reads the statement; this looks at the table behind it, once a connection and minute, and prepares what it made.
It also tells which statements meet nothing in common, so that their order cannot be told either.
What it does not know: what somebody changes on the table within that minute. A trigger or rule that is made while
workers run may be passed over for so long (a trigger for each row never is: PostgreSQL calls it in either form).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

from consumer.core.columns import INT_MAX, KEY_TYPES, ROWS_MIN, TYPES, Shape, rounds, shape_of, sums

_LOOKED_SECONDS = 60.0
_TEXTS_MAX = 500  # statements remembered on a connection

# Whether nothing about a table can tell one execution from many: no trigger, rule or policy, no child, and no function of the
# user's own in a default or a constraint, which might look at the table. Then the types of its key columns, and what else a
# write to it may meet: foreign keys whose columns it sets, on either side, and sequences that its defaults take from. And
# whether nobody can tell an addition to these columns from several: no constraint or index looks at what they are in between,
# and nobody is told of every change of a row, which logical decoding would be.
_TABLE = """
select c.oid as relation,
       c.relkind = 'r' and not c.relhassubclass and not c.relhasrules and not c.relrowsecurity
       and not exists (select from pg_trigger t where t.tgrelid = c.oid and not t.tgisinternal)
       and not exists (select from pg_attribute a join pg_type t on t.oid = a.atttypid
                       where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and t.typtype = 'd')
       and not exists (select from pg_depend d where d.refclassid = 'pg_proc'::regclass and d.refobjid >= 16384
                       and (d.classid, d.objid) in (
                           select 'pg_attrdef'::regclass::oid, oid from pg_attrdef where adrelid = c.oid
                           union all
                           select 'pg_constraint'::regclass::oid, oid from pg_constraint where conrelid = c.oid))
       as simple,
       array(select case when a.attcollation = 0 or l.collisdeterministic then t.typname end
             from unnest($2::text[]) with ordinality as k(name, place)
             left join pg_attribute a on a.attrelid = c.oid and a.attname = k.name and a.attnum > 0 and not a.attisdropped
             left join pg_type t on t.oid = a.atttypid and t.typnamespace = 'pg_catalog'::regnamespace
             left join pg_collation l on l.oid = a.attcollation
             order by k.place) as keys,
       array(select f.oid from pg_constraint f
             cross join lateral (values (f.conrelid, f.conkey), (f.confrelid, f.confkey)) as side(relation, columns)
             where f.contype = 'f' and side.relation = c.oid
             and ($3::text[] is null or exists (select from pg_attribute a where a.attrelid = c.oid
                                                and a.attnum = any(side.columns) and a.attname = any($3)))
             union
             select d.refobjid from pg_depend d join pg_attrdef e on d.classid = 'pg_attrdef'::regclass and d.objid = e.oid
             join pg_class s on d.refclassid = 'pg_class'::regclass and d.refobjid = s.oid and s.relkind = 'S'
             where e.adrelid = c.oid and $3::text[] is null) as others,
       coalesce((select bool_and(t.typname in ('int2', 'int4', 'int8') and t.typnamespace = 'pg_catalog'::regnamespace)
                 from unnest($4::text[]) as k(name)
                 left join pg_attribute a on a.attrelid = c.oid and a.attname = k.name and a.attnum > 0 and not a.attisdropped
                 left join pg_type t on t.oid = a.atttypid), false)
       and current_setting('wal_level') <> 'logical'
       and not exists (select from pg_constraint where conrelid = c.oid and contype = 'c')
       and not exists (select from pg_attribute where attrelid = c.oid and attgenerated <> '')
       and not exists (select from pg_index i where i.indrelid = c.oid
                       and (i.indexprs is not null or i.indpred is not null
                            or (i.indisunique or i.indisexclusion)
                            and exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = any($3)
                                        and a.attnum = any(i.indkey)))) as addable
from pg_class c where c.oid = to_regclass($1)
"""


class _Known(NamedTuple):
    """A statement that may be sent as arrays: its shape, its text for them, and what it may meet.

    most: if it may be sent as sums, the largest that each can be.
    """

    shape: Shape
    text: str
    touches: frozenset[Hashable]
    most: Sequence[int] | None


class Columns:
    """What one connection knows about statements that it was given. one_by_one: each runs as it was written, once a row."""

    def __init__(self, connection: Any, *, one_by_one: bool = False) -> None:
        self._connection = connection
        self._one_by_one = one_by_one
        self._known: dict[str, _Known | None] = {}
        self._looked = time.monotonic()

    async def touches(self, statements: Collection[str]) -> dict[str, frozenset[Hashable]] | None:
        """What each of the statements may meet, or None when of one it is not known."""
        found: dict[str, frozenset[Hashable]] = {}
        for sql in statements:
            known = await self._look(sql)
            if known is None:
                return None
            found[sql] = known.touches
        return found

    async def send(self, sql: str, arguments: Sequence[Sequence[Any]]) -> None:
        """Run a statement for each of the arguments, in as few executions as mean the same. Raises what the database says."""
        if len(arguments) == 1:
            await self._connection.execute(sql, *arguments[0])
            return
        if len(arguments) >= ROWS_MIN and (known := await self._look(sql)) is not None:
            if known.most is not None and (found := sums(arguments, known.shape, known.most)) is not None:
                summed, arguments = found
                if summed:
                    await self._run(known, summed)
                if not arguments:
                    return
            parts = rounds(arguments, known.shape)
            # Many uses of few keys make many rounds of few rows, which are no cheaper than the rows.
            if parts is not None and len(parts) * 2 <= len(arguments):
                for rows in parts:
                    await self._run(known, rows)
                return
        await self._connection.executemany(sql, arguments)

    async def _run(self, known: _Known, rows: Sequence[Sequence[Any]]) -> None:
        await self._connection.execute(known.text, *zip(*rows, strict=True))

    async def _look(self, sql: str) -> _Known | None:
        if time.monotonic() - self._looked > _LOOKED_SECONDS or len(self._known) >= _TEXTS_MAX:
            self._known.clear()
            self._looked = time.monotonic()
        if sql not in self._known:
            shape = None if self._one_by_one else shape_of(sql)
            self._known[sql] = await self._made(sql, shape) if shape is not None else None
        return self._known[sql]

    async def _made(self, sql: str, shape: Shape) -> _Known | None:
        """The text for many rows, if table and types are such that it means the same."""
        table = await self._connection.fetchrow(
            _TABLE,
            shape.table,
            [column for column, _ in shape.keys],
            shape.assigned,
            [column for column, _ in shape.added],
        )
        if table is None or not table["simple"]:
            return None
        prepared = await self._connection.prepare(sql, name="")  # raises what sending it would raise
        types = [each.name for each in prepared.get_parameters() if each.schema == "pg_catalog"]
        if len(types) != shape.parameters or not TYPES.issuperset(types):
            return None
        for (_, place), column in zip(shape.keys, table["keys"], strict=True):
            if column is None or KEY_TYPES.get(column) is None or KEY_TYPES[column] is not KEY_TYPES.get(types[place]):
                return None
        text = shape.text(types)
        await self._connection.execute("savepoint consumer_columns")
        try:
            await self._connection.prepare(text, name="")
        except Exception:
            if self._connection.is_closed():
                raise
            await self._connection.execute("rollback to savepoint consumer_columns")
            text = ""
        await self._connection.execute("release savepoint consumer_columns")
        if not text:
            return None
        most = [INT_MAX.get(types[place], 0) for _, place in shape.added]
        addable = table["addable"] and not table["others"] and all(most)
        return _Known(shape, text, frozenset([table["relation"], *table["others"]]), most if addable else None)
