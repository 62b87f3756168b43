"""Brokers that move, throttle, or lead a thousand partitions."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from cluster import Cluster
from harness import Place, Sent, consume_all, migrated, new_topic, produce, settings_for, until, value, working
from payments_app import payment, payments_app
from services import JARS
from worker_log import WorkerLog

from consumer import Settings
from consumer.admin.partitions import partition_health, partition_lags
from consumer.core.message import Partition
from consumer.kafka.brokers import Brokers
from consumer.kafka.client import client_id
from consumer.kafka.consumer import KafkaConsumer
from consumer.local_servers import free_port
from consumer.postgres.connection import connect


def payments(first: int, last: int) -> list[Sent]:
    return [payment(f"p{n}", key=f"p{n}") for n in range(first, last)]


async def effects(dsn: str, count: int, seconds: float = 90) -> None:
    async def there() -> bool:
        return int(await value(dsn, "select count(*) from effects")) == count

    await until(f"{count} effects", there, seconds)


@pytest.fixture
def lone_broker() -> Iterator[Cluster]:
    with Cluster(1) as cluster:
        yield cluster


async def test_broker_that_returns_on_another_address_is_found_when_idle(
    lone_broker: Cluster, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    await migrated(database)
    caplog.set_level("INFO")
    node, elsewhere, worker_log = lone_broker.nodes[0], free_port(), WorkerLog(caplog)
    topic = await new_topic(lone_broker.bootstrap_servers, 2)
    app = payments_app(topic, balances=False)
    settings = settings_for(database, f"{lone_broker.bootstrap_servers},127.0.0.1:{elsewhere}")

    async def has(text: str) -> bool:
        return bool(worker_log.events(text))

    async with working(app, settings):
        await produce(lone_broker.bootstrap_servers, topic, payments(0, 20))
        await effects(database, 20)
        node.kill()
        await until("the outage in the log", lambda: has("waiting for kafka"), 60)
        node.port = elsewhere
        node.configure()
        node.run()
        await asyncio.to_thread(node.wait)
        await until("its end in the log", lambda: has("kafka is back"), 60)
        await produce(lone_broker.bootstrap_servers, topic, payments(20, 60))
        await effects(database, 60)
        assert len(worker_log.events("waiting for kafka")) == 1
        assert worker_log.events("waiting for kafka")[0]["error"]


def recorded_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of requests that brokers are asked, from now on."""
    asked: list[str] = []
    ask = Brokers.ask

    async def recorded(self: Brokers, node: int, request: Any, *more: Any) -> Any:
        asked.append(type(request).__name__)
        return await ask(self, node, request, *more)

    monkeypatch.setattr(Brokers, "ask", recorded)
    return asked


async def test_status_of_a_thousand_topics_takes_one_request_for_each_question(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = uuid.uuid4().hex[:8]
    topics = [f"many-{prefix}-{n:04}" for n in range(1000)]
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka, request_timeout_ms=120_000)
    await admin.start()
    source = KafkaConsumer(place.settings(), None)
    connection = await connect(place.settings())
    try:
        for n in range(0, 1000, 200):
            await admin.create_topics([NewTopic(name, 1, 1) for name in topics[n : n + 200]])
        app = payments_app(*topics, balances=False)
        await source.start(30)
        asked = recorded_requests(monkeypatch)

        async def all_led() -> bool:
            return len(await source.log.ends([Partition(name, 0) for name in topics], partial=True)) == 1000

        await until("leaders", all_led, 60)
        asked.clear()

        lags, missing = await partition_lags(connection, source, app)
        partitions = [Partition(row["topic"], row["partition"]) for row in lags]
        health = await partition_health(connection, source, app, partitions)

        assert len(lags) == len(health) == 1000 and not missing
        assert all(row["lag"] == 0 for row in lags)
        assert len(asked) < 30, asked
    finally:
        connection.terminate()
        await source.stop(5)
        await admin.delete_topics(topics)
        await admin.close()


async def test_status_of_many_settled_partitions_asks_for_their_leaders_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await place.topic(60)
    app = payments_app(topic, balances=False)
    await place.send(
        topic, *[Sent({"id": f"p{n}", "account": 1, "amount": 1}, id=f"p{n}", partition=n) for n in range(60)]
    )
    await consume_all(app, place.settings())
    source = KafkaConsumer(place.settings(), None)
    connection = await connect(place.settings())
    try:
        await source.start(30)
        asked = recorded_requests(monkeypatch)
        partitions = [Partition(topic, n) for n in range(60)]

        health = await partition_health(connection, source, app, partitions)

        assert all(state.stop is None for state in health.values())
        assert asked.count("FetchRequest") == 60, asked  # the record that was settled last, of each
        assert len(asked) < 60 + 10, asked
    finally:
        connection.terminate()
        await source.stop(5)


def test_client_id_names_app_and_worker_unless_one_is_set() -> None:
    settings = Settings()
    assert client_id(settings) == "consumer"
    assert client_id(settings, "billing", "3") == "consumer-billing-3"
    assert client_id(settings, "größe/x y", "0") == "consumer-gr__e_x_y-0"
    assert client_id(Settings(kafka_client_id="team-a"), "billing", "3") == "team-a"


def quota(kafka: Any, client: str, *change: str) -> None:
    """What `kafka-configs.sh` does to the quotas of a client id."""
    command = [
        *("java", "-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"),
        *("kafka.admin.ConfigCommand", "--bootstrap-server", kafka.bootstrap_servers, "--alter", *change),
        *("--entity-type", "clients", "--entity-name", client),
    ]
    subprocess.run(command, check=True, capture_output=True)


async def test_throttled_worker_goes_on_and_recovers_when_the_quota_is_lifted(
    place: Place, kafka: Any, caplog: pytest.LogCaptureFixture
) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    worker_log = WorkerLog(caplog)
    settings = place.settings(kafka_client_id=f"slow-{uuid.uuid4().hex[:8]}")
    assert settings.kafka_client_id is not None
    filler = "x" * 1000
    for n in range(0, 300, 5):  # small batches: one that is larger than the quota's window never comes
        some = range(n, n + 5)
        await place.send(
            topic, *[Sent({"id": f"p{m}", "account": 1, "amount": 1, "f": filler}, id=f"p{m}") for m in some]
        )
    await asyncio.to_thread(quota, kafka, settings.kafka_client_id, "--add-config", "consumer_byte_rate=5000")

    async def some_applied() -> bool:
        return int(await value(place.dsn, "select count(*) from effects")) > 60

    async def is_logged() -> bool:
        return bool(worker_log.events("kafka throttles the worker"))

    async with working(app, settings):
        await until("the throttling in the log", is_logged, 60)
        await until("messages in spite of the quota", some_applied, 90)
        assert int(await value(place.dsn, "select count(*) from effects")) < 300
        assert not worker_log.events("waiting for kafka")
        await asyncio.to_thread(quota, kafka, settings.kafka_client_id, "--delete-config", "consumer_byte_rate")
        await effects(place.dsn, 300, 60)
