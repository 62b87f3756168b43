"""`consumer tail` shows messages, and what the ledger says of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from harness import Place, Sent, consume_all, consumer, is_one_line, new_topic, query, until, value, working

from consumer import App, Reject, Retry, Tx
from consumer.admin import tail
from consumer.admin.tail import Shown, Tail, TailOptions
from consumer.local_servers import free_port

APP = """
from consumer import App, Tx
app = App({name!r})

@app.handler({topic!r})
async def settle(payment: dict[str, str], tx: Tx) -> None: ...
"""


def app_of(topic: str) -> App:
    app = App(f"tail-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: dict[str, str], tx: Tx) -> None:
        if payment["do"] == "reject":
            raise Reject("no such account")
        if payment["do"] == "fail":
            raise ValueError("no balance")
        tx.defer("insert into effects values ($1, 1, 1)", payment["do"])

    @app.handler(topic, idempotent=False)
    async def log(payment: bytes) -> None: ...

    return app


async def tailed(app: App, place: Place, **options: Any) -> dict[int, Shown]:
    """What a tail up to the end shows, by offset."""
    shown: list[Shown] = []
    await Tail(app, place.settings(), TailOptions(**options)).run(shown.extend, lambda _: None)
    return {message.record.offset: message for message in shown}


async def test_each_message_has_what_became_of_it(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic)
    await place.send(
        topic,
        Sent({"do": "a"}, id="a", key="k"),
        Sent({"do": "a"}, id="a", key="k"),
        Sent({"do": "reject"}, id="c", key="k"),
        Sent({"do": "fail"}, id="d", key="k"),
        Sent({"do": "e"}, id="e", key="k"),
        Sent(b"broken", id="f"),
    )
    await consume_all(app, place.settings())
    await place.send(topic, Sent({"do": "new"}, id="new"), Sent(b"broken", id="g"))
    before = await stored(place)
    shown = await tailed(app, place, start="earliest", until="latest")
    states = {offset: [str(state.state) for state in message.handlers] for offset, message in shown.items()}
    assert states == {
        0: ["applied", "skipped"],
        1: ["duplicate", "skipped"],
        2: ["dead-lettered", "skipped"],
        3: ["dead-lettered", "skipped"],
        4: ["waiting", "skipped"],
        5: ["dead-lettered", "skipped"],
        6: ["unsettled", "unsettled"],
        7: ["unsettled", "unsettled"],
    }
    assert shown[1].handlers[0].first == f"{topic}:0:0"
    assert [shown[offset].handlers[0].reason for offset in (2, 3, 4, 5)] == [
        "rejected", "failed", "behind", "unreadable"
    ]  # fmt: skip
    assert (shown[7].handlers[0].problem or "").startswith("unreadable: ")
    assert [message.id for message in shown.values()] == ["a", "a", "c", "d", "e", "f", "new", "g"]
    assert list(await tailed(app, place, until="latest", last=3)) == [5, 6, 7]
    assert list(await tailed(app, place, start="position", until="latest")) == [6, 7]
    assert list(await tailed(app, place, start="earliest", until="latest", key=b"k")) == [0, 1, 2, 3, 4]
    assert await stored(place) == before


async def stored(place: Place) -> list[Any]:
    """What the database holds of this App's work."""
    tables = ("positions", "ledger", "dead_letters", "attempts", "handlers", "audit")
    return [await query(place.dsn, f"select * from consumer.{table} order by 1, 2") for table in tables]


async def test_last_messages_are_found_between_offsets_without_any(place: Place) -> None:
    # Since Kafka 4 a broker refuses such timestamps unless the topic says otherwise.
    topic = await place.topic(1, **{"message.timestamp.after.max.ms": str((1 << 63) - 1)})
    microseconds = 1764540000123456
    await place.send(topic, Sent({"do": "first"}, id="0", timestamp=microseconds))
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        for number in range(1, 4):  # behind each one is the marker of its transaction
            async with producer.transaction():
                await producer.send_and_wait(topic, b'{"do": "x"}', headers=[("message-id", b"%d" % number)])
        with suppress(ValueError):
            async with producer.transaction():
                await producer.send_and_wait(topic, b"of an aborted transaction")
                raise ValueError
    finally:
        await producer.stop()
    app = app_of(topic)
    shown = await tailed(app, place, until="latest", last=2)
    assert [message.id for message in shown.values()] == ["2", "3"]
    shown = await tailed(app, place, until="latest", last=9)
    assert [message.id for message in shown.values()] == ["0", "1", "2", "3"]
    assert shown[0].as_dict(False)["time"] is None


async def test_claims_of_a_deleted_topic_are_not_said_of_a_new_one(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic)
    await place.send(topic, Sent({"do": "a"}))
    await consume_all(app, place.settings())
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        await admin.delete_topics([topic])
    finally:
        await admin.close()
    await new_topic(place.kafka, 1, topic)
    await place.send(topic, Sent({"do": "another"}))
    [message] = (await tailed(app, place, start="earliest", until="latest")).values()
    assert [str(state.state) for state in message.handlers] == ["unsettled", "unsettled"]
    assert "deleted and recreated" in (message.handlers[0].problem or "")


async def test_messages_are_followed_until_they_are_settled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "SETTLE_SECONDS", 60.0)  # however slow the machine is
    topic = await place.topic(2)
    app = app_of(topic)
    shown: list[Shown] = []

    def show(messages: Sequence[Shown]) -> None:
        shown.extend(messages)

    async def has(count: int) -> bool:
        assert not following.done(), following
        return len(shown) >= count

    following = asyncio.create_task(Tail(app, place.settings(), TailOptions(last=5)).run(show, lambda _: None))
    try:
        async with working(app, place.settings()):
            # The tail begins at the end of the log, wherever that is when it begins: so messages are sent until one is shown.
            number = 0
            while not shown:
                number += 1
                await place.send(topic, Sent({"do": str(number)}, id=str(number), partition=number % 2))
                await asyncio.sleep(0.2)
            first = len(shown)
            # The database ends the tail's connection; it opens another one.
            end = """select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database()
                     and pid <> pg_backend_pid() and query like '%unnest%left join consumer.attempts%'"""
            await until("the tail's connection", lambda: value(place.dsn, end))
            old = int(time.time() * 1000) - 3_600_000  # a producer may give the time of the event
            await place.send(topic, Sent({"do": "last"}, id="last", partition=0, timestamp=old))
            await until("the last message", lambda: has(number + 1), 60)
    finally:
        following.cancel()
        await asyncio.wait([following])
    assert following.cancelled() and first <= number
    assert sorted(message.id or "" for message in shown) == sorted([*map(str, range(1, number + 1)), "last"])
    # What was there when the tail began is shown at once.
    assert {str(message.handlers[0].state) for message in shown} <= {"applied", "unsettled"}
    assert [str(message.handlers[0].state) for message in shown if message.id == "last"] == ["applied"]
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        groups = [group for group, _ in await admin.list_consumer_groups()]
    finally:
        await admin.close()
    assert [group for group in groups if app.name in group] == [app.name]  # the worker's


async def test_the_command_prints_values_only_when_asked(place: Place, tmp_path: Path) -> None:
    topic, module = await place.topic(), f"tail_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{module}.py").write_text(APP.format(name=f"tail-{uuid.uuid4().hex[:8]}", topic=topic))
    await place.send(topic, Sent({"secret": "4929"}, id="a", key="k", headers=[("trace", b"77")]), Sent({}, id="b"))

    def run(*arguments: str) -> Any:
        environment = {
            "CONSUMER_POSTGRES_DSN": place.worker_dsn,
            "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
        }
        return consumer(tmp_path, "tail", f"{module}:app", *arguments, **environment)

    end = ("-n", "2", "--until", "latest")
    first, second = run(*end).stdout.splitlines()
    assert first.endswith(f"  {topic}:0:0  key=k  id=a  settle unsettled") and second.endswith("id=b  settle unsettled")
    lines = run(topic, *end, "--values").stdout.splitlines()
    assert [line.strip() for line in lines[1:4]] == ["message-id: a", "trace: 77", '{"secret": "4929"}']
    rows = [json.loads(line) for line in run(*end, "--json").stdout.splitlines()]
    assert [(row["id"], row["key"]) for row in rows] == [("a", "k"), ("b", None)] and "4929" not in str(rows)
    is_one_line(run(topic[:-1]), f"did you mean {topic}?")
    nowhere = f"postgresql://u@127.0.0.1:{free_port()}/x"  # before any message comes
    is_one_line(run("--postgres-dsn", nowhere, "--wait", "0.5"), "127.0.0.1")
    is_one_line(run("--until", "latest"), "--until", "say where to begin")
    is_one_line(run("-n", "1", "--key", "k"), "--last", "not with --from or --key")
