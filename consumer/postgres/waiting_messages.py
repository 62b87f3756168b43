"""Waiting messages, as rows that any process can read.

A row belongs to the worker that wrote it, which renews it while the messages wait. Without renewal it expires, so a
killed worker leaves no false row; the next owner of a partition deletes the rows of earlier ones. The row of a message
that ended a worker for good (the dead-letter limit) does not expire; a worker that opens its partition again deletes
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from consumer.core.evidence import FailureCause
from consumer.core.message import Partition
from consumer.postgres.dead_letters import storable
from consumer.postgres.protocol import Connection

RENEW_SECONDS = 10.0
_EXPIRED_SECONDS = 60.0
_TAKEN_OVER_SECONDS = 2 * RENEW_SECONDS  # another worker's row this old is not of the present owner
_ERROR_CHARACTERS_MAX = 500

_WRITE = """
insert into consumer.waiting as w (handler, topic, partition, error, count, since, systemic, read_up_to, worker)
select o.handler, o.topic, o.partition, o.error, o.count, to_timestamp(o.since), o.systemic, o.read_up_to, $1
from unnest($2::int2[], $3::text[], $4::int4[], $5::text[], $6::int8[], $7::float8[], $8::bool[], $9::int8[])
     as o(handler, topic, partition, error, count, since, systemic, read_up_to)
on conflict (handler, topic, partition, error) do update
set count = excluded.count, since = least(w.since, excluded.since), systemic = excluded.systemic,
    read_up_to = excluded.read_up_to, worker = excluded.worker, seen_at = now()
"""
_DELETE = """
delete from consumer.waiting w where w.worker = $1 and w.handler = any($2::int2[]) and not exists (
    select from unnest($3::int2[], $4::text[], $5::int4[], $6::text[]) as o(handler, topic, partition, error)
    where (o.handler, o.topic, o.partition, o.error) = (w.handler, w.topic, w.partition, w.error))
"""
_TAKE_OVER = """
delete from consumer.waiting w using unnest($2::text[], $3::int4[]) as o(topic, partition)
where w.handler = any($4::int2[]) and (w.topic, w.partition) = (o.topic, o.partition) and w.worker <> $1
  and (w.seen_at < now() - make_interval(secs => $5) or w.seen_at = 'infinity')
"""
_HALT = """
insert into consumer.waiting as w (handler, topic, partition, error, count, since, systemic, read_up_to, worker, seen_at)
values ($2, $3, $4, $5, $6, now(), true, $7, $1, 'infinity')
on conflict (handler, topic, partition, error) do update set count = excluded.count, seen_at = 'infinity', worker = excluded.worker
"""
_READ = """
select h.name, w.topic, w.partition, w.count, w.error, w.since, w.systemic, w.read_up_to
from consumer.waiting w join consumer.handlers h using (handler)
where h.app = $1 and w.seen_at > now() - make_interval(secs => $2)
order by h.name, w.topic, w.partition, w.count desc, w.error
"""


class WaitingRow(NamedTuple):
    """Messages of one handler and partition that wait for one reason."""

    handler: int
    partition: Partition
    messages: int
    why: FailureCause
    read_up_to: int


async def write(connection: Connection, worker: UUID, handlers: Sequence[int], rows: Sequence[WaitingRow]) -> None:
    """Replace a worker's rows of these handlers."""
    errors = [storable(row.why.error)[:_ERROR_CHARACTERS_MAX] for row in rows]
    keys = (
        [row.handler for row in rows],
        [row.partition.topic for row in rows],
        [row.partition.partition for row in rows],
        errors,
    )
    await connection.execute(_DELETE, worker, list(handlers), *keys)
    if rows:
        await connection.execute(
            _WRITE,
            worker,
            *keys,
            [row.messages for row in rows],
            [row.why.since for row in rows],
            [row.why.systemic for row in rows],
            [row.read_up_to for row in rows],
        )


async def take_over(
    connection: Connection, worker: UUID, handlers: Sequence[int], partitions: Sequence[Partition]
) -> None:
    """Delete the rows of earlier owners of partitions."""
    await connection.execute(
        _TAKE_OVER,
        worker,
        [partition.topic for partition in partitions],
        [partition.partition for partition in partitions],
        list(handlers),
        _TAKEN_OVER_SECONDS,
    )


async def halt(connection: Connection, worker: UUID, row: WaitingRow) -> None:
    """Record what ended a worker that is not started again."""
    error = storable(row.why.error)[:_ERROR_CHARACTERS_MAX]
    at = row.partition
    await connection.execute(_HALT, worker, row.handler, at.topic, at.partition, error, row.messages, row.read_up_to)


async def read(connection: Connection, app: str) -> tuple[list[dict[str, Any]], Mapping[Partition, tuple[int, int]]]:
    """Return what waits, for `status`, and totals by partition.

    A total is how many messages wait, and up to which offset the partition was read.
    """
    rows = await connection.fetch(_READ, app, _EXPIRED_SECONDS)
    totals: dict[Partition, tuple[int, int]] = {}
    messages: list[dict[str, Any]] = []
    for name, topic, number, count, error, since, systemic, read_up_to in map(tuple, rows):
        waiting, read = totals.get(Partition(topic, number), (0, 0))
        totals[Partition(topic, number)] = (waiting + count, max(read, read_up_to))
        messages.append(
            {
                "handler": name,
                "topic": topic,
                "partition": number,
                "count": count,
                "error": error,
                "since": since.isoformat(timespec="seconds"),
                "systemic": systemic,
            }
        )
    return messages, totals
