"""A partition that cannot be read stops alone.

`consumer status` gives the reason, and the command that goes on.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.record.util import calc_crc32c
from app_commands import run_as_printed, stopped_partitions
from harness import Place, Sent, consume_all, query, until, value, working
from payments_app import payments_app
from worker_log import WorkerLog

from consumer import App
from consumer.admin.partitions import partition_health, partition_lags
from consumer.core.message import Partition
from consumer.kafka import record_batch
from consumer.kafka.bounds import Earliest, Latest
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import PartitionUnreadable
from consumer.kafka.log_reader import read, resolve
from consumer.postgres.connection import connect

_LENGTH_AT, _MAGIC_AT, _CRC_AT, _ATTRIBUTES_AT, _BODY_AT = 8, 16, 17, 21, 61
BATCHES = ((0, 5), (5, 10), (10, 15))  # of partition 0; the one in the middle is damaged


def names(first: int, last: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{n:02}" for n in range(first, last)]


async def send_batch(
    kafka: str, topic: str, ids: list[str], partition: int = 0, change: Callable[[bytearray], None] = lambda _: None
) -> None:
    """Send one record batch, changed by hand; checksum and length fit."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka, max_request_size=1 << 30, request_timeout_ms=120_000)
    await producer.start()
    try:
        batch = producer.create_batch()
        for id in ids:
            body = b'{"id":"%s","account":1,"amount":1}' % id.encode()
            assert batch.append(timestamp=None, key=None, value=body, headers=[("message-id", id.encode())])
        raw = bytearray(batch._build())
        change(raw)
        seal(raw)
        batch._buffer = raw
        await (await producer.send_batch(batch, topic, partition=partition))
    finally:
        await producer.stop()


def seal(raw: bytearray) -> None:
    struct.pack_into(">i", raw, _LENGTH_AT, len(raw) - 12)
    struct.pack_into(">I", raw, _CRC_AT, calc_crc32c(bytes(raw[_ATTRIBUTES_AT:])))


def segment(kafka: Any, topic: str, partition: int = 0) -> Path:
    return Path(kafka.directory / "data" / f"{topic}-{partition}" / f"{0:020}.log")


def change_batch(path: Path, first: int, change: Callable[[bytearray], None]) -> None:
    """Change a batch in the broker's file, as a bad disk does."""
    log = path.read_bytes()
    position = 0
    for header, body in record_batch.batches(log):
        size = record_batch.HEADER_BYTES + len(body)
        if header.base_offset == first:
            raw = bytearray(log[position : position + size])
            change(raw)
            assert len(raw) == size
            with path.open("r+b") as file:
                file.seek(position)
                file.write(raw)
                os.fsync(file.fileno())
            return
        position += size
    raise AssertionError("no such batch")


def flip(raw: bytearray) -> None:
    raw[_BODY_AT + 20] ^= 0x10


def unknown_codec(raw: bytearray) -> None:
    struct.pack_into(">h", raw, _ATTRIBUTES_AT, 7)
    seal(raw)


def cut_gzip(raw: bytearray) -> None:
    struct.pack_into(">h", raw, _ATTRIBUTES_AT, 1)
    packed = gzip.compress(os.urandom(len(raw)))[: len(raw) - _BODY_AT]
    raw[_BODY_AT:] = packed
    seal(raw)


def other_codec(raw: bytearray) -> None:
    struct.pack_into(">h", raw, _ATTRIBUTES_AT, 4)  # zstd, which the bytes are not
    seal(raw)


def higher_offset(raw: bytearray) -> None:
    struct.pack_into(">q", raw, 0, 1 << 40)


def slightly_higher_offset(raw: bytearray) -> None:
    struct.pack_into(">q", raw, 0, 8)


def lower_offset(raw: bytearray) -> None:
    struct.pack_into(">q", raw, 0, 2)


def negative_length(raw: bytearray) -> None:
    struct.pack_into(">i", raw, _LENGTH_AT, -5)


def large_length(raw: bytearray) -> None:
    struct.pack_into(">i", raw, _LENGTH_AT, 1 << 30)


def unknown_format(raw: bytearray) -> None:
    raw[_MAGIC_AT] = 9


def old_format(raw: bytearray) -> None:
    raw[_MAGIC_AT] = 1


def broken_record(raw: bytearray) -> None:
    raw[_BODY_AT] = 0x7E  # the length of the first record
    seal(raw)


@pytest.mark.parametrize(
    "change",
    [
        flip,
        unknown_codec,
        cut_gzip,
        other_codec,
        higher_offset,
        slightly_higher_offset,
        lower_offset,
        negative_length,
        large_length,
        unknown_format,
        old_format,
        broken_record,
    ],
    ids=lambda function: function.__name__,
)
async def test_damage_on_disk_stops_its_partition_until_the_printed_command(
    place: Place, kafka: Any, caplog: pytest.LogCaptureFixture, change: Callable[[bytearray], None]
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    worker_log = WorkerLog(caplog)
    for first, last in BATCHES:
        await send_batch(place.kafka, topic, names(first, last))
    change_batch(segment(kafka, topic), 5, change)
    async with working(app, place.settings()):
        await until("the partition to stop", lambda: has(worker_log, "partition stopped"), 90)
        [stop] = worker_log.events("partition stopped")
        assert (stop["topic"], stop["partition"]) == (topic, 0)
        await send_batch(place.kafka, topic, names(0, 50, "other"), 1)
        await until("the healthy partition", lambda: applied(place, names(0, 50, "other")))
        await until("what stands before the damage", lambda: applied(place, names(0, 5)))
        await until("the row", lambda: rows(place, app.name))
        status = await stopped_partitions(place, app)
        assert status.keys() == {0}
        assert status[0]["missing"] and status[0]["missing"]["first"] == 5, status
        assert (await run_as_printed(place, app, status[0]["do"])).returncode == 0
        if status[0]["missing"]["last"] == 9:
            await until("what comes behind it", lambda: applied(place, names(10, 15)))
        else:  # a broker that does not find its way past the damage gives nothing of the rest of the segment
            assert change in (negative_length, large_length, unknown_format, old_format)
            assert status[0]["missing"]["last"] == 14
        assert not await applied(place, names(5, 6))
        await until("the row to go", lambda: no_rows(place, app.name))
        assert await stopped_partitions(place, app) == {}


async def has(worker_log: WorkerLog, text: str) -> bool:
    return bool(worker_log.events(text))


async def applied(place: Place, ids: list[str]) -> bool:
    count = await value(place.dsn, "select count(distinct id) from effects where id = any($1::text[])", ids)
    return bool(count == len(ids))


async def rows(place: Place, app: str) -> list[tuple[Any, ...]]:
    return await query(
        place.dsn, "select reason, first_offset, last_offset from consumer.stopped_partitions where app = $1", app
    )


async def no_rows(place: Place, app: str) -> bool:
    return not await rows(place, app)


async def test_batch_that_decompresses_beyond_the_limit_stops_its_partition(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    worker_log = WorkerLog(caplog)

    def bomb(raw: bytearray) -> None:
        """A record whose value of 400 MB packs into 400 kB."""
        value, zeros = 400 << 20, bytes(1 << 20)
        fields = b"\x00\x00\x00\x01" + varint(value)
        packer = zlib.compressobj(9, wbits=31)
        packed = packer.compress(varint(len(fields) + value + 1) + fields)
        for _ in range(400):
            packed += packer.compress(zeros)
        packed += packer.compress(b"\x00") + packer.flush()
        struct.pack_into(">h", raw, _ATTRIBUTES_AT, 1)
        raw[_BODY_AT:] = packed

    await send_batch(place.kafka, topic, names(0, 5))
    await send_batch(place.kafka, topic, names(5, 6), change=bomb)
    await send_batch(place.kafka, topic, names(6, 10))
    async with working(app, place.settings()):
        await until("the partition to stop", lambda: has(worker_log, "partition stopped"), 60)
        assert "CONSUMER_KAFKA_BATCH_DECOMPRESSED_BYTES_MAX" in worker_log.events("partition stopped")[0]["why"]
        await send_batch(place.kafka, topic, names(0, 50, "other"), 1)
        await until("the healthy partition", lambda: applied(place, names(0, 50, "other")))
        await until("the row", lambda: rows(place, app.name))
        assert await rows(place, app.name) == [("too_large", 5, 5)]
        assert (await run_as_printed(place, app, (await stopped_partitions(place, app))[0]["do"])).returncode == 0
        await until("what comes behind it", lambda: applied(place, names(6, 10)))


def varint(number: int) -> bytes:
    raw, encoded = number << 1, bytearray()
    while raw > 0x7F:
        encoded.append(raw & 0x7F | 0x80)
        raw >>= 7
    return bytes([*encoded, raw])


@pytest.mark.parametrize("keeps_describe", [True, False], ids=["READ lost", "DESCRIBE lost too"])
async def test_revoked_right_to_read_stops_its_topic_until_it_is_granted(
    place: Place, kafka: Any, caplog: pytest.LogCaptureFixture, keeps_describe: bool
) -> None:
    topic, other = await place.topic(), await place.topic()
    app = payments_app(topic, other, balances=False)
    worker_log = WorkerLog(caplog)
    group = ["--allow-principal", "User:dave", "--operation", "All", "--group", app.name]
    read_one = ["--allow-principal", "User:dave", "--operation", "Read", "--operation", "Describe", "--topic", topic]
    read_other = [*read_one[:-1], other]
    for rule in (group, read_one, read_other):
        await asyncio.to_thread(kafka.acls, ["--add", *rule])
    sasl = {
        "kafka_bootstrap_servers": kafka.sasl_servers,
        "kafka_security_protocol": "SASL_PLAINTEXT",
        "kafka_sasl_username": "dave",
        "kafka_sasl_password": "listed",
    }
    async with working(app, place.settings(**sasl)):
        await send_batch(place.kafka, topic, names(0, 5))
        await until("the first messages", lambda: applied(place, names(0, 5)))
        await asyncio.to_thread(kafka.acls, ["--remove", "--force", *read_one])
        if keeps_describe:
            await asyncio.to_thread(
                kafka.acls, ["--add", "--allow-principal", "User:dave", "--operation", "Describe", "--topic", topic]
            )
        line = "partition stopped" if keeps_describe else "kafka does not let the worker see a topic"
        await until("the stop in the log", lambda: has(worker_log, line), 60)
        await until("the row", lambda: rows(place, app.name))
        # Only now: a fetch that was waiting when the right was taken away is still answered.
        await send_batch(place.kafka, topic, names(5, 10))
        await send_batch(place.kafka, other, names(0, 50, "other"))
        await until("the other topic", lambda: applied(place, names(0, 50, "other")))
        assert await rows(place, app.name) == [("not_allowed", 5, 5)]
        for user in ({}, sasl):  # an operator's, who may see the topic, and the worker's own
            stops = await status_of(place, app, **user)
            assert stops[topic, 0]["reason"] == "not_allowed", stops
            assert topic in stops[topic, 0]["why"] and "READ and DESCRIBE" in stops[topic, 0]["do"]
            assert stops[other, 0] is None
        await asyncio.to_thread(kafka.acls, ["--add", *read_one])
        await until("what comes behind it", lambda: applied(place, names(5, 10)), 60)
        await until("the row to go", lambda: no_rows(place, app.name))


async def test_worker_without_rights_records_the_partitions_it_may_not_see(
    place: Place, kafka: Any, caplog: pytest.LogCaptureFixture
) -> None:
    known, new, other = await place.topic(2), await place.topic(), await place.topic()
    app = payments_app(known, new, other, balances=False)
    await send_batch(place.kafka, known, names(0, 5), 1)
    await consume_all(payments_app(known, name=app.name, balances=False), place.settings())  # as a user who may
    allow = ["--add", "--allow-principal", "User:dave", "--operation", "All"]
    await asyncio.to_thread(kafka.acls, [*allow, "--group", app.name])
    await asyncio.to_thread(kafka.acls, [*allow, "--topic", other])
    user = {
        "kafka_bootstrap_servers": kafka.sasl_servers,
        "kafka_security_protocol": "SASL_PLAINTEXT",
        "kafka_sasl_username": "dave",
        "kafka_sasl_password": "listed",
    }
    async with working(app, place.settings(**user)):
        await send_batch(place.kafka, other, names(0, 5, "other"))
        await until("the topic that it may read", lambda: applied(place, names(0, 5, "other")), 60)
        await until("the rows", lambda: rows(place, app.name), 60)
        assert sorted(await rows(place, app.name)) == [("not_allowed", 0, 0), ("not_allowed", 5, 5)]
        stops = await status_of(place, app, **user)
        assert {partition: stop and stop["reason"] for partition, stop in stops.items()} == {
            (known, 0): "not_allowed",
            (known, 1): "not_allowed",
            (new, 0): "not_allowed",
            (other, 0): None,
        }
        for topic in (known, new):
            await asyncio.to_thread(kafka.acls, [*allow, "--topic", topic])
        await send_batch(place.kafka, known, names(5, 10), 0)
        await until("the topic, with the rights", lambda: applied(place, names(5, 10)), 60)
        await until("the rows to go", lambda: no_rows(place, app.name))


async def status_of(place: Place, app: App, **user: Any) -> dict[tuple[str, int], Any]:
    """Topic and partition -> its stop, as `consumer status` reports it."""
    source = KafkaConsumer(place.settings(**user), None)
    await source.start(10)
    connection = await connect(place.settings())
    try:
        lags, missing = await partition_lags(connection, source, app)
        assert not missing
        partitions = [Partition(row["topic"], row["partition"]) for row in lags]
        health = await partition_health(connection, source, app, partitions)
    finally:
        connection.terminate()
        await source.stop(5)
    return {
        partition: at.stop and {"reason": at.stop.reason, "why": at.stop.text, "do": at.stop.do}
        for partition, at in health.items()
    }


async def test_reading_a_damaged_range_names_the_partition_and_the_offset(place: Place, kafka: Any) -> None:
    topic = await place.topic()
    for first, last in BATCHES:
        await send_batch(place.kafka, topic, names(first, last))
    change_batch(segment(kafka, topic), 5, flip)
    source = KafkaConsumer(place.settings(), None)
    await source.start(10)
    try:
        spans = await resolve(source, [Partition(topic, 0)], Earliest(), Latest(), {})
        with pytest.raises(PartitionUnreadable, match=f"{topic}:0: records 5 to 9 cannot be read"):
            [chunk async for chunk in read(source, spans)]
    finally:
        await source.stop(5)


async def test_records_larger_than_the_fetch_limit_are_applied_in_all_partitions(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    topic = await place.topic(3)
    app = payments_app(topic, balances=False)
    worker_log = WorkerLog(caplog)
    sent = []
    for n in range(12):
        id, pad = f"m{n:02}", os.urandom(150_000).hex()
        sent.append(id)
        message = Sent({"id": id, "account": 1, "amount": 1, "pad": pad}, id=id, partition=n % 3)
        await place.send(topic, message)
    async with working(app, place.settings(kafka_partition_fetch_bytes_max=1000)):
        await until("all of them", lambda: applied(place, sent), 90)
        assert not worker_log.events("partition stopped")
    assert await value(place.dsn, "select count(*) from effects") == 12
