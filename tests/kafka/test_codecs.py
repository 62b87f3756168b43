"""Topics compressed by librdkafka and by the Java client are read."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer
from harness import Place, consumer, drained, is_one_line, query, working
from payments_app import Payment, payments_app
from services import JARS

from consumer.core.errors import Misconfigured
from consumer.kafka import decompression
from consumer.kafka.consumer import KafkaConsumer

CODECS = ["none", "gzip", "snappy", "lz4", "zstd"]


def body(name: str) -> bytes:
    return msgspec.json.encode(Payment(name, 1, 1))


def send_by_librdkafka(kafka: str, topic: str, names: list[str], codec: str, kind: str) -> None:
    options: dict[str, Any] = {"bootstrap.servers": kafka, "compression.type": codec, "linger.ms": 50}
    if kind != "plain":
        options["enable.idempotence"] = True
    if kind.startswith("trans"):
        options["transactional.id"] = uuid.uuid4().hex
    producer = Producer(options)

    def send(some: list[str]) -> None:
        for name in some:
            producer.produce(topic, body(name), key=name, headers=[("message-id", name.encode())])
        producer.flush()

    if "transactional.id" not in options:
        return send(names)
    producer.init_transactions()
    producer.begin_transaction()
    send([f"aborted-{name}" for name in names])
    producer.abort_transaction()
    producer.begin_transaction()
    send(names)
    producer.commit_transaction()
    return None


@pytest.mark.parametrize("codec", CODECS)
async def test_topics_compressed_by_any_kind_of_librdkafka_producer_are_read(place: Place, codec: str) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    expected = []
    for kind in ("plain", "idempotent", "transactional"):
        names = [f"{kind}-{n:03}" for n in range(100)]
        expected += names
        await asyncio.to_thread(send_by_librdkafka, place.kafka, topic, names, codec, kind)
    async with working(app, place.settings()):
        await drained(app, place.settings())
    assert [row[0] for row in await query(place.dsn, "select id from effects order by id")] == sorted(expected)


def send_by_java(kafka: str, topic: str, payload: Path, count: int, codec: str, transactional: bool) -> None:
    """Send lines of the file, drawn at random, with Kafka's load generator."""
    options = [f"bootstrap.servers={kafka}", f"compression.type={codec}", "linger.ms=50", "acks=all"]
    command = [
        *("java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"),
        *("org.apache.kafka.tools.ProducerPerformance", "--topic", topic, "--num-records", str(count)),
        *("--throughput", "-1", "--payload-file", str(payload)),
    ]
    if transactional:
        command += ["--transactional-id", uuid.uuid4().hex, "--transaction-duration-ms", "20"]
    done = subprocess.run(
        [*command, "--producer-props", *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("codec", CODECS)
async def test_topics_compressed_by_the_java_client_are_read(place: Place, codec: str, tmp_path: Path) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    payload = tmp_path / "payload"
    payload.write_bytes(body("java") + b"\n")
    await asyncio.to_thread(send_by_java, place.kafka, topic, payload, 300, codec, codec in ("snappy", "zstd"))
    async with working(app, place.settings()):
        await drained(app, place.settings())
    assert await query(place.dsn, "select id, count(*) from effects group by id") == [("java", 300)]


async def test_codec_that_is_missing_is_refused_at_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "cramjam", None)
    with pytest.raises(Misconfigured, match="pip install cramjam"):
        await KafkaConsumer(place.settings(), None).start(1)


def test_limit_of_decompressed_bytes_that_is_no_number_is_refused(tmp_path: Path) -> None:
    is_one_line(
        consumer(tmp_path, "status", "a:b", CONSUMER_KAFKA_BATCH_DECOMPRESSED_BYTES_MAX="much"),
        "CONSUMER_KAFKA_BATCH_DECOMPRESSED_BYTES_MAX",
    )
