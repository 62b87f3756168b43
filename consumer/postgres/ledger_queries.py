"""Questions about rows of the ledger, for commands, checks and rebuilds.

Reads only; claims.py writes the ledger. A query on consumer.ledger reads all of its generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
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
_CLAIMING_RECORD = """
select t.name, l.partition, l."offset" from consumer.ledger l join consumer.topics t using (topic)
where l.handler = $1 and l.id = $2 and l."offset" >= 0
"""
_BLOCK_COUNTS = """
select l.handler, l.topic, l.partition, l."offset" >> $6, count(*)
from consumer.ledger l join unnest($2::int2[], $3::int4[], $4::int8[], $5::int8[]) as s(topic, partition, first, past)
  on l.topic = s.topic and l.partition = s.partition and l."offset" >= s.first and l."offset" < s.past
where l.handler = any($1) group by 1, 2, 3, 4
"""
# Rows whose place the log does not have: a missing partition, or an offset that was never written.
_NOWHERE = """
select l.handler, l.topic, l.partition, l.id, l."offset"
from consumer.ledger l left join unnest($2::int2[], $3::int4[], $4::int8[]) as e(topic, partition, past)
  on l.topic = e.topic and l.partition = e.partition
where l.handler = any($1) and l.topic = any($5) and (e.past is null or l."offset" >= e.past)
limit 1000
"""
_ABSENT = """
select id from unnest($2::uuid[]) as o(id)
where not exists (select from consumer.ledger l where l.handler = $1 and l.id = o.id)
"""
_BLOCK = """
select id, "offset" from consumer.ledger
where handler = $1 and topic = $2 and partition = $3 and "offset" >= $4 and "offset" < $5 order by "offset", id
"""


async def show(connection: Connection, ids: Sequence[bytes]) -> list[Any]:
    """Return the rows of message ids, of all applications, with dead letters."""
    return await connection.fetch(_SHOW, [UUID(bytes=id) for id in ids])


async def settled_below(connection: Connection, handler: int) -> dict[Partition, int]:
    """Return up to which offset a handler has rows, by partition.

    Reads all of its rows.
    """
    rows = await connection.fetch(_SETTLED_BELOW, handler)
    return {Partition(row[0], row[1]): row[2] for row in rows}


async def other_handlers(connection: Connection, app: str, names: Sequence[str], topics: Sequence[str]) -> list[str]:
    """Return an application's other handlers that applied messages of topics."""
    return [row[0] for row in await connection.fetch(_OTHER_HANDLERS, app, names, topics)]


async def rows_by_handler(connection: Connection, app: str) -> dict[str, int]:
    """Count an application's applied rows, by handler. Reads all of them."""
    return dict(await connection.fetch(_ROWS_BY_HANDLER, app))


async def claiming_record(connection: Connection, handler: int, id: UUID) -> tuple[Partition, int] | None:
    """Return where the record is that claimed an id."""
    row = await connection.fetchrow(_CLAIMING_RECORD, handler, id)
    return None if row is None else (Partition(row[0], row[1]), row[2])


class NumberedRanges(NamedTuple):
    """Ranges of offsets, as columns, with numbers of topics."""

    topics: Sequence[int]
    partitions: Sequence[int]
    firsts: Sequence[int]
    ends: Sequence[int]


async def block_counts(
    connection: Connection, handlers: Sequence[int], ranges: NumberedRanges, block_bits: int
) -> list[tuple[int, int, int, int, int]]:
    """Count rows by handler, topic, partition and block of offsets."""
    return [tuple(row) for row in await connection.fetch(_BLOCK_COUNTS, handlers, *ranges, block_bits)]


async def rows_nowhere(
    connection: Connection,
    handlers: Sequence[int],
    topics: Sequence[int],
    partitions: Sequence[int],
    ends: Sequence[int],
) -> list[Any]:
    """Return rows beyond the ends of their partitions.

    As handler, topic, partition, id and offset.
    """
    return await connection.fetch(_NOWHERE, handlers, topics, partitions, ends, sorted(set(topics)))


async def rows_between(
    connection: Connection, handler: int, topic: int, partition: int, first: int, end: int
) -> list[tuple[UUID, int]]:
    """Return ids and offsets of a handler's rows in a range."""
    return [(row[0], row[1]) for row in await connection.fetch(_BLOCK, handler, topic, partition, first, end)]


async def absent_ids(connection: Connection, handler: int, ids: Sequence[bytes]) -> set[bytes]:
    """Return the ids that have no row."""
    return {row[0].bytes for row in await connection.fetch(_ABSENT, handler, [UUID(bytes=id) for id in ids])}
