"""Reads what an App has published; compares it with what it committed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from harness import Place, drained, query, until, value, working

from consumer import App, Tx
from consumer.core.audit import ActedBy
from consumer.postgres import outbox


async def records_of(kafka: str, topic: str) -> list[Any]:
    """All records of a topic, partition by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        await consumer._client._wait_on_metadata(topic)
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        records: list[Any] = []
        while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                records += batch
        return sorted(records, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


def ids(records: Sequence[Any]) -> list[str]:
    """The message ids of records."""
    return [dict(record.headers)["message-id"].decode() for record in records]


def values(records: Sequence[Any]) -> list[Any]:
    """The JSON values of records."""
    return [json.loads(record.value) for record in records]


async def all_published(place: Place, topic: str | None = None) -> None:
    """Wait until Kafka has acknowledged every row."""

    async def none_left() -> bool:
        return bool(
            await value(
                place.dsn,
                """select coalesce(bool_and(s.next_seq = p.next_seq), true)
                   from consumer.outbox_streams s join consumer.outbox_published p using (stream)
                   where $1::text is null or s.topic = $1""",
                topic,
            )
        )

    await until("everything is published", none_left)


async def publish_all(app: App, place: Place, **more: Any) -> None:
    """Settle and publish everything that was produced."""
    settings = place.settings(**more)
    async with working(app, settings):
        await drained(app, settings)
        await all_published(place)


async def check_published(place: Place, out: str) -> list[Any]:
    """Check that Kafka has what was committed, in order; return first occurrences.

    Nothing else may be there.
    """
    records = await records_of(place.kafka, out)
    first: dict[str, Any] = {}
    for record in records:
        first.setdefault(ids([record])[0], record)
    committed = await query(place.dsn, "select id::text, key, seq from consumer.outbox where topic = $1", out)
    assert set(first) == {row[0] for row in committed}, "each committed id is in Kafka, and no other"
    seq_of = {row[0]: row[2] for row in committed}
    by_place: dict[tuple[int, bytes], list[int]] = {}
    for id, record in first.items():
        by_place.setdefault((record.partition, record.key), []).append(seq_of[id])
    assert all(seqs == sorted(seqs) for seqs in by_place.values()), "first occurrences are in the order of commits"
    return list(first.values())


def name() -> str:
    """A name for an App that no other test has."""
    return f"relay-{uuid.uuid4().hex[:8]}"


async def configure(kafka: str, topic: str, **configs: str) -> None:
    """Change the configuration of a topic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=configs)])
    finally:
        await admin.close()


async def stopped_reason(place: Place, topic: str) -> str:
    """Wait until the stream of a topic stops; return why."""

    async def reason() -> Any:
        rows = await query(
            place.dsn,
            """select p.stopped from consumer.outbox_published p join consumer.outbox_streams s using (stream)
               where s.topic = $1""",
            topic,
        )
        return rows and rows[0][0]

    return str(await until("the stream to stop", reason, 60))


def sizes_app(topic: str, *outs: str) -> App:
    """Forward messages to topics, each padded as its message says."""
    app = App(name(), publishes=outs)

    @app.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        for out in outs:
            tx.publish(out, {"n": entry["n"], "pad": "x" * entry.get("pad", 0)}, key=str(entry["n"] % 3))

    return app


async def resume(place: Place, app: App, stream: int, why: str) -> None:
    """Let a stopped stream go on, as an operator."""
    connection = await asyncpg.connect(place.worker_dsn)
    try:
        assert await outbox.resume(connection, app.name, stream, 0, ActedBy("ann", why))
    finally:
        await connection.close()
