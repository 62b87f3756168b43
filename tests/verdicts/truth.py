"""The truth about a case, by plain asyncpg.

What the messages leave, one after the other, and whether the tables hold that. Imports nothing of the code that is
judged. Of columns that depend on when things ran only null or not null counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from oracle.serial import PlainTx, Rejected

from verdicts.case import MOVING, Case
from verdicts.handlers import Call, Life, NotYet, Place, run

Rows = dict[str, Counter[tuple[str | None, ...]]]

_COLUMNS = """
select c.relname, array_agg(a.attname::text order by a.attnum) from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' group by c.relname order by c.relname
"""
_WRITES = re.compile(r"\b(insert into|update|delete from) (\w+)")


@dataclass
class Replayed:
    """What messages leave.

    writes: "insert into", "update" and "delete from" by table, as the statements said.
    """

    rows: Rows
    writes: dict[str, set[str]] = field(default_factory=dict)


class NotingTx(PlainTx):
    """Notes the statements that it sends."""

    def __init__(self, connection: asyncpg.Connection, sent: set[str]) -> None:
        super().__init__(connection)
        self._sent = sent

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        self._sent.add(args[0])
        return await super()._ask(method, *args, **options)


async def rows_of(connection: asyncpg.Connection) -> Rows:
    """The comparable rows of all tables.

    As far as two runs can have the same.
    """
    rows_by_table: Rows = {}
    for name, columns in await connection.fetch(_COLUMNS):
        taken = [
            f"case when \"{column}\" is not null then 'some' end" if MOVING.fullmatch(column) else f'"{column}"::text'
            for column in columns
        ]
        rows = await connection.fetch(f'select {", ".join(taken)} from only "{name}"')
        rows_by_table[name] = Counter(tuple(row) for row in rows)
    return rows_by_table


async def replayed(
    connection: asyncpg.Connection, case: Case, life: Life, calls: Sequence[tuple[Place, Call]]
) -> Replayed:
    """What these calls leave on empty tables.

    Each runs in a savepoint, in a transaction that is rolled back.
    """
    sent: set[str] = set()
    steps = {handler.name: handler.steps for handler in case.handlers}
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute("drop schema public cascade; create schema public")
        for table in case.tables:
            for statement in (*table.ddl, *table.seeds):
                await connection.execute(statement)
        for place, call in calls:
            try:
                async with connection.transaction():
                    tx = NotingTx(connection, sent)
                    for fields in life.effects(call.payload, call.timestamp):
                        await run(steps[place.handler], tx, {**fields, "boom": ""}, Rejected, NotYet)
                    await tx.end()
            except (Rejected, NotYet, asyncpg.PostgresError):
                continue
        rows = await rows_of(connection)
    finally:
        await transaction.rollback()
    writes: dict[str, set[str]] = {}
    names = {table.name for table in case.tables}
    for sql in sent:
        tables_written = [(what, table) for what, table in _WRITES.findall(sql) if table in names]
        for what, table in tables_written:
            writes.setdefault(table, set()).add(what)
        if "do update set" in sql:
            writes[tables_written[0][1]].add("update")
    for table in case.tables:
        if table.fed_by in writes:
            writes.setdefault(table.name, set()).update(writes[table.fed_by])
    return Replayed(rows, writes)
