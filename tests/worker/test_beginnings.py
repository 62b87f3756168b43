"""Where a partition without a position starts.

Another database, another client's commit, strangers in the group, deleted topics.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import asyncpg
import confluent_kafka
from aiokafka import AIOKafkaConsumer, TopicPartition
from app_commands import PATH, command, status
from harness import Place, consume_all, delete_topic, drained, fetched, is_one_line, migrated, query, until, working
from payments_app import lone_payment, payments_app
from stored_state import effect_ids, positions
from worker_log import WorkerLog

from consumer import App
from consumer.kafka.admin import group_offsets
from consumer.local_servers import Postgres


async def recreated(place: Place, postgres: Postgres) -> Place:
    """The same Kafka and Redis beside an empty database."""
    name = f"test_{uuid4().hex[:12]}"
    await query_alone(postgres.dsn(), f"create database {name}")
    await migrated(postgres.dsn(name))
    return Place(place.kafka, postgres.dsn(name), place.redis_url)


async def query_alone(dsn: str, sql: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def kinds(answer: dict[str, Any]) -> list[str]:
    return [notice["kind"] for notice in answer["notices"]]


async def copied(place: Place, app: App, offsets: int) -> None:
    """Wait until Kafka has the positions."""

    async def there() -> bool:
        return sum((await group_offsets(place.settings(), app.name)).values()) == offsets

    await until("the positions to be copied to Kafka", there)


async def test_recreated_database_stops_partitions_until_a_person_decides(
    place: Place, postgres: Postgres, worker_log: WorkerLog
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    await place.send(topic, *[lone_payment(f"p{n}", n % 2) for n in range(20)])
    async with working(app, place.settings()):
        await drained(app, place.settings())
        await copied(place, app, 20)
    other = await recreated(place, postgres)
    await other.send(topic, *[lone_payment(f"q{n}", n % 2) for n in range(4)])
    async with working(app, other.settings(), path=PATH):
        stops = await worker_log.wait("partition stopped", 2)
        assert {stop["reason"] for stop in stops} == {"other_database"}
        assert all("committed 10" in stop["why"] and "--move-to committed" in stop["why"] for stop in stops)
        code, shown = await status(other, app)
        assert code == 1
        assert [row["stopped"]["reason"] for row in shown["partitions"]] == ["other_database"] * 2
        assert await effect_ids(other) == [] and await positions(other, app) == {}
        where = ["--topic", topic, "--partition"]
        here = await command(other, app, "positions", PATH, *where, "0", "--move-to", "committed")
        assert here.returncode == 0, here.stderr
        all_of_it = await command(other, app, "positions", PATH, *where, "1", "--move-to", "earliest")
        assert all_of_it.returncode == 0, all_of_it.stderr
        await drained(app, other.settings())
    assert set(await effect_ids(other)) == {f"p{n}" for n in range(1, 20, 2)} | {f"q{n}" for n in range(4)}
    code, shown = await status(other, app)
    assert (code, shown["notices"]) == (0, [])


async def test_database_restored_to_before_the_app_reads_from_the_beginning(
    place: Place, postgres: Postgres, worker_log: WorkerLog
) -> None:
    """The database is restored to before the App: nothing is lost."""
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    await place.send(topic, *[lone_payment(f"p{n}") for n in range(10)])
    async with working(app, place.settings()):
        await drained(app, place.settings())
        await copied(place, app, 10)
    for table in ("coverage", "positions", "ledger", "outcomes", "handlers"):
        await query(place.dsn, f"delete from consumer.{table}")
    await query(place.dsn, "delete from effects")
    await query(place.dsn, "update consumer.installation set nonce = gen_random_uuid()")
    await consume_all(app, place.settings())
    assert len(await effect_ids(place)) == 10
    assert worker_log.events("postgresql has lost its position")


async def test_start_at_another_clients_commit_reports_what_it_skips(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    await place.send(topic, *[lone_payment(f"p{n}") for n in range(20)])
    client = AIOKafkaConsumer(bootstrap_servers=place.kafka, group_id=app.name, enable_auto_commit=False)
    await client.start()
    client.assign([TopicPartition(topic, 0)])
    await client.commit({TopicPartition(topic, 0): 15})
    await client.stop()
    await consume_all(app, place.settings())
    [event] = worker_log.events("beginning at the commit of another client")
    assert (event["skipped"], event["offset"]) == (15, 15)
    assert len(await effect_ids(place)) == 5
    code, shown = await status(place, app)
    assert (code, kinds(shown)) == (0, ["began_with_group"])
    moved = await command(place, app, "positions", PATH, "--topic", topic, "--move-to", "earliest")
    assert moved.returncode == 0, moved.stderr
    await consume_all(app, place.settings())
    assert len(await effect_ids(place)) == 20
    assert kinds((await status(place, app))[1]) == []


async def test_classic_stranger_in_the_group_is_reported(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic(4)
    app = payments_app(topic, balances=False)
    async with working(app, place.settings()) as worker:
        await place.send(topic, lone_payment("a"))
        await drained(app, place.settings())
        assert kinds((await status(place, app))[1]) == []
        client = AIOKafkaConsumer(
            topic, bootstrap_servers=place.kafka, group_id=app.name, client_id="a-stranger", enable_auto_commit=False
        )
        await client.start()
        try:
            [event] = await worker_log.wait("another client is a member")
            assert "a-stranger" in event["clients"]
            code, shown = await status(place, app)
            assert (code, kinds(shown)) == (1, ["stranger"])
            assert "a-stranger" in shown["notices"][0]["text"]
        finally:
            await client.stop()

        async def alone() -> bool:
            return fetched(worker) == 4

        await until("the worker to have all partitions again", alone)
    assert await effect_ids(place) == ["a"]


async def test_stranger_with_the_newer_protocol_is_reported(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic(4)
    app = payments_app(topic, balances=False)
    async with working(app, place.settings()):
        await place.send(topic, *[lone_payment(f"p{n}", n) for n in range(4)])
        await drained(app, place.settings())
        await copied(place, app, 4)
        client = confluent_kafka.Consumer(
            {"bootstrap.servers": place.kafka, "group.id": app.name, "group.protocol": "consumer"}
        )
        client.subscribe([topic])
        try:

            async def joined() -> bool:
                await asyncio.to_thread(client.poll, 0.2)
                return bool(client.assignment())

            await until("the stranger to be assigned something", joined, 60)
            await worker_log.wait("another client is a member")
            code, shown = await status(place, app)
            assert (code, kinds(shown)) == (1, ["stranger"])
        finally:
            client.close()


async def test_deleted_topic_is_a_problem_of_status(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    await place.send(topic, lone_payment("a"))
    await consume_all(app, place.settings())
    await delete_topic(place.kafka, topic)

    async def gone() -> bool:
        return bool((await status(place, app))[1]["missing_topics"])

    await until("the topic to be gone", gone)
    code, shown = await status(place, app)
    assert (code, kinds(shown)) == (1, ["deleted_topic"])


async def test_positions_move_a_whole_topic_to_a_time_or_show_it_first(place: Place) -> None:
    topic = await place.topic(3)
    app = payments_app(topic, balances=False)
    await place.send(topic, *[lone_payment(f"p{n}", n % 3) for n in range(30)])
    await consume_all(app, place.settings())
    move = ["positions", PATH, "--topic", topic, "--move-to"]
    shown = await command(place, app, *move, "24h", "--dry-run", "--json")
    assert [(row["before"], row["position"]) for row in json.loads(shown.stdout)] == [(10, 0)] * 3
    assert await positions(place, app) == {0: 10, 1: 10, 2: 10}
    assert (await command(place, app, *move, "24h")).returncode == 0
    assert await positions(place, app) == {0: 0, 1: 0, 2: 0}
    assert (await command(place, app, *move, "4")).returncode == 0
    assert await positions(place, app) == {0: 4, 1: 4, 2: 4}
    assert (await command(place, app, *move, "end")).returncode == 0
    assert await positions(place, app) == {0: 10, 1: 10, 2: 10}
    one = await command(place, app, *move, "beginning", "--partition", "1", "--json")
    assert json.loads(one.stdout) == {"topic": topic, "partition": 1, "before": 10, "position": 0}
    is_one_line(await command(place, app, *move, "11"), "nothing was changed", f"{topic}:0 0 to 10")
    is_one_line(await command(place, app, *move, "position"), "it is there already")
    is_one_line(await command(place, app, *move, "tomorrow"), "--move-to 'tomorrow'")
    is_one_line(await command(place, app, *move, "2999-01-01"), "in the future")
    is_one_line(await command(place, app, "positions", PATH, "--topic", topic), "--move-to")
    is_one_line(
        await command(place, app, "positions", PATH, "--topic", topic, "--partition", "7", "--move-to", "0"),
        "no partition 7",
    )
    is_one_line(await command(place, app, "positions", PATH, "--dry-run"), "--dry-run goes with --move-to")
    assert await positions(place, app) == {0: 10, 1: 0, 2: 10}
    await consume_all(app, place.settings())
    assert len(await effect_ids(place)) == 30
