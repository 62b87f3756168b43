"""Faults of Kafka and of the database under a relay.

Lost answers, an outage, a revoked right, revoked partitions, a database that goes back in time.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from harness import Place, Sent, drained, query, until, value, working
from outgoing import all_published, check_published, ids, name, publish_all, records_of, resume, stopped_reason, values
from proxy import PRODUCE, Proxy
from publishing_worker import app_of
from worker_log import WorkerLog

from consumer import App, Message, Tx
from consumer.core.message import Partition
from consumer.kafka.batch_producer import BatchProducer
from consumer.outbox.send_queues import SendQueues
from consumer.worker.worker import Worker


def messages(start: int, count: int = 40) -> list[Sent]:
    return [Sent({"n": n}, id=f"id-{n}", key=str(n % 7)) for n in range(start, start + count)]


def numbers(records: list[Any]) -> list[int]:
    return sorted(record["n"] for record in values(records))


async def test_lost_answers_and_an_outage_lose_and_reorder_nothing(
    place: Place, kafka: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost acknowledgements, then no produce request, then no connection."""
    caplog.set_level("INFO")
    topic, out = await place.topic(), await place.topic(partitions=2)
    app = app_of(topic, out, name())
    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy:
        settings = place.settings(kafka_bootstrap_servers=f"127.0.0.1:{kafka.proxy}", batch_messages_max=10)
        async with working(app, settings):
            proxy.on(PRODUCE, "after", times=3)
            await place.send(topic, *messages(0))

            async def cut() -> bool:
                return proxy.fired[PRODUCE, "after"] == 3

            await until("three answers to be lost", cut, 60)
            await drained(app, place.settings(), 60)
            await all_published(place)

            proxy.on(PRODUCE, "before", times=None)  # no record comes through, and all else does
            await place.send(topic, *messages(40))
            await drained(app, place.settings(), 60)
            assert await value(place.dsn, "select bool_or(p.next_seq < s.next_seq) from consumer.outbox_published p join consumer.outbox_streams s using (stream)")  # fmt: skip
            proxy.refuse()
            proxy.reset()
            worker_log = WorkerLog(caplog)

            async def waits() -> bool:
                return bool(worker_log.events("the outbox waits for kafka"))

            await until("the relay to notice", waits, 60)
            proxy.off()
            await proxy.accept()
            await place.send(topic, *messages(80))
            await drained(app, place.settings(), 90)
            await all_published(place)
    assert numbers(await check_published(place, out)) == list(range(120))


async def test_fault_of_the_sender_ends_its_worker_and_the_next_one_publishes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that goes on would keep its rows in flight."""
    topic, out = await place.topic(), await place.topic()
    app = app_of(topic, out, name())
    acknowledged = SendQueues.acknowledged

    def failing(self: SendQueues, partition: Partition) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(SendQueues, "acknowledged", failing)
    await place.send(topic, *messages(0))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(Worker(app, place.settings()).run(), 60)
    monkeypatch.setattr(SendQueues, "acknowledged", acknowledged)
    async with working(app, place.settings()):
        await drained(app, place.settings(), 60)
        await all_published(place)
    assert numbers(await check_published(place, out)) == list(range(40))


async def test_records_in_flight_at_a_revocation_only_repeat(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next owner repeats them; late answers change nothing."""
    topic, out = await place.topic(partitions=2), await place.topic()
    app = app_of(topic, out, name())
    settings = place.settings(batch_messages_max=10)
    send, answers, held = BatchProducer.send, asyncio.Event(), 0

    async def sending(self: BatchProducer, partition: Partition, rows: Any) -> None:
        nonlocal held
        await send(self, partition, rows)
        if not answers.is_set():
            held += 1
            await answers.wait()

    monkeypatch.setattr(BatchProducer, "send", sending)
    first, second = Worker(app, settings), Worker(app, settings)
    tasks = [asyncio.create_task(first.run())]
    try:
        await place.send(topic, *messages(0))

        async def in_flight() -> bool:
            return held > 0

        await until("records in flight", in_flight)
        monkeypatch.setattr(BatchProducer, "send", send)
        tasks.append(asyncio.create_task(second.run()))

        async def moved() -> bool:
            return bool(second.partitions.table.partitions())

        await until("a partition to move", moved, 60)
        await place.send(topic, *messages(40))
        await drained(app, settings, 60)
        answers.set()
        await all_published(place)
    finally:
        for worker in (first, second):
            worker.stop()
        await asyncio.gather(*tasks)
    assert numbers(await check_published(place, out)) == list(range(80))


async def test_a_right_that_is_revoked_stops_its_stream_and_nothing_else(place: Place, kafka: Any) -> None:
    topic, out, other = await place.topic(), await place.topic(), await place.topic()
    app = App(name(), publishes=[out, other])

    @app.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, entry, key="k")
        tx.publish(other, entry, key="k")

    sasl = {"kafka_security_protocol": "SASL_PLAINTEXT"}
    settings = place.settings(
        kafka_bootstrap_servers=kafka.sasl_servers, kafka_sasl_username="dave", kafka_sasl_password="listed", **sasl
    )
    dave = ["--allow-principal", "User:dave", "--operation", "All"]
    write = [*dave, "--topic", out]
    await asyncio.to_thread(kafka.acls, ["--add", *write, "--topic", topic, "--topic", other, "--group", app.name])
    async with working(app, settings):
        await place.send(topic, *messages(0, 5))
        await drained(app, place.settings(), 60)
        await all_published(place)
        await asyncio.to_thread(kafka.acls, ["--remove", "--force", *write])
        await place.send(topic, *messages(5, 5))
        assert "Authorization" in await stopped_reason(place, out)
        await all_published(place, other)
        assert len(await records_of(place.kafka, out)) == 5
        await asyncio.to_thread(kafka.acls, ["--add", *write])
        [(number,)] = await query(place.dsn, "select stream from consumer.outbox_streams where topic = $1", out)
        await resume(place, app, number, "the right is back")
        await all_published(place)
    for topic_of_both in (out, other):
        assert [entry["n"] for entry in values(await records_of(place.kafka, topic_of_both))] == list(range(10))


_BACK = """
delete from effects; delete from consumer.ledger; update consumer.positions set next_offset = 0;
truncate consumer.outbox; update consumer.outbox_streams set next_seq = 0; update consumer.outbox_published set next_seq = 0;
update consumer.installation set nonce = gen_random_uuid();
"""


async def test_a_database_put_back_in_time_publishes_the_same_ids_again(place: Place) -> None:
    """An App that reads the topic applies each record once."""
    topic, out = await place.topic(), await place.topic(partitions=2)
    first, following = App(name(), publishes=[out]), App(name())

    @first.handler(topic)
    async def forward(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.publish(out, message.value, key=message.key)

    @following.handler(out)
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", str(entry["n"]))

    settings = place.settings(batch_messages_max=10)
    async with working(first, settings):
        await place.send(topic, *messages(0))
        await drained(first, settings)
        await all_published(place)
        connection = await asyncpg.connect(place.dsn)
        try:
            await connection.execute(f"begin; {_BACK} commit")
        finally:
            await connection.close()
        await place.send(topic, *messages(40))

        async def published() -> bool:
            return len(await records_of(place.kafka, out)) >= 120

        await until("everything to be published again", published, 60)
        await drained(first, settings)
        await all_published(place)
    records = await records_of(place.kafka, out)
    assert len(set(ids(records))) == 80
    assert numbers(await check_published(place, out)) == list(range(80))
    await publish_all(following, place)
    assert sorted(int(row[0]) for row in await place.effects()) == list(range(80))


async def test_generations_turn_and_drop_under_load(place: Place) -> None:
    topic, out = await place.topic(partitions=2), await place.topic()
    app = app_of(topic, out, name())
    settings = place.settings(batch_messages_max=20)
    dropped = 0
    await place.send(topic, *[Sent({"n": n}, id=str(n), key=str(n % 7), partition=n % 2) for n in range(2000)])
    async with working(app, settings):

        async def settled() -> bool:
            nonlocal dropped
            await value(place.dsn, "select consumer.turn_outbox(0, 1)")
            dropped += (await value(place.dsn, "select consumer.drop_outbox(0)")) == "dropped"
            return int(await value(place.dsn, "select count(*) from effects")) == 2000

        await until("all messages", settled, 90)
        await all_published(place)
        while (await value(place.dsn, "select consumer.drop_outbox(0)")) == "dropped":
            dropped += 1
    assert dropped > 0
    records = await records_of(place.kafka, out)
    first = {ids([record])[0]: json.loads(record.value)["n"] for record in reversed(records)}
    assert sorted(first.values()) == list(range(2000))
    by_key: dict[tuple[int, int], list[int]] = {}
    for n in dict.fromkeys(json.loads(record.value)["n"] for record in records):
        by_key.setdefault((n % 2, n % 7), []).append(n)
    assert all(order == sorted(order) for order in by_key.values())
