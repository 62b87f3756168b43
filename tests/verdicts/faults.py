"""Faults that are planted when a case is settled.

In rows, the ledger, dead letters and the log. Each is one change.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import asyncpg

from verdicts.case import MOVING, Fault
from verdicts.servers import Servers
from verdicts.settling import Settled

_KEYLESS = """
select relname from pg_class c where relnamespace = 'public'::regnamespace and relkind = 'r'
and not exists (select from pg_index i where i.indrelid = c.oid and i.indisunique)
"""
_COLUMNS = """
select a.attname, a.attnotnull, a.attidentity <> '' or coalesce(pg_get_expr(d.adbin, d.adrelid) like 'nextval%', false)
from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = $1::regclass and a.attnum > 0 and not a.attisdropped
"""
_FOREIGN = {"k": "77", "i": "'foreign'", "u_rnd": "'foreign'"}
_NUMBERS = ("n", "ts", "total")
_ANY_ROW = "(select ctid from {} where {} order by md5(ctid::text || '{}') limit 1)"


async def plant(
    servers: Servers, done: Settled, connection: asyncpg.Connection, fault: Fault, writes: Mapping[str, set[str]]
) -> str:
    """Plant a fault; return what was changed.

    Empty where nothing could be. writes: what messages did to each table.
    """
    chance = random.Random(fault.chance)
    await connection.execute("set session_replication_role = replica")
    try:
        if fault.kind.startswith("row_"):
            return await _in_rows(connection, fault.kind, chance, writes)
        if fault.kind == "log_head":
            return await _at_the_head(servers, done, chance)
        return await _in_ledger(connection, fault.kind, chance)
    finally:
        await connection.execute("set session_replication_role = origin")


async def _in_rows(
    connection: asyncpg.Connection, kind: str, chance: random.Random, writes: Mapping[str, set[str]]
) -> str:
    keyless = {row[0] for row in await connection.fetch(_KEYLESS)}
    # Rows that no message inserts are taken for those that were there before.
    tables = [
        table
        for table, how in sorted(writes.items())
        if "insert into" in how
        or (kind == "row_altered" and "update" in how)
        or (kind == "row_lost" and how & {"update", "delete from"})
    ]
    if kind == "row_doubled":
        tables = [table for table in tables if table in keyless]
    chance.shuffle(tables)
    for table in tables:
        columns = {row[0]: (row[1], row[2]) for row in await connection.fetch(_COLUMNS, table)}
        sql = _change(kind, table, columns, chance)
        if sql and int((await connection.execute(sql)).split()[-1]):
            return sql
    return ""


def _change(kind: str, table: str, columns: Mapping[str, tuple[bool, bool]], chance: random.Random) -> str:
    row = _ANY_ROW.format(table, "true", chance.random())
    given = [column for column, (_, generated) in columns.items() if not generated]
    match kind:
        case "row_lost":
            return f"delete from {table} where ctid = {row}"
        case "row_doubled":
            return f"insert into {table} ({', '.join(given)}) select {', '.join(given)} from {table} where ctid = {row}"
        case "row_foreign":
            values = [_FOREIGN.get(column, column) for column in given]
            return (
                f"insert into {table} ({', '.join(given)}) select {', '.join(values)} from {table} where ctid = {row}"
            )
        case "row_altered":
            numbers = [column for column in _NUMBERS if column in columns]
            texts = [column for column in ("status", "state") if column in columns]
            if not numbers and not texts:
                return ""
            column = chance.choice([*numbers, *texts])
            value = f"coalesce({column}, 0) + 50" if column in numbers else "'altered'"
            return f"update {table} set {column} = {value} where ctid = {row}"
        case _:
            may = [
                column
                for column, (fixed, _) in columns.items()
                if MOVING.fullmatch(column) and not fixed and column[-3:] == "_at"
            ]
            if not may:
                return ""
            column = chance.choice(may)
            return f"update {table} set {column} = case when {column} is null then now() end where ctid = {row}"


async def _in_ledger(connection: asyncpg.Connection, kind: str, chance: random.Random) -> str:
    def row(table: str, condition: str) -> str:
        return _ANY_ROW.format(table, condition, chance.random())

    applied = row("consumer.ledger", "applied_at is not null")
    every = row("consumer.ledger", '"offset" >= 0')
    letter = row("consumer.dead_letters", "state in ('dead', 'waiting')")
    copied = 'insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id) select fingerprint, {}, applied_at, partition, handler, topic, gen_random_uuid() from consumer.ledger where ctid = {}'
    sql = {
        "ledger_lost": f"delete from consumer.ledger where ctid = {row('consumer.ledger', 'true')}",
        "ledger_foreign": copied.format('"offset"', every),
        "ledger_beyond": copied.format("10000", every),
        "ledger_tampered": f"update consumer.ledger set fingerprint = fingerprint + 1 where ctid = {applied}",
        "ledger_dead": f"update consumer.ledger set applied_at = null where ctid = {applied}",
        "letter_removed": f"delete from consumer.dead_letters where ctid = {letter}",
        "letter_tampered": f"update consumer.dead_letters set value = '{{\"m\": 0}} '::bytea where ctid = {letter}",
    }[kind]
    return sql if int((await connection.execute(sql)).split()[-1]) else ""


async def _at_the_head(servers: Servers, done: Settled, chance: random.Random) -> str:
    places = sorted(place for place, end in done.ends.items() if end)
    if not places:
        return ""
    topic, partition = chance.choice(places)
    offset = chance.randint(1, done.ends[topic, partition])
    await servers.behead(topic, partition, offset)
    return f"records of topic {done.topics.index(topic)}:{partition} below offset {offset} were deleted"
