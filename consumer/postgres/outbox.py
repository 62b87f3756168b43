"""The outbox: streams, their rows, and how far they are published.

Tables: outbox_streams, outbox_published, outbox, outbox_generations. migrations/0002_outbox.sql explains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from asyncpg.pgproto.pgproto import UUID

from consumer.core.audit import ActedBy, Entry
from consumer.core.message import Partition
from consumer.outbox.record import (
    Outgoing,
    OutgoingRecord,
    StoredStream,
    event_type,
    headers_as_json,
    headers_from_json,
)
from consumer.postgres import audit
from consumer.postgres.protocol import Connection
from consumer.postgres.server import ServerIdentity

_READ_ROWS_MAX = 500
_READ_BYTES_MAX = 8 << 20

# The streams are locked in one order. Where one does not exist yet, none is locked: it is created, and the statement runs
# again. (With a lock held, creating one could wait for a transaction that waits for the lock.)
_STORE = """
with wanted as materialized (
    select * from unnest($2::text[], $3::int4[], $4::text[], $5::int8[])
         with ordinality as w(source_topic, source_partition, topic, count, place)
), existing as materialized (
    select s.stream, w.count, w.place from wanted w join consumer.outbox_streams s
         on (s.app, s.source_topic, s.source_partition, s.topic) = ($1, w.source_topic, w.source_partition, w.topic)
), locked as materialized (
    select s.stream, e.count, e.place from existing e join consumer.outbox_streams s using (stream)
    where (select count(*) from existing) = cardinality($2)
    order by s.stream for update of s
), numbered as (
    update consumer.outbox_streams s set next_seq = s.next_seq + l.count from locked l
    where s.stream = l.stream
    returning s.stream, s.next_seq - l.count as first_seq, l.place
), stored as (
    insert into consumer.outbox (generation, stream, seq, id, topic, key, value, headers, type, traceparent, tracestate,
                                 handler, source_offset)
    select (select generation from consumer.outbox_generations where closed_at is null), n.stream, n.first_seq + o.number,
           o.id, $4[n.place::int4], o.key, o.value, o.headers::jsonb, o.type, o.traceparent, o.tracestate, o.handler, o.source_offset
    from unnest($6::int8[], $7::int8[], $8::uuid[], $9::bytea[], $10::bytea[], $11::text[], $12::text[], $13::text[],
                $14::text[], $15::int2[], $16::int8[])
         as o(place, number, id, key, value, headers, type, traceparent, tracestate, handler, source_offset)
    join numbered n using (place)
)
select place, stream, first_seq, floor(extract(epoch from now()) * 1000)::int8 from numbered order by place
"""
_CREATE = """
with created as (
    insert into consumer.outbox_streams (app, source_topic, source_partition, topic)
    select $1, * from unnest($2::text[], $3::int4[], $4::text[]) as w(source_topic, source_partition, topic) order by 2, 3, 4
    on conflict do nothing
    returning stream
)
insert into consumer.outbox_published (stream) select stream from created
"""
_STREAMS = """
select s.stream, s.source_topic, s.source_partition, s.topic, p.next_seq, s.next_seq, p.stopped
from consumer.outbox_streams s join consumer.outbox_published p using (stream)
where s.app = $1 and (s.source_topic, s.source_partition) in (select * from unnest($2::text[], $3::int4[]))
"""
# The sizes of rows before each one: a batch of large rows ends early.
_ROWS = """
select seq, id, topic, key, value, headers::text, traceparent, tracestate, created_ms from (
    select *, floor(extract(epoch from created_at) * 1000)::int8 as created_ms,
           sum(coalesce(octet_length(value), 0) + coalesce(octet_length(key), 0)) over (order by seq) as size
    from (select * from consumer.outbox where stream = $1 and seq >= $2 and seq < $3 order by seq limit $4) as part
) as sized
where size <= $5 or seq = $2 order by seq
"""
# Only in the epoch that the watermarks are of. In an earlier one, other rows may get these numbers.
_SAVE = """
update consumer.outbox_published p set next_seq = w.next_seq, updated_at = now()
from unnest($1::int4[], $2::int8[]) as w(stream, next_seq) where p.stream = w.stream and p.next_seq < w.next_seq
and {stamp} = $3
"""
_STOP = """
update consumer.outbox_published set stopped = $2, stopped_at = now(), updated_at = now()
where stream = $1 and stopped is null and {stamp} = $3
"""
_OVERVIEW = """
select s.stream, s.source_topic, s.source_partition, s.topic, p.next_seq, s.next_seq, p.stopped,
       extract(epoch from p.stopped_at)::float8,
       extract(epoch from (select o.created_at from consumer.outbox o where o.stream = s.stream and o.seq >= p.next_seq
                           order by o.seq limit 1))::float8
from consumer.outbox_streams s join consumer.outbox_published p using (stream)
where s.app = $1 order by s.source_topic, s.source_partition, s.topic
"""
_DETAILS = """
select o.seq, o.id, h.name, o.source_offset, extract(epoch from o.created_at)::float8,
       octet_length(o.key), octet_length(o.value), o.type
from consumer.outbox o left join consumer.handlers h using (handler)
where o.stream = $1 and o.seq >= $2 order by o.seq limit $3
"""
_LOCK_STOPPED = """
select p.next_seq, s.next_seq from consumer.outbox_published p join consumer.outbox_streams s using (stream)
where s.app = $1 and p.stream = $2 and p.stopped is not null for update of p
"""
_GO_ON = """
update consumer.outbox_published set next_seq = $2, stopped = null, stopped_at = null, updated_at = now() where stream = $1
"""
_ACTIONS = """
select extract(epoch from at)::float8, operator, split_part(action, ' ', 2), (numbers->>'from_seq')::int8,
       (numbers->>'to_seq')::int8, why
from consumer.audit where stream = $1 order by entry desc limit $2
"""


class StreamState(NamedTuple):
    """A stream as the tables have it.

    watermark: all rows below it are published. end: the next row to be stored.
    """

    stream: int
    source: Partition
    topic: str
    watermark: int
    end: int
    stopped: str | None


class StoredRow(NamedTuple):
    """A row of the outbox. created_ms: milliseconds since 1970."""

    seq: int
    record: OutgoingRecord
    created_ms: int


class StreamOverview(NamedTuple):
    """What people see of a stream. stopped_at, oldest: Unix seconds."""

    state: StreamState
    stopped_at: float | None
    oldest: float | None

    @property
    def unpublished(self) -> int:
        """How many rows Kafka has not acknowledged."""
        return self.state.end - self.state.watermark


class RowDetails(NamedTuple):
    """What people see of a row: no byte of it.

    created_at: Unix seconds.
    """

    seq: int
    id: UUID
    handler: str | None
    source_offset: int | None
    created_at: float
    key_bytes: int | None
    value_bytes: int | None
    type: str | None


class StreamAction(NamedTuple):
    """What an operator did to a stream. at: Unix seconds."""

    at: float
    operator: str
    what: str
    from_seq: int
    to_seq: int
    why: str


async def store(connection: Connection, app: str, outgoing: Sequence[Outgoing]) -> list[StoredStream]:
    """Store records in the open transaction, numbered in their streams.

    Locks the streams until the transaction ends.
    """
    by_stream: dict[tuple[str, int, str], list[Outgoing]] = {}
    for item in outgoing:
        by_stream.setdefault((*item.source, item.record.topic), []).append(item)
    keys = list(by_stream)
    names = [[key[position] for key in keys] for position in range(3)]
    arguments = [app, *names, [len(items) for items in by_stream.values()], *_columns(by_stream.values())]
    rows = await connection.fetch(_STORE, *arguments)
    if not rows:
        await connection.execute(_CREATE, app, *names)
        rows = await connection.fetch(_STORE, *arguments)
    if len(rows) != len(keys):
        raise AssertionError(f"{len(rows)} of {len(keys)} streams of the outbox were numbered")
    stored = []
    for place, stream, first, created_ms in rows:
        topic, partition, target = keys[place - 1]
        records = [item.record for item in by_stream[keys[place - 1]]]
        stored.append(StoredStream(stream, Partition(topic, partition), target, first, records, created_ms))
    return stored


def _columns(streams: Any) -> list[list[Any]]:
    """Return the columns of rows, with the place of their stream first."""
    rows = [
        (
            place,
            number,
            UUID(record.id),
            record.key,
            record.value,
            headers_as_json(record.headers),
            event_type(record.headers),
            record.traceparent,
            record.tracestate,
            handler,
            offset,
        )
        for place, items in enumerate(streams, 1)
        for number, (record, _, handler, offset) in enumerate(items)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


async def streams(connection: Connection, app: str, sources: Sequence[Partition]) -> list[StreamState]:
    """Return the streams of input partitions."""
    rows = await connection.fetch(
        _STREAMS, app, [source.topic for source in sources], [source.partition for source in sources]
    )
    return [_state(row) for row in rows]


def _state(row: Any) -> StreamState:
    stream, source_topic, source_partition, topic, watermark, end, stopped = tuple(row)[:7]
    return StreamState(stream, Partition(source_topic, source_partition), topic, watermark, end, stopped)


async def rows(connection: Connection, stream: int, first: int, end: int) -> list[StoredRow]:
    """Return some rows of a stream from `first` on, below `end`.

    At most 500, and about 8 MiB unless one is larger.
    """
    fetched = await connection.fetch(_ROWS, stream, first, end, _READ_ROWS_MAX, _READ_BYTES_MAX)
    return [
        StoredRow(
            seq,
            OutgoingRecord(topic, id.bytes, key, value, headers_from_json(headers), traceparent, tracestate),
            created_ms,
        )
        for seq, id, topic, key, value, headers, traceparent, tracestate, created_ms in map(tuple, fetched)
    ]


async def save_watermarks(connection: Connection, server: ServerIdentity, watermarks: Mapping[int, int]) -> None:
    """Raise watermarks of streams; none is ever lowered.

    server: whose rows they are. In another epoch nothing is written.
    """
    pairs = sorted(watermarks.items())
    sql = _SAVE.format(stamp=server.stamp_sql)
    await connection.execute(sql, [stream for stream, _ in pairs], [next_seq for _, next_seq in pairs], server.stamp)


async def stop(connection: Connection, server: ServerIdentity, stream: int, reason: str) -> None:
    """Stop a stream until an operator resumes it.

    server: whose stream it is. In another epoch nothing is written.
    """
    await connection.execute(_STOP.format(stamp=server.stamp_sql), stream, reason, server.stamp)


async def turn(connection: Connection, seconds: float, size: int) -> str:
    """Open the next generation if the present one is due."""
    return str(await connection.fetchval("select consumer.turn_outbox($1, $2)", seconds, size))


async def drop(connection: Connection, keep_seconds: float) -> str:
    """Drop the oldest closed generation if all of it is published."""
    return str(await connection.fetchval("select consumer.drop_outbox($1)", keep_seconds))


# -- for people -------------------------------------------------------------------------------------------------------


async def overview(connection: Connection, app: str) -> list[StreamOverview]:
    """Return every stream of an application."""
    return [StreamOverview(_state(row), row[7], row[8]) for row in await connection.fetch(_OVERVIEW, app)]


async def details(connection: Connection, stream: int, first: int, limit: int) -> list[RowDetails]:
    """Describe rows of a stream from `first` on."""
    return [RowDetails(*row) for row in await connection.fetch(_DETAILS, stream, first, limit)]


async def actions(connection: Connection, stream: int, limit: int) -> list[StreamAction]:
    """Return what operators did to a stream, the latest first."""
    return [StreamAction(*row) for row in await connection.fetch(_ACTIONS, stream, limit)]


async def resume(connection: Connection, app: str, stream: int, discard: int, by: ActedBy) -> tuple[int, int] | None:
    """Let a stopped stream go on, and record it.

    discard: how many of its next rows are not published. Returns the first row that was not published, and the row at
    which it goes on; None where the stream is not stopped.
    """
    async with connection.transaction():
        row = await connection.fetchrow(_LOCK_STOPPED, app, stream)
        if row is None:
            return None
        first, end = row
        to_seq = min(first + discard, end)
        await connection.execute(_GO_ON, stream, to_seq)
        action = "outbox discard" if discard else "outbox resume"
        numbers = {"from_seq": first, "to_seq": to_seq}
        await audit.record(connection, Entry(action, by, "resumed", app, stream=stream, numbers=numbers))
    return first, to_seq
