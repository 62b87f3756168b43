"""Positions: up to which offset partitions are settled, and in which log.

A position is written by compare-and-set, in the transaction of the batch that advances it, together with the counts of
outcomes, so that each message counts once.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from consumer.core.delivery import PositionUpdate
from consumer.core.log_identity import Position, RecordFingerprint
from consumer.core.message import Partition
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
-- A function of a handler may have changed it, and an acknowledged COMMIT must be durable.
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
_LOCK = """
select p.topic, p.partition, p.first_offset, p.next_offset, p.handlers
from consumer.positions p join unnest($2::text[], $3::int4[]) as w(topic, partition) using (topic, partition)
where p.app = $1 order by p.topic, p.partition for update of p
"""
_MOVE = """
insert into consumer.positions as p (app, topic, partition, next_offset, first_offset) values ($1, $2, $3, $4, $4)
on conflict (app, topic, partition) do update set next_offset = excluded.next_offset, updated_at = now(),
seen_offset = null, seen_timestamp = null, seen_fingerprint = null, began_with = null,
first_offset = case when p.first_offset > excluded.first_offset then excluded.first_offset else p.first_offset end
"""
_RESTART = """
update consumer.positions set next_offset = $4, first_offset = $4, cluster_id = $5, topic_id = $6, salt = $7,
       seen_offset = null, seen_timestamp = null, seen_fingerprint = null, updated_at = now(),
       handlers = null, began_with = null
where (app, topic, partition) = ($1, $2, $3)
"""
_COUNTS = """
select h.name, o.outcome, sum(o.count)::int8 from consumer.outcomes o join consumer.handlers h using (handler)
where h.app = $1 group by h.name, o.outcome
"""
_APPLIED = """
select handler, sum(count)::int8 from consumer.outcomes where handler = any($1::int2[]) and outcome in ('kept', 'applied')
group by handler
"""
_LOCK_OF_HANDLER = """
select true from consumer.positions p where p.app = (select app from consumer.handlers where handler = $1)
   and (p.topic, p.partition) in (select * from unnest($2::text[], $3::int4[]))
order by p.topic, p.partition for no key update of p
"""
_COUNT_HOLD = """
update consumer.positions p set holds = p.holds + 1 where p.app = (select app from consumer.handlers where handler = $1)
   and (p.topic, p.partition) in (select * from unnest($2::text[], $3::int4[]))
"""
_NAME_LOG = """
update consumer.positions set cluster_id = coalesce(cluster_id, $4), topic_id = coalesce(topic_id, $5)
where (app, topic, partition) = ($1, $2, $3)
"""


class Horizon(NamedTuple):
    """Between which offsets an application knows a partition.

    first: where it began; None: not recorded.
    """

    next: int
    first: int | None


class Settling(NamedTuple):
    """Who settles a partition.

    handlers: their numbers as text; None: not recorded yet.
    """

    first: int | None
    next: int
    handlers: str | None
    began_with: str | None = None


def write_statement(stamp_sql: str) -> str:
    """Return the statement of `write`. stamp_sql: reads the server's epoch."""
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
        [move.hold_count for move in moves],
    )
    return moved, stamp


async def read_positions(
    connection: Connection, app: str, partitions: Sequence[Partition]
) -> dict[Partition, Position]:
    """Return the positions that exist, of these partitions.

    Raises what the driver raises.
    """
    rows = await connection.fetch(
        _READ, app, [partition.topic for partition in partitions], [partition.partition for partition in partitions]
    )
    return {
        Partition(topic, number): Position(
            offset, cluster, id, salt, RecordFingerprint(*seen) if seen[0] is not None else None, first, handlers, holds
        )
        for topic, number, offset, cluster, id, salt, first, handlers, holds, *seen in map(tuple, rows)
    }


async def horizons(connection: Connection, app: str) -> dict[Partition, Horizon]:
    """Return all positions of an application, with the offsets where it began."""
    rows = await connection.fetch(
        "select topic, partition, next_offset, first_offset from consumer.positions where app = $1", app
    )
    return {Partition(row[0], row[1]): Horizon(row[2], row[3]) for row in rows}


async def next_offsets(connection: Connection, app: str) -> dict[Partition, int]:
    """Return all positions of an application, as offsets."""
    return {partition: horizon.next for partition, horizon in (await horizons(connection, app)).items()}


async def settling(connection: Connection, app: str) -> dict[Partition, Settling]:
    """Return who settles each partition of an application."""
    rows = await connection.fetch(
        "select topic, partition, first_offset, next_offset, handlers, began_with from consumer.positions where app = $1",
        app,
    )
    return {Partition(row[0], row[1]): Settling(*tuple(row)[2:]) for row in rows}


async def lock_settling(connection: Connection, app: str, partitions: Sequence[Partition]) -> dict[Partition, Settling]:
    """Lock positions until the transaction ends, and return who settles them."""
    rows = await connection.fetch(
        _LOCK, app, [partition.topic for partition in partitions], [partition.partition for partition in partitions]
    )
    return {Partition(row[0], row[1]): Settling(*tuple(row)[2:]) for row in rows}


async def set_handlers(connection: Connection, app: str, handlers: Mapping[Partition, str]) -> None:
    """Record which handlers settle partitions from here on."""
    await connection.executemany(
        "update consumer.positions set handlers = $4 where (app, topic, partition) = ($1, $2, $3)",
        [(app, *partition, numbers) for partition, numbers in handlers.items()],
    )


async def lock_app(connection: Connection, app: str) -> None:
    """Lock all positions of an application until the transaction ends."""
    await connection.execute("select from consumer.positions where app = $1 for update", app)


async def lock(connection: Connection, app: str, partition: Partition) -> int | None:
    """Lock a position until the transaction ends; return it, if it exists."""
    offset: int | None = await connection.fetchval(
        "select next_offset from consumer.positions where (app, topic, partition) = ($1, $2, $3) for update",
        app,
        *partition,
    )
    return offset


async def move(connection: Connection, app: str, partition: Partition, offset: int) -> None:
    """Set a position within its log. Running workers notice."""
    await connection.execute(_MOVE, app, *partition, offset)


async def restart(
    connection: Connection,
    app: str,
    partition: Partition,
    offset: int,
    cluster_id: str | None,
    topic_id: uuid.UUID | None,
    salt: bytes,
) -> None:
    """Replace the log of a position by another one."""
    await connection.execute(_RESTART, app, *partition, offset, cluster_id, topic_id, salt)


async def lock_of_handler(connection: Connection, handler: int, partitions: Sequence[Partition]) -> None:
    """Lock positions of a handler's application until the transaction ends."""
    await connection.fetch(_LOCK_OF_HANDLER, handler, *_columns(partitions))


async def count_hold(connection: Connection, handler: int, partitions: Sequence[Partition]) -> None:
    """Count a hold of another process: owners read the holds again."""
    await connection.execute(_COUNT_HOLD, handler, *_columns(partitions))


async def rewind(connection: Connection, app: str) -> None:
    """Set all positions of an application to 0."""
    await connection.execute("update consumer.positions set next_offset = 0 where app = $1", app)


async def salts(connection: Connection, topic: str, partition: str) -> list[bytes | None]:
    """Return the salts of a partition's ids, of all applications.

    partition: a number as text.
    """
    rows = await connection.fetch(
        "select distinct salt from consumer.positions where topic = $1 and partition::text = $2", topic, partition
    )
    return [row[0] for row in rows]


async def of_topics(connection: Connection, app: str, topics: Sequence[str]) -> dict[Partition, int]:
    """Return the positions of topics, as offsets."""
    rows = await connection.fetch(
        "select topic, partition, next_offset from consumer.positions where app = $1 and topic = any($2)", app, topics
    )
    return {Partition(row[0], row[1]): row[2] for row in rows}


async def counts(connection: Connection, app: str) -> list[tuple[str, str, int]]:
    """Return how messages ended: handler, outcome and number of each."""
    return [(row[0], row[1], row[2]) for row in await connection.fetch(_COUNTS, app)]


async def applied_by_all(connection: Connection, handlers: Sequence[int]) -> dict[int, int]:
    """Return how many messages any worker has applied, by handler."""
    return {row[0]: row[1] for row in await connection.fetch(_APPLIED, list(handlers))}


async def forget_counts(connection: Connection, handler: int) -> None:
    """Delete the counts of a handler."""
    await connection.execute("delete from consumer.outcomes where handler = $1", handler)


async def exist(connection: Connection, app: str) -> bool:
    """Return whether an application has any position."""
    return bool(await connection.fetchval("select exists (select from consumer.positions where app = $1)", app))


async def begin(
    connection: Connection, app: str, starts: Mapping[Partition, Position], of_group: Collection[Partition] = ()
) -> None:
    """Write first positions.

    One that another worker has written meanwhile stays as it is. of_group: those that begin where another client of the
    Kafka group has committed.
    """
    await connection.executemany(
        _BEGIN,
        [
            (app, *partition, at.offset, at.cluster_id, at.topic_id, "group" if partition in of_group else None)
            for partition, at in starts.items()
        ],
    )


def _columns(partitions: Sequence[Partition]) -> tuple[list[str], list[int]]:
    return [partition.topic for partition in partitions], [partition.partition for partition in partitions]


async def name_logs(connection: Connection, app: str, logs: Mapping[Partition, tuple[str | None, uuid.UUID]]) -> None:
    """Record cluster and topic ids of positions that have none yet."""
    await connection.executemany(
        _NAME_LOG, [(app, partition.topic, partition.partition, *ids) for partition, ids in logs.items()]
    )
