"""A log that was recreated or cut stops until an operator decides."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.records_to_delete import RecordsToDelete
from app_commands import PATH, command, run_as_printed, stopped_partitions
from harness import (
    Place,
    buffered,
    consume_all,
    counts,
    delete_topic,
    drained,
    is_one_line,
    new_topic,
    query,
    until,
    working,
)
from payments_app import INSERT, Payment, lone_payment, payments_app
from stored_state import effect_ids, positions
from worker_log import WorkerLog

from consumer import App, Retry, Tx
from consumer.core.delivery import PositionUpdate
from consumer.core.log_identity import Position
from consumer.core.message import Partition
from consumer.kafka.admin import group_offsets
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_inspection import LogInspection
from consumer.kafka.protocol import Identity
from consumer.postgres.errors import Fenced
from consumer.postgres.session import Session


def gated_app(topic: str, gate: asyncio.Event) -> App:
    """Its handler waits for the gate."""
    app = App(f"logs-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        await gate.wait()
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    return app


async def recreate_topic(place: Place, topic: str, partitions: int) -> None:
    await delete_topic(place.kafka, topic)
    await new_topic(place.kafka, partitions, topic)


async def remove_records(place: Place, topic: str, partition: int, before: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before)})
    finally:
        await admin.close()


async def topic_id(place: Place, topic: str) -> str:
    source = KafkaConsumer(place.settings(), None)
    await source.start(10)
    try:
        return str((await source.log.identity([topic])).topics[topic])
    finally:
        await source.stop(5)


# -- a recreated topic -------------------------------------------------------------------------------------------------


async def test_topic_recreated_under_a_running_worker_stops_before_it_is_read(
    place: Place, worker_log: WorkerLog
) -> None:
    topic, other = sorted([await new_topic(place.kafka, 2, f"a-{uuid.uuid4().hex}"), await place.topic()])
    app = payments_app(topic, other, balances=False)
    old = await topic_id(place, topic)
    async with working(app, place.settings(), path=PATH) as worker:
        await place.send(topic, *[lone_payment(f"old{n}", n % 2) for n in range(10)])
        await drained(app, place.settings())
        before = await positions(place, app)
        await recreate_topic(place, topic, 2)
        # As many as before and more, so that the old offsets exist; some of them were applied, in the old topic.
        await place.send(
            topic,
            *[lone_payment(f"new{n}", n % 2) for n in range(20)],
            lone_payment("old3", 0),
            lone_payment("old4", 1),
        )
        await worker.source.consumer._client.force_metadata_update()  # which comes by itself within 10 s
        events = await worker_log.wait("partition stopped", 2)
        await place.send(other, lone_payment("elsewhere"))

        async def others_go_on() -> bool:
            return "elsewhere" in await effect_ids(place)

        await until("the other topic to go on", others_go_on)
        new = await topic_id(place, topic)
        for event in events:
            assert event["reason"] == "other_topic"
            assert topic in event["why"] and old in event["why"] and new in event["why"]
        assert await positions(place, app) == before == {0: 5, 1: 5}
        assert not [id for id in await effect_ids(place) if id.startswith("new")]
        kafkas = await group_offsets(place.settings(), app.name)
        assert all(kafkas.get(Partition(topic, n), 5) == 5 for n in range(2))

        refused = await command(
            place, app, "positions", PATH, "--topic", topic, "--partition", "0", "--move-to", "earliest"
        )
        assert refused.returncode == 2 and "--adopt" in refused.stderr
        assert (await stopped_partitions(place, app)).keys() == {0, 1}
        tried = "insert into consumer.attempts select handler, $1, n, 7, 2, now() from consumer.handlers, generate_series(0, 1) n"
        await query(place.dsn, tried, topic)
        done = await run_as_printed(place, app, events[0]["do"])  # of one partition
        assert done.returncode == 0, done.stderr
        assert len(await stopped_partitions(place, app)) == 1
        done = await command(place, app, "positions", PATH, "--topic", topic, "--adopt")  # of those that are left
        assert done.returncode == 0, done.stderr
        # Attempts of the old log are not of the messages that have its offsets now.
        assert await query(place.dsn, "select from consumer.attempts where topic = $1", topic) == []
        await drained(app, place.settings())
    assert sorted(await effect_ids(place)) == sorted(
        ["elsewhere", *(f"old{n}" for n in range(10)), *(f"new{n}" for n in range(20))]
    )
    assert sum((await counts(app, place.dsn))["settle"]["duplicates"].values()) == 2
    again = await command(place, app, "positions", PATH, "--topic", topic, "--adopt")
    assert again.returncode == 1 and "nothing to adopt" in again.stderr
    for wrong in (["--adopt"], ["--topic", topic, "--partition", "9", "--adopt"]):
        is_one_line(await command(place, app, "positions", PATH, *wrong))


async def test_attempts_of_a_vanished_log_do_not_count_against_the_adopted_one(
    place: Place, worker_log: WorkerLog
) -> None:
    topic = await new_topic(place.kafka, 1, f"a-{uuid.uuid4().hex}")
    app = App(f"logs-{uuid.uuid4().hex[:8]}")
    failures = {"old": 1000, "new": 2}  # at offset 0 of each log

    @app.handler(topic, name="settle", retry=Retry(attempts=4, base=1, cap=4))
    async def settle(payment: Payment, tx: Tx) -> None:
        if failures.get(payment.id, 0) > 0:
            failures[payment.id] -= 1
            raise RuntimeError("not yet")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    async def tried() -> bool:
        return bool(await query(place.dsn, "select from consumer.attempts where attempts >= 2"))

    async with working(app, place.settings()):
        await place.send(topic, lone_payment("old"), *[lone_payment(f"good{n}") for n in range(5)])
        await until("two attempts", tried)
    await recreate_topic(place, topic, 1)
    await place.send(topic, lone_payment("new"), *[lone_payment(f"better{n}") for n in range(5)])
    async with working(app, place.settings(), path=PATH):
        [stop] = await worker_log.wait("partition stopped")
        assert (await run_as_printed(place, app, stop["do"])).returncode == 0
        await drained(app, place.settings())
    assert failures["new"] == 0
    assert await place.reasons() == []
    assert set(await effect_ids(place)) >= {"new", *(f"better{n}" for n in range(5))}


async def test_a_fetch_is_of_the_topic_with_the_id_and_of_no_other(place: Place) -> None:
    """The broker refuses the fetch itself, with any metadata of the client."""
    topic = await place.topic()
    await place.send(topic, lone_payment("a"))
    partition = Partition(topic, 0)
    source = KafkaConsumer(place.settings(), None)
    await source.start(10)
    refused = asyncio.Event()
    source.on_refused = lambda _: refused.set()
    try:
        own_id = (await source.log.identity([topic])).topics[topic]
        source.assign([partition])
        source.pause_until_positioned(partition)
        source.seek_and_resume(partition, 0, own_id)
        assert [record.offset for record in (await source.poll(10, lambda _: None))[partition]] == [0]
        source.pause_until_positioned(partition)
        source.seek_and_resume(partition, 0, uuid.uuid4())
        assert await source.poll(1, lambda _: None) == {}
        await asyncio.wait_for(refused.wait(), 10)
    finally:
        await source.stop(5)


async def test_recreated_topic_with_messages_without_ids_is_applied_once_adopted(
    place: Place, worker_log: WorkerLog
) -> None:
    """Equal offsets and payloads are other messages in another log."""
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    same = [lone_payment(f"p{n}", id=None) for n in range(6)]
    await place.send(topic, *same)
    await consume_all(app, place.settings())
    await recreate_topic(place, topic, 1)
    await place.send(topic, *same, *same)
    async with working(app, place.settings(), path=PATH):
        [stop] = await worker_log.wait("partition stopped")
        replayed = await command(place, app, "replay", PATH, topic)
        assert replayed.returncode == 2 and "recreated" in replayed.stderr
        assert len(await effect_ids(place)) == 6
        assert (await run_as_printed(place, app, stop["do"])).returncode == 0
        await drained(app, place.settings())
    assert len(await effect_ids(place)) == 18
    await query(place.dsn, "update consumer.positions set next_offset = 0")
    await consume_all(app, place.settings())  # and again: within the new log they are recognized
    assert len(await effect_ids(place)) == 18


async def test_worker_that_missed_an_adoption_cannot_move_the_new_position(place: Place) -> None:
    """The offset is the same in both logs; the topic id differs."""
    old, new = uuid.uuid4(), uuid.uuid4()
    partition = Partition(await place.topic(), 0)
    session = await Session.open(place.settings())
    try:
        await session.begin_positions("app", {partition: Position(0, "cluster", new)})
        with pytest.raises(Fenced):
            await session.write_positions("app", [PositionUpdate(partition, 0, 100, old)], {})
        assert (await session.positions("app", [partition]))[partition].offset == 0
        await session.write_positions("app", [PositionUpdate(partition, 0, 100, new)], {})
        assert (await session.positions("app", [partition]))[partition].offset == 100
    finally:
        session.close()


async def test_recreated_topic_without_topic_ids_is_noticed_by_its_last_record(
    place: Place, worker_log: WorkerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> Identity:
        return Identity(None, {})

    topic = await place.topic()
    app = payments_app(topic, balances=False)
    with monkeypatch.context() as old_broker:
        old_broker.setattr(LogInspection, "identity", nothing)
        await place.send(topic, *[lone_payment(f"p{n}") for n in range(5)])
        await consume_all(app, place.settings())
        await consume_all(app, place.settings())  # the same log raises no alarm
        assert not worker_log.events("partition stopped")
        await recreate_topic(place, topic, 1)
        await place.send(topic, *[lone_payment(f"q{n}") for n in range(9)])
        async with working(app, place.settings(), path=PATH):
            [stop] = await worker_log.wait("partition stopped")
    assert stop["reason"] == "other_record"
    assert await effect_ids(place) == [f"p{n}" for n in range(5)]


# -- records that are gone ----------------------------------------------------------------------------------------------


async def test_records_removed_before_they_were_read_stop_their_partition_alone(
    place: Place, worker_log: WorkerLog
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    await place.send(topic, *[lone_payment(f"p{n}", n % 2) for n in range(20)])
    await consume_all(app, place.settings())
    await place.send(topic, *[lone_payment(f"q{n}", n % 2) for n in range(20)])
    await remove_records(place, topic, 0, 17)  # q0 to q12 of partition 0, at 10 to 16
    async with working(app, place.settings(), path=PATH):
        [stop] = await worker_log.wait("partition stopped")
        assert (stop["reason"], stop["partition"]) == ("records_removed", 0)
        assert "10 to 16" in stop["why"]

        async def the_other_partition() -> bool:
            return {f"q{n}" for n in range(1, 20, 2)} <= set(await effect_ids(place))

        await until("the other partition", the_other_partition)
        by_status = (await stopped_partitions(place, app))[0]
        assert by_status["missing"] == {"first": 10, "last": 16}
        assert by_status["do"] == stop["do"]
        text = (await command(place, app, "status", PATH)).stdout
        assert f"{topic}:0 has stopped" in text and "10 to 16" in text and stop["do"] in text
        assert await positions(place, app) == {0: 10, 1: 20}
        assert (await run_as_printed(place, app, stop["do"])).returncode == 0
        await drained(app, place.settings())
    assert {id for id in await effect_ids(place) if id.startswith("q")} == {
        *(f"q{n}" for n in range(1, 20, 2)), "q14", "q16", "q18"
    }  # fmt: skip
    assert await stopped_partitions(place, app) == {}


async def test_records_removed_ahead_of_a_worker_stop_after_what_it_has_read(
    place: Place, worker_log: WorkerLog
) -> None:
    topic = await place.topic(2)
    gate = asyncio.Event()
    app = gated_app(topic, gate)
    await place.send(topic, *[lone_payment(f"p{n:04}") for n in range(3000)])
    settings = place.settings(buffer_messages_max=100, batch_messages_max=50, kafka_partition_fetch_bytes_max=1000)
    async with working(app, settings, path=PATH) as worker:

        async def full() -> bool:
            return buffered(worker)[0] >= 50 and worker.partitions.table.waits_for_room

        await until("a full buffer", full)
        await remove_records(place, topic, 0, 2900)
        gate.set()
        [stop] = await worker_log.wait("partition stopped")
        await place.send(topic, lone_payment("other", 1))

        async def settled() -> bool:
            return "other" in await effect_ids(place) and not buffered(worker)[0]

        await until("what was read", settled)
        done = [id for id in await effect_ids(place) if id != "other"]
        first = len(done)
        assert 50 <= first < 2900
        assert done == [f"p{n:04}" for n in range(first)]  # up to the hole, without one of its own
        assert f"{first} to 2899" in stop["why"]
        assert (await stopped_partitions(place, app))[0]["missing"] == {"first": first, "last": 2899}
        assert (await run_as_printed(place, app, stop["do"])).returncode == 0
        await drained(app, settings)
    assert (await effect_ids(place))[-100:] == [f"p{n}" for n in range(2900, 3000)]


# -- what else a log may do ---------------------------------------------------------------------------------------------


async def test_hanging_transaction_is_reported_and_its_abort_releases_it(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        async with working(app, place.settings(kafka_transaction_warning_seconds=0.6), path=PATH):
            await place.send(topic, lone_payment("before"))
            await drained(app, place.settings())
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"ghost", partition=0)
            await place.send(topic, lone_payment("behind"), lone_payment("beside", 1))
            [transaction] = await worker_log.wait("open transaction holds")
            assert (transaction["partition"], transaction["offset"]) == (0, 1)
            status = json.loads((await command(place, app, "status", PATH, "--json")).stdout)
            held = {row["partition"]: row["open_transaction"] for row in status["partitions"]}
            assert held == {0: {"offset": 1, "since": transaction["since"]}, 1: None}

            async def beside() -> bool:
                return await effect_ids(place) == ["before", "beside"]

            await until("the other partition", beside)
            await producer.abort_transaction()
            await drained(app, place.settings())
            await worker_log.wait("the open transaction has ended")
    finally:
        await producer.stop()
    assert await effect_ids(place) == ["before", "behind", "beside"]


async def test_partitions_added_under_a_running_worker_begin_at_their_beginning(
    place: Place, worker_log: WorkerLog
) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    async with working(app, place.settings()) as worker:
        await place.send(topic, lone_payment("a"), lone_payment("b"))
        await drained(app, place.settings())
        admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
        await admin.start()
        try:
            await admin.create_partitions({topic: NewPartitions(total_count=3)})
        finally:
            await admin.close()
        await place.send(
            topic, *[lone_payment(f"p{n}", n % 3) for n in range(9)], lone_payment("b", 2)
        )  # once more, elsewhere
        await worker.source.consumer._client.force_metadata_update()  # which comes by itself within 10 s
        await drained(app, place.settings())
    assert await effect_ids(place) == ["a", "b", *(f"p{n}" for n in range(9))]
    assert sum((await counts(app, place.dsn))["settle"]["duplicates"].values()) == 1
