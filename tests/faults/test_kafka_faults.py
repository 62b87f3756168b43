"""Requests to Kafka are cut, brokers say nothing, offsets disappear."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import DeleteGroupsRequest
from harness import Place, Sent, counts, drained, query, until, value, working
from payments_app import payments_app
from proxy import FETCH, HEARTBEAT, JOIN_GROUP, OFFSET_COMMIT, PRODUCE, SYNC_GROUP, Cut, Proxy

from consumer import App, Settings, Tx
from consumer.admin import produce
from consumer.admin.produce import Line, Producing, Request
from consumer.core.errors import CannotTell
from consumer.core.message import Partition
from consumer.kafka import producer
from consumer.kafka.admin import group_offsets
from consumer.kafka.protocol import FetchById
from consumer.worker.health import Stalled
from consumer.worker.worker import Worker


def payments(first: int, count: int = 200) -> list[Sent]:
    return [
        Sent({"id": f"p{n}", "account": 1, "amount": 1}, id=f"p{n}", key=str(n % 20), partition=n % 4)
        for n in range(first, first + count)
    ]


def through(place: Place, kafka: Any, **options: Any) -> Settings:
    servers = f"127.0.0.1:{kafka.proxy}"
    return place.settings(
        kafka_bootstrap_servers=servers, kafka_session_timeout_seconds=3, batch_messages_max=50, **options
    )


async def applied(place: Place, count: int) -> None:
    async def there() -> bool:
        return int(await value(place.dsn, "select count(distinct id) from effects")) >= count

    await until(f"{count} messages", there, 60)


async def has_fired(proxy: Proxy, label: int, cut: Cut) -> None:
    async def fired() -> bool:
        return proxy.fired[label, cut] > 0

    await until(f"the cut {cut} request {label}", fired)


async def test_requests_cut_before_during_and_after_they_were_done(place: Place, kafka: Any) -> None:
    """Each cut happens while messages flow and members change."""
    topic = await place.topic(4)
    name = f"cut-{uuid.uuid4().hex[:8]}"
    sent = 0
    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy:
        settings = through(place, kafka)
        async with working(payments_app(topic, name=name, balances=False), settings):
            cuts: list[Cut] = ["before", "after", "during"]
            for cut in cuts:
                for label in (FETCH, OFFSET_COMMIT, HEARTBEAT):
                    proxy.on(label, cut)
                    await place.send(topic, *payments(sent))
                    sent += 200
                    await applied(place, sent)
                    await has_fired(proxy, label, cut)
                for label in (JOIN_GROUP, SYNC_GROUP):
                    proxy.on(label, cut)
                async with working(payments_app(topic, name=name, balances=False), settings):
                    await place.send(topic, *payments(sent))
                    sent += 200
                    await applied(place, sent)
                    await has_fired(proxy, JOIN_GROUP, cut)
                    await has_fired(proxy, SYNC_GROUP, cut)
            # No commit comes through any more: Kafka's copy stays behind, and a new owner begins where PostgreSQL is.
            proxy.on(OFFSET_COMMIT, "before", times=None)
            await place.send(topic, *payments(sent))
            sent += 200
            await applied(place, sent)
            async with working(payments_app(topic, name=name, balances=False), settings):
                await place.send(topic, *payments(sent))
                sent += 200
                await applied(place, sent)
            proxy.off()
        await drained(payments_app(topic, name=name, balances=False), place.settings())
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(sent, sent)]
    assert await value(place.dsn, "select sum(next_offset)::int8 from consumer.positions") == sent


async def test_messages_that_kafka_never_gets_are_given_up(
    place: Place, kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(produce, "ACKNOWLEDGED_SECONDS_MIN", 0.5)
    monkeypatch.setattr(producer, "STOP_SECONDS", 0.5)
    topic = await place.topic()
    app = App("waiting", publishes=[topic])
    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy:
        request = Request(topic=topic, lines=[Line(None, b"1")])
        producing = Producing(app, [], request, through(place, kafka, wait_seconds=3))
        messages = await producing.prepare(lambda *_: None)
        proxy.on(PRODUCE, "before", times=None)
        with pytest.raises(CannotTell, match=r"within 3 s; 0 of 1 .*, and 1 more may have been sent"):
            await producing.send(messages, lambda _: None, lambda *_: None)
        assert proxy.fired[PRODUCE, "before"]


async def test_a_produce_whose_answer_was_lost_is_sent_again_and_counts_once(place: Place, kafka: Any) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy:
        proxy.on(PRODUCE, "after", times=2)
        producer = AIOKafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.proxy}", acks="all", enable_idempotence=False)
        await producer.start()
        try:
            for sent in payments(0, 5):
                await producer.send_and_wait(topic, sent.value, partition=0, headers=sent.headers)
        finally:
            await producer.stop()
        assert proxy.fired[PRODUCE, "after"] == 2
    async with working(app, place.settings()):
        await drained(app, place.settings())
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(5, 5)]
    assert sum((await counts(app, place.dsn))["settle"]["duplicates"].values()) == 2


async def test_a_broker_that_says_nothing_holds_up_no_end_and_is_waited_for(place: Place, kafka: Any) -> None:
    topic = await place.topic(4)
    app = payments_app(topic, balances=False)
    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy, AsyncExitStack() as stack:
        settings = through(place, kafka).model_copy(update={"grace_seconds": 5.0})
        await stack.enter_async_context(working(app, settings))
        await place.send(topic, *payments(0))
        await applied(place, 200)
        proxy.black_hole()
        await place.send(topic, *payments(200))
        proxy.reset()

        async def again() -> bool:
            return proxy.connections > 0

        await until("new connections, that meet the same silence", again)
        proxy.heal()
        await applied(place, 400)
        proxy.black_hole()
        await place.send(topic, *payments(400))
        await asyncio.wait_for(stack.aclose(), 60)  # stop() of the client waits for answers that do not come
        proxy.heal()
    async with working(app, place.settings()):
        await drained(app, place.settings())
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(600, 600)]


async def test_committed_offsets_that_are_gone_lose_and_repeat_nothing(place: Place, caplog: Any) -> None:
    """Expired, or deleted with Kafka's tool: the positions are in PostgreSQL."""
    topic = await place.topic(4)
    app = payments_app(topic, balances=False)
    async with working(app, place.settings()):
        await place.send(topic, *payments(0))
        await drained(app, place.settings())
    assert await group_offsets(place.settings(), app.name)
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        node = await admin.find_coordinator(app.name)
        await admin._send_request_to_node(node, DeleteGroupsRequest([app.name]))
    finally:
        await admin.close()
    assert await group_offsets(place.settings(), app.name) == {}
    await place.send(topic, *payments(200))
    with caplog.at_level("INFO", logger="consumer"):
        async with working(app, place.settings()):
            await drained(app, place.settings())
    counted = (await counts(app, place.dsn))["settle"]
    assert (counted["applied"], sum(counted["duplicates"].values())) == (400, 0)  # it was not even read again
    assert (await group_offsets(place.settings(), app.name))[Partition(topic, 0)] == 100


async def test_compacted_topic_with_tombstones_ends_as_its_last_values(place: Place) -> None:
    await query(place.dsn, "create table latest (key text primary key, value int)")
    topic = await place.topic(
        1,
        **{
            "cleanup.policy": "compact",
            "segment.ms": "50",
            "min.cleanable.dirty.ratio": "0.01",
            "max.compaction.lag.ms": "100",
            "delete.retention.ms": "60000",
        },
    )
    app = App(f"compacted-{uuid.uuid4().hex[:8]}")
    upsert = "insert into latest values ($1, $2) on conflict (key) do update set value = excluded.value"

    @app.handler(topic)
    async def keep(update: dict[str, Any] | None, tx: Tx) -> None:
        if update is None:
            await tx.execute("update latest set value = -1 where value >= 0 and key = 'k0'")
        else:
            await tx.execute(upsert, update["key"], update["n"])

    async with working(app, place.settings(batch_messages_max=20)):
        for n in range(15):
            updates = [Sent({"key": f"k{key}", "n": n}, id=f"{key}-{n}", key=f"k{key}") for key in range(10)]
            await place.send(topic, *updates, Sent(None, id=f"gone-{n}", key="k0"))
        await drained(app, place.settings())
    expected = {"k0": -1, **{f"k{key}": 14 for key in range(1, 10)}}
    assert dict(await query(place.dsn, "select key, value from latest")) == expected
    assert await value(place.dsn, "select count(*) from consumer.dead_letters") == 0


async def test_error_that_the_client_only_logs_ends_the_worker(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client retries an unknown error for ever; the watchdog ends it."""
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    await place.send(topic, *[Sent({"id": f"p{n}", "account": 1, "amount": 1}, id=f"p{n}") for n in range(5)])
    send = AIOKafkaClient.send
    with monkeypatch.context() as broken:

        async def with_error(self: AIOKafkaClient, node: int, request: Any, **options: Any) -> Any:
            answer = await send(self, node, request, **options)
            if isinstance(request, FetchById):
                answer.topics = [
                    (id, [(number, 56, *rest[1:]) for number, *rest in partitions], tags)
                    for id, partitions, tags in answer.topics
                ]
            return answer

        broken.setattr(AIOKafkaClient, "send", with_error)
        with pytest.raises(Stalled):
            await asyncio.wait_for(Worker(app, place.settings(watchdog_seconds=1)).run(), 60)
    async with working(app, place.settings()):
        await drained(app, place.settings())
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(5, 5)]
