"""Aborted transactions, markers, gaps and records that cannot be read."""

from __future__ import annotations

import gzip
import struct
import uuid
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.record.util import calc_crc32c
from harness import Place, Sent, consume_all, counts, drained, letters, query, until, value, working
from payments_app import Payment, payments_app

from consumer import App
from consumer.admin.partitions import partition_lags
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres.connection import connect

_CRC_AT, _ATTRIBUTES_AT, _BODY_AT = 17, 21, 61  # of a record batch, version 2


def body(name: str) -> bytes:
    return msgspec.json.encode(Payment(name, 1, 1))


async def transaction(producer: AIOKafkaProducer, topic: str, names: list[str], *, abort: bool) -> None:
    await producer.begin_transaction()
    for n, name in enumerate(names):
        await producer.send_and_wait(topic, body(name), partition=n % 2, headers=[("message-id", name.encode())])
    await (producer.abort_transaction() if abort else producer.commit_transaction())


async def lags(app: App, place: Place) -> list[int]:
    settings = place.settings()
    source = KafkaConsumer(settings, None)
    await source.start(10)
    connection = await connect(settings)
    try:
        rows, _ = await partition_lags(connection, source, app)
        return [row["lag"] for row in rows]
    finally:
        connection.terminate()
        await source.stop(5)


async def test_aborted_messages_have_no_effect_and_gaps_do_not_stall(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        async with working(app, place.settings()):
            for n in range(10):
                await transaction(producer, topic, [f"good-{n}-{i}" for i in range(6)], abort=False)
                await transaction(producer, topic, [f"bad-{n}-{i}" for i in range(6)], abort=True)
            # The log ends in markers and aborted messages: nothing is handed out for them, and the lag is 0 all the same.
            await drained(app, place.settings())
        assert await lags(app, place) == [0, 0]
        expected = sorted(f"good-{n}-{i}" for n in range(10) for i in range(6))
        assert [row[0] for row in await query(place.dsn, "select id from effects order by id")] == expected

        # A message that was aborted and then sent again counts: the first one never happened.
        await transaction(producer, topic, ["bad-0-0"], abort=False)
        await consume_all(app, place.settings())
        assert await value(place.dsn, "select count(*) from effects where id = 'bad-0-0'") == 1
    finally:
        await producer.stop()


async def test_messages_of_an_open_transaction_are_applied_after_its_commit(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        async with working(app, place.settings()):
            await place.send(topic, Sent(body("before"), id="before"))
            await producer.begin_transaction()
            await producer.send_and_wait(topic, body("inside"), headers=[("message-id", b"inside")])
            await place.send(topic, Sent(body("after"), id="after"))
            await drained(app, place.settings(), open_transaction=True)
            assert await query(place.dsn, "select id from effects") == [("before",)]
            await producer.commit_transaction()

            async def all_three() -> bool:
                return int(await value(place.dsn, "select count(*) from effects")) == 3

            await until("the messages behind the transaction", all_three)
    finally:
        await producer.stop()


async def offsets(place: Place, topic: str) -> list[int]:
    """What the log of partition 0 still holds, up to its end."""
    consumer = AIOKafkaConsumer(bootstrap_servers=place.kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        offsets: list[int] = []
        while await consumer.position(partition) < end:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                offsets += [record.offset for record in records]
        return offsets
    finally:
        await consumer.stop()


async def test_gaps_of_compaction_do_not_stall(place: Place) -> None:
    topic = await place.topic(
        1,
        **{
            "cleanup.policy": "compact",
            "segment.ms": "50",
            "min.cleanable.dirty.ratio": "0.01",
            "max.compaction.lag.ms": "100",
        },
    )
    app = payments_app(topic, balances=False)

    async def compacted() -> bool:  # a segment is closed by the first record after its time
        await place.send(topic, Sent(body("same"), id="same", key="same"))
        kept = await offsets(place, topic)
        return kept[-1] - kept[0] + 1 > len(kept)

    await place.send(topic, Sent(body("first"), id="first", key="first"))
    await until("a gap in the log", compacted)
    await consume_all(app, place.settings())
    assert await query(place.dsn, "select id from effects order by id") == [("first",), ("same",)]
    assert await lags(app, place) == [0]


async def send_with_bad_header(place: Place, topic: str, names: list[str], bad: str, compressed: bool) -> None:
    """Send one batch whose `bad` record has a header key not UTF-8.

    No client sends that, so it is built by hand.
    """
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka)
    await producer.start()
    try:
        batch = producer.create_batch()
        for name in names:
            key = "@@" if name == bad else "ok"
            headers = [("message-id", name.encode()), (key, b"x")]
            assert batch.append(timestamp=None, key=None, value=body(name), headers=headers)
        raw = bytearray(batch._build().replace(b"@@", b"\xff\xfe"))
        if compressed:
            raw[_BODY_AT:] = gzip.compress(bytes(raw[_BODY_AT:]))
            raw[_ATTRIBUTES_AT : _ATTRIBUTES_AT + 2] = struct.pack(">h", 1)
            raw[8:12] = struct.pack(">i", len(raw) - 12)
        raw[_CRC_AT : _CRC_AT + 4] = struct.pack(">I", calc_crc32c(bytes(raw[_ATTRIBUTES_AT:])))
        batch._buffer = raw
        await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()


@pytest.mark.parametrize("compressed", [False, True])
async def test_record_with_a_header_key_that_is_not_utf8_is_a_dead_letter(place: Place, compressed: bool) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    await place.send(topic, *[Sent(body(f"early-{n}"), id=f"early-{n}", partition=n % 2) for n in range(10)])
    await send_with_bad_header(place, topic, ["a", "b", "c"], "b", compressed)
    await place.send(topic, *[Sent(body(f"late-{n}"), id=f"late-{n}", partition=n % 2) for n in range(10)])
    await consume_all(app, place.settings())
    await send_with_bad_header(place, topic, ["d"], "d", compressed)  # and as the only one of its batch, in another run
    await consume_all(app, place.settings())
    expected = sorted(["a", "c", *(f"{when}-{n}" for when in ("early", "late") for n in range(10))])
    assert [row[0] for row in await query(place.dsn, "select id from effects order by id")] == expected
    dead = await letters(place.dsn)
    assert [letter["reason"] for letter in dead] == ["bad_header", "bad_header"]
    rows: list[tuple[Any, ...]] = await query(
        place.dsn, "select value, header_keys, header_values from consumer.dead_letters order by dead_letter"
    )
    assert rows[0] == (body("b"), [b"message-id", b"\xff\xfe"], [b"b", b"x"])
    assert rows[1] == (body("d"), [b"message-id", b"\xff\xfe"], [b"d", b"x"])
    assert (await counts(app, place.dsn))["settle"]["applied"] == 22
