"""Positions: up to which offset each partition is settled for an application, and in which log.

A position is written by compare-and-set, in the transaction of the batch that advances it, together with the counts of
outcomes, so that each message counts once.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from consumer.core.log_identity import Position, Print
from consumer.core.message import Partition
from consumer.core.ordering import PositionUpdate
from consumer.postgres.protocol import Connection

_WRITE = """
with moved as (
    update consumer.positions p set next_offset = m.next, updated_at = now(),
           seen_offset = coalesce(m.seen_offset, p.seen_offset),
           seen_timestamp = coalesce(m.seen_timestamp, p.seen_timestamp),
           seen_fingerprint = coalesce(m.seen_fingerprint, p.seen_fingerprint)
    from unnest($2::text[], $3::int4[], $4::int8[], $5::int8[], $6::uuid[], $7::int8[], $8::int8[], $9::int8[], $15::text[], $16::int4[])
         as m(topic, partition, previous, next, topic_id, seen_offset, seen_timestamp, seen_fingerprint, handlers, holds)
    where p.app = $1 and p.topic = m.topic and p.partition = m.partition and p.next_offset = m.previous
      and p.topic_id is not distinct from m.topic_id and p.handlers is not distinct from m.handlers and p.holds = m.holds
    returning 1
), counted as (
    insert into consumer.outcomes as t (handler, topic, partition, outcome, count)
    select * from unnest($10::int2[], $11::int2[], $12::int4[], $13::text[], $14::int8[])
    on conflict (handler, topic, partition, outcome) do update set count = t.count + excluded.count
)
-- A handler may have asked a function to set it otherwise, and what is acknowledged must be durable.
select count(*), (select {stamp}), set_config('synchronous_commit', 'on', true) from moved
"""
_READ = """
select p.topic, p.partition, p.next_offset, p.cluster_id, p.topic_id, p.salt,
       p.first_offset, p.handlers, p.holds, p.seen_offset, p.seen_timestamp, p.seen_fingerprint
from consumer.positions p join unnest($2::text[], $3::int4[]) as w(topic, partition) using (topic, partition)
where p.app = $1
"""
_BEGIN = """
insert into consumer.positions (app, topic, partition, next_offset, first_offset, cluster_id, topic_id, began_with)
values ($1, $2, $3, $4, $4, $5, $6, $7) on conflict do nothing
"""
_NAME_LOG = """
update consumer.positions set cluster_id = coalesce(cluster_id, $4), topic_id = coalesce(topic_id, $5)
where (app, topic, partition) = ($1, $2, $3)
"""


class Horizon(NamedTuple):
    """Between which offsets an application knows a partition. first: where it began; None: not recorded."""

    next: int
    first: int | None


def write_statement(stamp_sql: str) -> str:
    """Return the statement of `write` for a server whose epoch this expression reads."""
    return _WRITE.format(stamp=stamp_sql)


async def write(
    connection: Connection,
    statement: str,
    app: str,
    moves: Sequence[PositionUpdate],
    counts: Mapping[tuple[int, int, int, str], int],
) -> tuple[int, str]:
    """Advance positions, each only if it still is `previous`, and count outcomes.

    counts: (handler, topic, partition, outcome) -> messages. Returns how many positions moved, and the server's stamp.
    """
    moved, stamp, _ = await connection.fetchrow(
        statement,
        app,
        [move.partition.topic for move in moves],
        [move.partition.partition for move in moves],
        [move.previous for move in moves],
        [move.next for move in moves],
        [move.topic_id for move in moves],
        [move.seen and move.seen.offset for move in moves],
        [move.seen and move.seen.timestamp for move in moves],
        [move.seen and move.seen.fingerprint for move in moves],
        *(list(column) for column in zip(*[(*key, n) for key, n in sorted(counts.items())], strict=True))
        if counts
        else ([], [], [], [], []),
        [move.handlers for move in moves],
        [move.holds for move in moves],
    )
    return moved, stamp


async def read_positions(
    connection: Connection, app: str, partitions: Sequence[Partition]
) -> dict[Partition, Position]:
    """Return the positions that exist, of these partitions. Raises what the driver raises."""
    rows = await connection.fetch(
        _READ, app, [partition.topic for partition in partitions], [partition.partition for partition in partitions]
    )
    return {
        Partition(topic, number): Position(
            offset, cluster, id, salt, Print(*seen) if seen[0] is not None else None, first, handlers, holds
        )
        for topic, number, offset, cluster, id, salt, first, handlers, holds, *seen in map(tuple, rows)
    }


async def horizons(connection: Connection, app: str) -> dict[Partition, Horizon]:
    """Return all positions of an application, with the offsets where it began."""
    rows = await connection.fetch(
        "select topic, partition, next_offset, first_offset from consumer.positions where app = $1", app
    )
    return {Partition(row[0], row[1]): Horizon(row[2], row[3]) for row in rows}


async def begin(
    connection: Connection, app: str, starts: Mapping[Partition, Position], of_group: Collection[Partition] = ()
) -> None:
    """Write first positions. One that another worker has written in the meantime stays as it is.

    of_group: those that begin where another client of the Kafka group has committed.
    """
    await connection.executemany(
        _BEGIN,
        [
            (app, *partition, at.offset, at.cluster_id, at.topic_id, "group" if partition in of_group else None)
            for partition, at in starts.items()
        ],
    )


async def name_logs(connection: Connection, app: str, logs: Mapping[Partition, tuple[str | None, uuid.UUID]]) -> None:
    """Record cluster and topic ids of positions that have none yet."""
    await connection.executemany(
        _NAME_LOG, [(app, partition.topic, partition.partition, *ids) for partition, ids in logs.items()]
    )
