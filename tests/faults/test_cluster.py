"""Three brokers, some of which die: workers go on by themselves."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import harness
import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from cluster import Cluster
from harness import Place, drained, migrated, query, settings_for, until, value, working
from payments_app import Payment, payments_app
from worker_log import WorkerLog

from consumer import App, Settings
from consumer.admin.positions import adopt_log
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.local_servers import free_port


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(3) as servers:
        yield servers


@asynccontextmanager
async def admin_of(cluster: Cluster) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def described(cluster: Cluster, topic: str) -> list[dict[str, Any]]:
    """The partitions of a topic; none while the broker is down."""
    try:
        async with admin_of(cluster) as admin:
            [description] = await admin.describe_topics([topic])
    except KafkaError:
        return []
    return sorted(description["partitions"], key=lambda partition: partition["partition"])


async def replicated(cluster: Cluster, topic: str, replicas: int) -> None:
    partitions: list[dict[str, Any]] = []

    async def in_sync() -> bool:
        partitions[:] = await described(cluster, topic)
        return bool(partitions) and all(
            len(partition["isr"]) == replicas and partition["leader"] > 0 for partition in partitions
        )

    try:
        await until("all replicas to be in sync", in_sync, 120)
    except AssertionError as error:
        raise AssertionError(
            f"{error}; partitions: {partitions}; logs: {[str(node.directory) for node in cluster.nodes]}"
        ) from error


async def new_topic(cluster: Cluster, partitions: int, replicas: int = 3, **configs: str) -> str:
    topic = f"t-{uuid.uuid4().hex[:12]}"
    async with admin_of(cluster) as admin:
        await admin.create_topics([NewTopic(topic, partitions, replicas, topic_configs=configs)])
    await replicated(cluster, topic, replicas)
    return topic


async def produce(cluster: Cluster, topic: str, names: list[str], acks: Any = "all") -> None:
    """Send each name until it is acknowledged.

    After an error it is sent again, so some may be there twice, under one id.
    """
    producer = AIOKafkaProducer(bootstrap_servers=cluster.bootstrap_servers, acks=acks, request_timeout_ms=3000)
    await producer.start()

    async def send(name: str) -> None:
        body = msgspec.json.encode(Payment(name, int(name[1:]) % 50, 1))
        while True:
            try:
                headers = [("message-id", name.encode())]
                await producer.send_and_wait(topic, body, key=name.encode(), headers=headers)
                return
            except Exception:
                await asyncio.sleep(0.1)

    try:
        await asyncio.gather(*map(send, names))
    finally:
        await producer.stop()


async def test_lost_leader_lost_coordinator_and_lost_cluster_lose_nothing(cluster: Cluster, database: str) -> None:
    await migrated(database)
    topic = await new_topic(cluster, 6, 3, **{"min.insync.replicas": "2"})
    app = payments_app(topic)
    settings = settings_for(database, cluster.bootstrap_servers, batch_messages_max=100)
    sent = 0

    async def some_more(count: int = 600) -> asyncio.Task[None]:
        nonlocal sent
        names = [f"p{n}" for n in range(sent, sent + count)]
        sent += count
        return asyncio.create_task(produce(cluster, topic, names))

    async def all_applied() -> bool:
        return int(await value(database, "select count(*) from effects")) >= sent

    async with working(app, settings), working(payments_app(topic, name=app.name), settings):
        sending = await some_more()
        await until("the first messages", all_applied)
        await sending

        leader = (await described(cluster, topic))[0]["leader"]
        sending = await some_more()
        cluster.node(leader).kill()
        await until("all messages, without that broker", all_applied, 60)
        await sending
        cluster.node(leader).run()
        await asyncio.to_thread(cluster.node(leader).wait)
        await replicated(cluster, topic, 3)

        async with admin_of(cluster) as admin:
            coordinator = await admin.find_coordinator(app.name)
        sending = await some_more()
        cluster.node(coordinator).kill()
        await until("all messages, without the group's coordinator", all_applied, 60)
        await sending

        sending = await some_more(3000)

        async def in_the_middle() -> bool:
            return sent - 2900 <= int(await value(database, "select count(*) from effects"))

        await until("some of them", in_the_middle)
        for node in cluster.nodes:
            node.kill()
        cluster.run()
        await asyncio.to_thread(cluster.wait)
        await until("all messages, after all brokers were killed", all_applied, 60)
        await sending
        await drained(app, settings)
    assert await query(database, "select count(*), count(distinct id) from effects") == [(sent, sent)]
    assert await value(database, "select sum(balance) from accounts") == sent
    assert await value(database, "select count(*) from consumer.dead_letters") == 0


async def adopted(settings: Settings, app: App, partition: Partition) -> bool:
    source = KafkaConsumer(settings, None)
    await source.start(10)
    connection = await asyncpg.connect(settings.dsn)
    try:
        identity = await source.log.identity([partition.topic])
        first = (await source.log.beginnings([partition]))[partition]
        return await adopt_log(connection, source, app, partition, identity, first) is not None
    finally:
        await connection.close()
        await source.stop(5)


async def test_cluster_with_copied_records_is_noticed_and_adopted_once(
    place: Place, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    topic = await new_topic(cluster, 1)
    await harness.new_topic(place.kafka, 1, topic)  # the first cluster's, with the same messages at other offsets
    app = payments_app(topic)
    first = place.settings()
    await place.send(topic, *[harness.Sent({"id": f"p{n}", "account": 1, "amount": 1}, id=f"p{n}") for n in range(10)])
    async with working(app, first):
        await drained(app, first)
    await produce(cluster, topic, [f"p{n}" for n in range(5, 20)])
    second = settings_for(place.dsn, cluster.bootstrap_servers, place.redis_url)
    with caplog.at_level(logging.INFO, logger="consumer"):
        async with working(app, second):
            stop = (await WorkerLog(caplog).wait("partition stopped", seconds=60))[0]
            assert stop["reason"] == "other_cluster"
            assert await value(place.dsn, "select count(*) from effects") == 10
            assert await adopted(second, app, Partition(topic, 0))
            await drained(app, second)
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(20, 20)]


@pytest.mark.timeout(600)
async def test_brokers_replaced_one_by_one_are_followed_by_idle_and_busy_workers(
    cluster: Cluster, database: str
) -> None:
    await migrated(database)
    first = {node.port for node in cluster.nodes}
    busy_topic, idle_topic = [await new_topic(cluster, 3, 3, **{"min.insync.replicas": "2"}) for _ in range(2)]
    busy, idle = payments_app(busy_topic), payments_app(idle_topic)
    settings = settings_for(database, cluster.bootstrap_servers)  # the first addresses, and no others
    sent = 10

    async def all_applied() -> bool:
        return int(await value(database, "select count(distinct id) from effects")) == sent

    async with working(busy, settings) as busy_worker, working(idle, settings) as idle_worker:
        await produce(cluster, idle_topic, [f"i{n}" for n in range(10)])
        await until("the first messages", all_applied, 60)
        for node in cluster.nodes:
            sending = asyncio.create_task(produce(cluster, busy_topic, [f"p{n}" for n in range(sent, sent + 300)]))
            sent += 300
            node.kill()
            node.port = free_port()
            node.configure()
            node.run()
            await asyncio.to_thread(node.wait)
            await sending
            await replicated(cluster, busy_topic, 3)
            await replicated(cluster, idle_topic, 3)
            await until("the busy worker", all_applied, 90)

            async def is_known(number: int = node.number, port: int = node.port) -> bool:
                clients = [worker.source.consumer._client for worker in (busy_worker, idle_worker)]
                known = [client.cluster.broker_metadata(number) for client in clients]
                return all(broker is not None and broker.port == port for broker in known)

            await until("the new address to be known", is_known, 60)
        assert not first & {node.port for node in cluster.nodes}
        for topic, letter in ((idle_topic, "i"), (busy_topic, "p")):
            sent += 100
            await produce(cluster, topic, [f"{letter}{n}" for n in range(sent, sent + 100)])
            await until("both workers", all_applied, 90)
        now = settings_for(database, cluster.bootstrap_servers)
        await drained(busy, now)
        await drained(idle, now)
    assert await query(database, "select count(*), count(distinct id) from effects") == [(sent, sent)]
    assert await value(database, "select sum(balance) from accounts") == sent


async def test_a_log_whose_tail_was_lost_in_an_unclean_election_stops(  # the last one: a broker stays dead
    cluster: Cluster, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    await migrated(database)
    topic = await new_topic(cluster, 1, 2, **{"unclean.leader.election.enable": "true"})
    [partition] = await described(cluster, topic)
    leader = partition["leader"]
    [follower] = set(partition["replicas"]) - {leader}
    app = payments_app(topic)
    settings = settings_for(database, cluster.bootstrap_servers)
    await produce(cluster, topic, [f"p{n}" for n in range(10)])
    cluster.node(follower).kill()
    await produce(cluster, topic, [f"p{n}" for n in range(10, 30)], acks=1)
    async with working(app, settings):
        await drained(app, settings)
    cluster.node(leader).kill()
    cluster.node(follower).run()
    await asyncio.to_thread(cluster.node(follower).wait)

    async def led_by_the_other() -> bool:
        return [partition["leader"] for partition in await described(cluster, topic)] == [follower]

    await until("an unclean election", led_by_the_other, 40)
    await produce(cluster, topic, [f"q{n}" for n in range(30)], acks=1)  # other records at the same offsets
    with caplog.at_level(logging.INFO, logger="consumer"):
        async with working(app, settings):
            stop = (await WorkerLog(caplog).wait("partition stopped", seconds=60))[0]
    assert stop["reason"] == "other_record"
    assert stop["do"].endswith("--move-to earliest")
    assert await value(database, "select count(*) from effects") == 30
