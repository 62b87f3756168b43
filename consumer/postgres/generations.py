"""The generations of the ledger, and how long applications need them.

Tables: generations, ledger_state, forgotten, retention. migrations/0001_schema.sql explains generations; claim_sql.py
reads them for claims.
"""

from __future__ import annotations

from collections.abc import Sequence

from consumer.core.retention import Generation, LedgerState
from consumer.postgres.protocol import Connection

_LOOK = """
select extract(epoch from clock_timestamp())::float8, s.version, s.target, s.turning, extract(epoch from s.horizon)::float8,
       array(select number from consumer.generations order by number),
       array(select extract(epoch from opened_at)::float8 from consumer.generations order by number),
       array(select extract(epoch from closed_at)::float8 from consumer.generations order by number),
       array(select forgotten_at is not null from consumer.generations order by number)
from consumer.ledger_state s
"""
_DECLARE = """
insert into consumer.retention as r (app, hours) values ($1, $2)
on conflict (app) do update set hours = excluded.hours, said_at = now() where r.hours is distinct from excluded.hours
"""
_DECLARED = """
select app, hours from (select distinct app from consumer.handlers) h left join consumer.retention r using (app)
where app is distinct from $1
"""
_ROWS = """
select number, greatest(c.reltuples, 0)::int8 from consumer.generations
join pg_class c on c.oid = to_regclass('consumer.ledger' || case number when 1 then '' else '_' || number end)
"""
_FORGOTTEN = """
select f.handler, t.name, f.partition, f.below from consumer.forgotten f join consumer.topics t using (topic)
where f.handler = any($1)
"""


async def read_state(connection: Connection) -> LedgerState:
    """Read the state of the ledger."""
    now, version, target, turning, horizon, *columns = await connection.fetchrow(_LOOK)
    return LedgerState(
        now, version, target, turning, horizon, tuple(Generation(*row) for row in zip(*columns, strict=True))
    )


async def turn(connection: Connection, version: int) -> str:
    """Take one step of a turn from this version.

    Returns what was done, or "busy" or "waiting".
    """
    return str(await connection.fetchval("select consumer.turn($1)", version))


async def forget(connection: Connection, version: int, number: int) -> str:
    """Stop looking into the oldest generation.

    Returns what was done, or "busy" or "waiting".
    """
    return str(await connection.fetchval("select consumer.forget($1, $2)", version, number))


async def drop(connection: Connection, number: int) -> str:
    """Drop a forgotten generation. Returns "dropped", "busy" or "waiting"."""
    return str(await connection.fetchval("select consumer.drop_generation($1)", number))


async def lock_version(connection: Connection) -> int:
    """Lock the ledger against turns in this transaction; return its version."""
    version: int = await connection.fetchval("select version from consumer.ledger_state for update")
    return version


async def horizon_text(connection: Connection) -> str:
    """Return the horizon as text, to compare with an earlier one."""
    return str(await connection.fetchval("select horizon from consumer.ledger_state"))


async def horizon_ms(connection: Connection) -> int | None:
    """Return up to which time rows may be gone; None: none are.

    In milliseconds since 1970.
    """
    until: int | None = await connection.fetchval(
        "select ceil(extract(epoch from horizon) * 1000)::int8 from consumer.ledger_state"
    )
    return until


async def has_forgotten(connection: Connection) -> bool:
    """Return whether any row is gone."""
    return bool(await connection.fetchval("select horizon is not null from consumer.ledger_state"))


async def forgotten_below(connection: Connection, handlers: Sequence[int]) -> dict[tuple[int, str, int], int]:
    """Return up to which offset rows may be gone.

    By handler, topic and partition.
    """
    return {tuple(row)[:3]: row[3] for row in await connection.fetch(_FORGOTTEN, handlers)}


async def declare(connection: Connection, app: str, hours: float | None) -> None:
    """Record how long an application needs its rows; None: for ever."""
    await connection.execute(_DECLARE, app, hours)


async def declared(connection: Connection, but: str | None = None) -> dict[str, float | None]:
    """Return what the applications of the database declared.

    None: for ever, or nothing was declared.
    """
    return dict(await connection.fetch(_DECLARED, but))


async def estimated_rows(connection: Connection) -> dict[int, int]:
    """Return how many rows each generation has, by PostgreSQL's estimate."""
    return dict(await connection.fetch(_ROWS))
