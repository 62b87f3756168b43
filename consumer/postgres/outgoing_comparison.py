"""Compares what handlers publish with Kafka, in temporary tables.

PostgreSQL holds them, so that the memory of the replay does not grow with the topics. Everything happens in one transaction
that is rolled back. Reads outbox, outbox_published, outbox_streams and audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from asyncpg.pgproto.pgproto import UUID as UUID

# Of a difference: kind is missing, extra or different; reason, why it proves nothing: unpublished, discarded, truncated,
# unstable, or "" where it proves a fault.
_CREATE = """
set local idle_in_transaction_session_timeout = 0; set local statement_timeout = 0; set local lock_timeout = 0;
create temp table consumer_expected (
    run int2 not null, topic text not null, id uuid not null, key int8 not null, value int8 not null, headers int8 not null,
    handler int2, source_topic text, source_partition int4, source_offset int8
) on commit drop;
create temp table consumer_in_kafka (
    topic text not null, id uuid not null, key int8 not null, value int8 not null, headers int8 not null,
    partition int4 not null, "offset" int8 not null, is_earlier boolean not null
) on commit drop;
create temp table consumer_outgoing_differences (
    topic text not null, id uuid not null, kind text not null, reason text not null, detail text not null,
    primary key (topic, id)
) on commit drop;
create temp table consumer_watermarks (stream int4 primary key, next_seq int8 not null) on commit drop;
"""
_WATERMARKS = """
insert into consumer_watermarks
select p.stream, p.next_seq from consumer.outbox_published p join consumer.outbox_streams using (stream) where topic = any($1)
"""
# What is new in Kafka since the replay began may be of messages that it does not replay: only earlier records are extra.
_COMPARE = """
analyze consumer_expected; analyze consumer_in_kafka; truncate consumer_outgoing_differences;
insert into consumer_outgoing_differences
select topic, id, 'missing', '', '' from (select distinct topic, id from consumer_expected where run = 0) e
where not exists (select from consumer_in_kafka k where (k.topic, k.id) = (e.topic, e.id));
insert into consumer_outgoing_differences
select topic, id, 'extra', '', '' from (select distinct topic, id from consumer_in_kafka where is_earlier) k
where not exists (select from consumer_expected e where run = 0 and (e.topic, e.id) = (k.topic, k.id));
insert into consumer_outgoing_differences
select k.topic, k.id, 'different', '',
       concat_ws(', ', case when bool_and(k.key <> e.key) then 'key' end,
                 case when bool_and(k.value <> e.value) then 'value' end,
                 case when bool_and(k.headers <> e.headers) then 'headers' end)
from consumer_in_kafka k join consumer_expected e on e.run = 0 and (e.topic, e.id) = (k.topic, k.id)
where not exists (select from consumer_expected e
                  where e.run = 0 and (e.topic, e.id, e.key, e.value, e.headers) = (k.topic, k.id, k.key, k.value, k.headers))
group by k.topic, k.id;
"""
_EXPLAIN = """
update consumer_outgoing_differences d set reason = 'discarded'
from consumer.outbox o join consumer.audit a on a.stream = o.stream and a.action = 'outbox discard'
     and o.seq >= (a.numbers->>'from_seq')::int8 and o.seq < (a.numbers->>'to_seq')::int8
where d.kind = 'missing' and (o.topic, o.id) = (d.topic, d.id);
update consumer_outgoing_differences d set reason = 'unpublished'
from consumer.outbox o left join consumer_watermarks w using (stream)
where d.kind = 'missing' and d.reason = '' and (o.topic, o.id) = (d.topic, d.id) and o.seq >= coalesce(w.next_seq, 0);
"""
_TRUNCATED = """
update consumer_outgoing_differences set reason = 'truncated' where kind = 'missing' and reason = '' and topic = any($1)
"""
# What another run of the same handlers publishes under this id, or not at all, is what no run can tell.
_UNSTABLE = """
update consumer_outgoing_differences d set reason = 'unstable' where reason = '' and (
    kind <> 'extra' and exists (
        select from consumer_expected e where e.run = 0 and (e.topic, e.id) = (d.topic, d.id)
        and not exists (select from consumer_expected o where o.run = $1
                        and (o.topic, o.id, o.key, o.value, o.headers) = (e.topic, e.id, e.key, e.value, e.headers)))
    or kind = 'extra' and exists (select from consumer_expected o where o.run = $1 and (o.topic, o.id) = (d.topic, d.id)))
"""
_COUNTS = """
select topic, kind, reason, count(*) from consumer_outgoing_differences group by 1, 2, 3 order by 1, 2, 3
"""
_TOTALS = """
select t.topic, (select count(distinct id) from consumer_expected e where e.run = 0 and e.topic = t.topic),
       (select count(*) from consumer_in_kafka k where k.topic = t.topic),
       (select count(distinct id) from consumer_in_kafka k where k.topic = t.topic)
from unnest($1::text[]) with ordinality as t(topic, place) order by place
"""
_SAMPLES = """
select d.kind, d.reason, d.detail, d.topic, d.id, k.partition, k."offset", h.name, e.source_topic, e.source_partition, e.source_offset
from (select *, row_number() over (partition by kind, reason order by topic, id) as n from consumer_outgoing_differences) d
left join lateral (select partition, "offset" from consumer_in_kafka k where (k.topic, k.id) = (d.topic, d.id)
                   order by partition, "offset" limit 1) k on true
left join lateral (select * from consumer_expected e where e.run = 0 and (e.topic, e.id) = (d.topic, d.id) limit 1) e on true
left join consumer.handlers h on h.handler = e.handler
where n <= $1 order by d.kind, d.reason, d.topic, d.id
"""
# Who else publishes to these topics through this database.
_OTHERS = """
select distinct topic, app, source_topic from consumer.outbox_streams
where topic = any($2) and next_seq > 0 and (app <> $1 or source_topic <> all($3)) order by 1, 2, 3
"""
_EDITED = """
select count(*) from consumer.audit where app = $1 and action = 'dlq edit' and result = 'applied'
"""
_EXPECTED_COLUMNS = (
    "run", "topic", "id", "key", "value", "headers", "handler", "source_topic", "source_partition", "source_offset",
)  # fmt: skip
_IN_KAFKA_COLUMNS = ("topic", "id", "key", "value", "headers", "partition", "offset", "is_earlier")


class Total(NamedTuple):
    """Records of a topic.

    expected, ids: distinct message ids, of the handlers and in Kafka. records: in Kafka.
    """

    topic: str
    expected: int
    records: int
    ids: int


class Sample(NamedTuple):
    """An example.

    partition, offset: in the output topic. source_*: the message whose handler publishes it.
    """

    kind: str
    reason: str
    detail: str
    topic: str
    id: UUID
    partition: int | None
    offset: int | None
    handler: str | None
    source_topic: str | None
    source_partition: int | None
    source_offset: int | None


async def begin(connection: Any) -> None:
    """Begin the transaction, and create the tables."""
    await connection.execute("begin")
    await connection.execute(_CREATE)


async def forget(connection: Any, run: int) -> None:
    """Forget what a run has published: it starts over."""
    await connection.execute("delete from consumer_expected where run = $1", run)


async def add_expected(connection: Any, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add what handlers publish.

    rows: number of the run, topic, id, digests, handler and source.
    """
    await connection.copy_records_to_table(
        "consumer_expected", schema_name="pg_temp", columns=_EXPECTED_COLUMNS, records=rows
    )


async def add_in_kafka(connection: Any, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add records of the output topics."""
    await connection.copy_records_to_table(
        "consumer_in_kafka", schema_name="pg_temp", columns=_IN_KAFKA_COLUMNS, records=rows
    )


async def note_watermarks(connection: Any, topics: Sequence[str]) -> None:
    """Note how far the outbox is published, before Kafka is read."""
    await connection.execute(_WATERMARKS, list(topics))


async def read_reasons(connection: Any) -> None:
    """Note which missing records are still in the outbox, or were discarded.

    Call `compare` before. From then to the end of the transaction no generation of the outbox is dropped.
    """
    await connection.execute(_EXPLAIN)


async def compare(connection: Any) -> int:
    """Find all differences; return how many there are."""
    await connection.execute(_COMPARE)
    return int(await connection.fetchval("select count(*) from consumer_outgoing_differences"))


async def excuse_truncated(connection: Any, topics: Sequence[str]) -> None:
    """Note that these topics lack their first records."""
    await connection.execute(_TRUNCATED, list(topics))


async def excuse_unstable(connection: Any, run: int) -> None:
    """Note what another run publishes in another way."""
    await connection.execute(_UNSTABLE, run)


async def counts(connection: Any) -> list[tuple[str, str, str, int]]:
    """Count the differences: topic, kind, reason, and how many ids."""
    return [tuple(row) for row in await connection.fetch(_COUNTS)]


async def totals(connection: Any, topics: Sequence[str]) -> list[Total]:
    """Count the records of each topic."""
    return [Total(*row) for row in await connection.fetch(_TOTALS, list(topics))]


async def samples(connection: Any, limit: int) -> list[Sample]:
    """Return some differences of each kind and reason."""
    return [Sample(*row) for row in await connection.fetch(_SAMPLES, limit)]


async def others(
    connection: Any, app: str, topics: Sequence[str], sources: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Return other streams of these topics: topic, App and input topic."""
    return [tuple(row) for row in await connection.fetch(_OTHERS, app, list(topics), list(sources))]


async def edited(connection: Any, app: str) -> int:
    """Count dead letters that were applied with another id or value."""
    return int(await connection.fetchval(_EDITED, app))
