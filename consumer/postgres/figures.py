"""Queries for metrics: counts and sizes that only the database knows.

Each reads an index or the catalog, and none the rows of the ledger.
"""

from __future__ import annotations

from typing import NamedTuple

from asyncpg.pgproto.pgproto import UUID

from consumer.postgres.protocol import Connection

_DEAD_LETTERS = """
select h.name, d.state, count(*), extract(epoch from clock_timestamp() - min(d.died_at))::float8
from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.state in ('dead', 'waiting') group by 1, 2
"""
_HELD = (
    "select h.name, count(*) from consumer.held join consumer.handlers h using (handler) where h.app = $1 group by 1"
)
_LEDGER = """
select number, pg_total_relation_size(c.oid) from consumer.generations
join pg_class c on c.oid = to_regclass('consumer.ledger' || case number when 1 then '' else '_' || number end)
"""
_DUPLICATE_AGES = """
select o.handler, extract(epoch from clock_timestamp() - l.applied_at)::float8
from unnest($1::int2[], $2::uuid[]) as o(handler, id) join consumer.ledger l using (handler, id)
where l.applied_at is not null
"""


class OpenDeadLetters(NamedTuple):
    """Open dead letters of one handler and state."""

    handler: str
    state: str
    messages: int
    oldest_seconds: float


async def open_dead_letters(connection: Connection, app: str) -> list[OpenDeadLetters]:
    """Count the open dead letters of an App, with their ages."""
    return [OpenDeadLetters(*row) for row in await connection.fetch(_DEAD_LETTERS, app)]


async def held_units(connection: Connection, app: str) -> dict[str, int]:
    """Count the units of order that dead letters hold, by handler."""
    return dict(await connection.fetch(_HELD, app))


async def ledger_bytes(connection: Connection) -> dict[int, int]:
    """Return the size of each generation of the ledger."""
    return dict(await connection.fetch(_LEDGER))


async def duplicate_ages(connection: Connection, handlers: list[int], ids: list[bytes]) -> list[tuple[int, float]]:
    """Return how long ago messages were applied: handler and seconds.

    Of those that have a row.
    """
    rows = await connection.fetch(_DUPLICATE_AGES, handlers, [UUID(id) for id in ids])
    return [(row[0], row[1]) for row in rows]
