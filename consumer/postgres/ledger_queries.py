"""Questions about rows of the ledger, for commands, checks and rebuilds.

Reads only; claims.py writes the ledger.

A query on consumer.ledger reads all of its generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from consumer.core.message import Partition
from consumer.postgres.protocol import Connection

_SETTLED_BELOW = """
select t.name, l.partition, max(l."offset") + 1 from consumer.ledger l join consumer.topics t using (topic)
where l.handler = $1 group by 1, 2
"""
_OTHER_HANDLERS = """
select h.name from consumer.handlers h
where h.app = $1 and not h.name = any($2::text[]) and exists (
    select from consumer.ledger l join consumer.topics t using (topic)
    where l.handler = h.handler and t.name = any($3::text[]) and l.applied_at is not null)
order by h.name
"""
_ROWS_BY_HANDLER = """
select h.name, count(l.id) from consumer.handlers h
left join consumer.ledger l on l.handler = h.handler and l.applied_at is not null
where h.app = $1 group by h.name
"""
_SHOW = """
select l.id, h.app, h.name as handler, t.name as topic, l.partition, l."offset", l.applied_at,
       d.dead_letter, d.reason, d.died_at, d.state as letter
from consumer.ledger l
join consumer.handlers h using (handler) join consumer.topics t using (topic)
left join consumer.dead_letters d on d.handler = l.handler and d.id = l.id and d.fingerprint = l.fingerprint
where l.id = any($1::uuid[]) order by h.app, h.name, l.id
"""


async def show(connection: Connection, ids: Sequence[bytes]) -> list[Any]:
    """Return the rows of message ids in any application, with their dead letters."""
    return await connection.fetch(_SHOW, [UUID(bytes=id) for id in ids])


async def settled_below(connection: Connection, handler: int) -> dict[Partition, int]:
    """Return up to which offset a handler has rows, by partition.

    Reads all of its rows.
    """
    rows = await connection.fetch(_SETTLED_BELOW, handler)
    return {Partition(row[0], row[1]): row[2] for row in rows}


async def other_handlers(connection: Connection, app: str, names: Sequence[str], topics: Sequence[str]) -> list[str]:
    """Return an application's handlers beside these names that have applied messages of the topics."""
    return [row[0] for row in await connection.fetch(_OTHER_HANDLERS, app, names, topics)]


async def rows_by_handler(connection: Connection, app: str) -> dict[str, int]:
    """Count an application's applied rows, by handler. Reads all of them."""
    return dict(await connection.fetch(_ROWS_BY_HANDLER, app))
