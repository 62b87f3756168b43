"""The relay under faults: committed ids reach Kafka, in order, no others.

Crashes, late workers, refusals, commands and operators.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import Place, Sent, consumer, delete_topic, drained, new_topic, query, until, value, working
from outgoing import (
    all_published,
    check_published,
    configure,
    name,
    publish_all,
    records_of,
    resume,
    sizes_app,
    stopped_reason,
    values,
)
from publishing_worker import app_of, started

from consumer import App, Reject, Tx, testing
from consumer.admin.outbox import read_stream
from consumer.dead_letters.retry import DeadLetterRetrier, Filters

STEPS = ["handled", "before_commit", "commit_sent", "committed", "outbox_sending", "outbox_sent"]


def messages(start: int, count: int = 40) -> list[Sent]:
    return [Sent({"n": n}, id=f"id-{n}", key=str(n % 7)) for n in range(start, start + count)]


@pytest.mark.parametrize("step", STEPS)
async def test_a_crash_at_any_step_loses_nothing_and_invents_nothing(place: Place, tmp_path: Path, step: str) -> None:
    topic, out = await place.topic(), await place.topic(partitions=2)
    app = app_of(topic, out, name())
    settings = place.settings(batch_messages_max=10)
    await place.send(topic, *messages(0))
    process = started(settings, topic, out, app.name, step, 2, tmp_path / "log")
    try:

        async def gone() -> bool:
            return process.poll() is not None

        await until("the worker to crash", gone, 60)
    finally:
        process.kill()
        process.wait()
    await place.send(topic, *messages(40))
    await publish_all(app, place)
    assert sorted(record["n"] for record in values(await check_published(place, out))) == list(range(80))
    assert await value(place.dsn, "select count(*) from effects") == 80


@pytest.mark.parametrize("step", ["committed", "outbox_sending", "outbox_sent"])
async def test_a_worker_that_wakes_up_late_only_repeats(place: Place, tmp_path: Path, step: str) -> None:
    topic, out = await place.topic(), await place.topic(partitions=2)
    app = app_of(topic, out, name())
    settings = place.settings(
        kafka_session_timeout_seconds=2, postgres_idle_in_transaction_timeout_seconds=2, batch_messages_max=10
    )
    await place.send(topic, *messages(0))
    log = tmp_path / "log"
    process = started(settings, topic, out, app.name, step, 2, log, "stop")
    try:

        async def stopped() -> bool:
            assert process.poll() is None, log.read_text()
            return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

        await until("the worker to stop", stopped, 60)
        async with working(app, settings):
            await drained(app, settings, 60)
            await all_published(place)
            await place.send(topic, *messages(40))
            await drained(app, settings, 60)
            size = log.stat().st_size
            process.send_signal(signal.SIGCONT)

            async def goes_on() -> bool:
                return log.stat().st_size > size

            await until("the late worker to go on", goes_on)
            await place.send(topic, *messages(80))
            await drained(app, settings, 60)
            await all_published(place)
    finally:
        process.kill()
        process.wait()
    assert sorted(record["n"] for record in values(await check_published(place, out))) == list(range(120))


async def command(tmp_path: Path, place: Place, *arguments: str) -> Any:
    return await asyncio.to_thread(consumer, tmp_path, *arguments, CONSUMER_POSTGRES_DSN=place.worker_dsn)


async def described(place: Place, app: App, stream: int) -> dict[str, Any]:
    connection = await asyncpg.connect(place.worker_dsn)
    try:
        return await read_stream(connection, app.name, stream, 2)
    finally:
        await connection.close()


async def test_a_refused_record_stops_its_stream_alone_until_an_operator_decides(place: Place, tmp_path: Path) -> None:
    topic, small, large = await place.topic(), await place.topic(), await place.topic()
    app = sizes_app(topic, small, large)
    settings = place.settings()
    sizes = {5: 3000, 9: 3000}
    async with working(app, settings):
        await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(3)])
        await drained(app, settings)
        await all_published(place)
        await configure(place.kafka, small, **{"max.message.bytes": "2000"})  # after the worker has asked
        await place.send(topic, *[Sent({"n": n, "pad": sizes.get(n, 0)}, id=str(n), key="k") for n in range(3, 12)])
        assert "too large" in (await stopped_reason(place, small)).lower() or "Size" in await stopped_reason(
            place, small
        )
        await all_published(place, large)
        assert [entry["n"] for entry in values(await records_of(place.kafka, small))] == [0, 1, 2, 3, 4]
        assert [entry["n"] for entry in values(await records_of(place.kafka, large))] == list(range(12))

        listed = await command(tmp_path, place, "outbox", "list", app.name, "--json")
        streams = {stream["topic"]: stream for stream in json.loads(listed.stdout)}
        assert (streams[small]["unpublished"], streams[large]["unpublished"]) == (7, 0)
        assert streams[small]["published"] == 5 and streams[small]["stopped"] and streams[small]["oldest"]
        number = streams[small]["stream"]
        shown = await described(place, app, number)
        assert [row["seq"] for row in shown["rows"]] == [5, 6] and shown["rows"][0]["value_bytes"] > 3000
        assert "x" * 100 not in str(shown)

        discard = ["outbox", "discard", app.name, str(number), "--why", "too large", "--operator", "ann"]
        done = await command(tmp_path, place, *discard)
        assert done.returncode == 0 and "1 rows are never published" in done.stdout, done.stderr

        async def at_the_next() -> bool:
            rows = await query(
                place.dsn,
                "select next_seq, stopped is null from consumer.outbox_published where stream = $1",
                number,
            )
            return rows == [(9, False)]

        await until("it stops at the next one", at_the_next, 60)
        assert [entry["n"] for entry in values(await records_of(place.kafka, small))] == [0, 1, 2, 3, 4, 6, 7, 8]
        await configure(place.kafka, small, **{"max.message.bytes": "100000"})
        await resume(place, app, number, "limit raised")
        await all_published(place)
    first = list(dict.fromkeys(entry["n"] for entry in values(await records_of(place.kafka, small))))
    assert first == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    shown = await described(place, app, number)
    assert [(done["what"], done["from_seq"], done["to_seq"], done["why"]) for done in shown["actions"]] == [
        ("resume", 9, 9, "limit raised"),
        ("discard", 5, 6, "too large"),
    ]
    assert shown["actions"][1]["operator"] == "ann"


async def test_a_deleted_topic_stops_its_streams_and_a_new_one_gets_the_rest(place: Place) -> None:
    topic, out, other = await place.topic(), await place.topic(), await place.topic()
    app = sizes_app(topic, out, other)
    settings = place.settings()
    async with working(app, settings):
        await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(3)])
        await drained(app, settings)
        await all_published(place)
        await delete_topic(place.kafka, out)
        await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(3, 6)])
        assert await stopped_reason(place, out) == "the topic does not exist"
        await all_published(place, other)
        await new_topic(place.kafka, name=out)
        [(number,)] = await query(place.dsn, "select stream from consumer.outbox_streams where topic = $1", out)
        await resume(place, app, number, "it is back")
        await all_published(place)
    assert {entry["n"] for entry in values(await records_of(place.kafka, out))} >= {3, 4, 5}


async def test_a_retried_dead_letter_publishes_through_the_running_worker(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app, is_broken = App(name(), publishes=[out]), True

    @app.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, entry)
        if is_broken:
            raise Reject("not yet")

    await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(3)])
    settings = place.settings()
    async with working(app, settings):
        await drained(app, settings)
        assert await value(place.dsn, "select count(*) from consumer.outbox") == 0
        is_broken = False
        desk = await DeadLetterRetrier.open(app, settings, "me")
        try:
            letters = await desk.select(Filters(), waiting=False)
            assert [result.outcome async for result in desk.retry(letters)] == ["applied"] * 3
        finally:
            desk.close()
        await all_published(place)
    assert [entry["n"] for entry in values(await check_published(place, out))] == [0, 1, 2]


async def test_rows_gather_while_kafka_takes_none_and_go_out_in_order(place: Place) -> None:
    """The relay begins with nothing in memory, and reads many rows.

    It reads the table in parts.
    """
    topic, out = await place.topic(), await place.topic(partitions=3)
    app = app_of(topic, out, name())
    await place.send(topic, *messages(0, 3000))
    settings = place.settings(outbox_relay="off")
    async with working(app, settings):
        await drained(app, settings, 60)
    assert await value(place.dsn, "select count(*) from consumer.outbox") == 3000
    await publish_all(app, place)
    assert len(await check_published(place, out)) == 3000


async def test_the_pytest_plugin_runs_handlers_that_publish(exactly_once: testing.ExactlyOnce) -> None:
    app = App(name(), publishes=["out"])

    @app.handler("in")
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ($1)", entry["n"])
        tx.publish("out", entry)

    trial = await exactly_once(app, schema="create table effects (n int not null);")
    await trial.prove(*[testing.Sent("in", {"n": n}, id=str(n)) for n in range(3)])
    assert await query(trial.dsn, "select count(*), count(distinct id) from consumer.outbox") == [(3, 3)]
