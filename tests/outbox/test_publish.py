"""Published messages reach Kafka in order, with their effects only.

Once for each id.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from harness import Place, Sent, consume_all, drained, query, value
from outgoing import all_published, check_published, ids, publish_all, records_of, values
from replay_runs import run_replay

from consumer import App, Message, Misconfigured, Reject, Retry, TransactionMisuse, Tx
from consumer.core.identity import message_id
from consumer.outbox.record import derived_id
from consumer.worker.worker import Worker

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
QUICK = Retry(attempts=2, base=0.01, cap=0.05)
INSERT = "insert into effects values ($1, 1, 1)"


def name() -> str:
    return f"publishing-{uuid.uuid4().hex[:8]}"


async def test_a_publish_is_sent_with_its_id_its_trace_and_its_bytes(place: Place) -> None:
    topic, out = await place.topic(), await place.topic(partitions=3)
    app = App(name(), publishes=[out])

    @app.handler(topic)
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer(INSERT, message.value["id"])
        tx.publish(out, {"of": message.value["id"]}, key=message.key, headers={"ce_type": "settled", "n": None})
        tx.publish(out, None, key="gone")

    await place.send(
        topic,
        Sent({"id": "a"}, id="a", key="k", headers=[("traceparent", TRACE), ("tracestate", b"v=1")]),
        Sent({"id": "b"}, id="b", key="k"),
    )
    await publish_all(app, place)
    records = await records_of(place.kafka, out)
    of_key = [record for record in records if record.key == b"k"]
    assert values(of_key) == [{"of": "a"}, {"of": "b"}]
    assert ids(of_key) == [
        str(uuid.UUID(bytes=derived_id(app.name, "settle", message_id(one), 0))) for one in (b"a", b"b")
    ]
    assert of_key[0].headers[1:] == (
        ("ce_type", b"settled"),
        ("n", None),
        ("traceparent", TRACE),
        ("tracestate", b"v=1"),
    )
    assert of_key[1].headers[1:] == (("ce_type", b"settled"), ("n", None))
    assert [record.value for record in records if record.key == b"gone"] == [None, None]
    assert len(set(ids(records))) == 4
    stored = await query(
        place.dsn, "select extract(epoch from created_at) * 1000, source_offset from consumer.outbox order by seq"
    )
    assert {int(row[0]) for row in stored} == {record.timestamp for record in records}
    assert [row[1] for row in stored] == [0, 0, 1, 1]


async def test_only_what_is_applied_is_published(place: Place) -> None:
    """Failures, rejections, retries, undone savepoints, and statements that poison the whole batch."""
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])
    calls: dict[str, int] = {}

    @app.handler(topic, retry=QUICK)
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        id = entry["id"]
        calls[id] = calls.get(id, 0) + 1
        tx.publish(out, {"id": id, "n": 0})
        match entry["do"]:
            case "reject":
                raise Reject("no")
            case "raise":
                raise ValueError("no")
            case "once" if calls[id] == 1:
                raise ValueError("not yet")
            case "sql":
                await tx.execute("select 1/0")
            case "undone":
                try:
                    async with tx.savepoint():
                        tx.publish(out, {"id": id, "n": "undone"})
                        async with tx.savepoint():
                            tx.publish(out, {"id": id, "n": "undone too"})
                        raise KeyError
                except KeyError:
                    pass
            case "kept":
                async with tx.savepoint():
                    tx.publish(out, {"id": id, "n": 1})
                    async with tx.savepoint():
                        tx.publish(out, {"id": id, "n": 2})
                    tx.publish(out, {"id": id, "n": 3})
        tx.publish(out, {"id": id, "n": "last"})
        tx.defer(INSERT, id)

    todo = ["plain", "reject", "plain", "raise", "once", "sql", "undone", "kept", "plain"]
    await place.send(topic, *[Sent({"id": str(n), "do": do}, id=str(n), key=str(n)) for n, do in enumerate(todo)])
    await publish_all(app, place)
    sent: dict[str, list[Any]] = {}
    for body in values(await records_of(place.kafka, out)):
        sent.setdefault(body["id"], []).append(body["n"])
    kept = {
        "0": [0, "last"],
        "2": [0, "last"],
        "4": [0, "last"],
        "6": [0, "last"],
        "7": [0, 1, 2, 3, "last"],
        "8": [0, "last"],
    }
    assert sent == kept
    assert [row[0] for row in await place.effects()] == sorted(kept)
    # The id of the last one counts the undone publishes too: it is the same however often the message runs.
    last = derived_id(app.name, "settle", message_id(b"6"), 3)
    assert str(uuid.UUID(bytes=last)) in ids(await records_of(place.kafka, out))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"topic": "undeclared", "value": b""}, "undeclared is not declared"),
        ({"value": b"x" * 2_000_000}, "is too large for"),
        ({"value": b"", "headers": {"message-id": "x"}}, "reserved"),
        ({"value": b"", "headers": {"a": 1}}, "header 'a'"),
        ({"value": object()}, "cannot become JSON"),
        ({"value": b"", "cause": 1}, "for batch handlers"),
    ],
)
async def test_refused_publish_fails_its_message_and_stores_nothing(
    place: Place, arguments: dict[str, Any], says: str
) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])

    @app.handler(topic, retry=QUICK)
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, entry)
        if entry["id"] == 1:
            tx.publish(**{"topic": out, **arguments})

    await place.send(topic, *[Sent({"id": number}, id=str(number), key="k") for number in range(2)])
    await publish_all(app, place)
    assert values(await records_of(place.kafka, out)) == [{"id": 0}]
    [(error,)] = await query(place.dsn, "select error from consumer.dead_letters")
    assert says in error and "\n" not in error and error.startswith("TransactionMisuse: publish: ")


async def test_a_batch_handler_names_the_cause_of_each_record(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])

    @app.handler(topic, batch=4, retry=QUICK)
    async def book(entries: list[dict[str, Any]], tx: Tx) -> None:
        for entry in entries:
            tx.publish(out, {"n": entry["n"]}, cause=entry)
            tx.publish(out, {"n": -entry["n"]}, cause=entry)
        tx.publish(out, {"total": len(entries)}, id=f"total-{entries[0]['n']}")
        if any(entry["n"] == 5 for entry in entries):
            raise Reject("five")

    @app.handler(topic, name="messages", batch=4, retry=QUICK)
    async def messages(entries: list[Message[dict[str, Any]]], tx: Tx) -> None:
        for entry in entries:
            tx.publish(out, {"m": entry.value["n"]}, cause=entry)

    await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(1, 9)])
    await publish_all(app, place)
    records = await records_of(place.kafka, out)
    assert [body["m"] for body in values(records) if "m" in body] == list(range(1, 9))
    held = [body["n"] for body in values(records) if "n" in body]
    assert held == [sign * n for n in (1, 2, 3, 4, 6, 7, 8) for sign in (1, -1)]  # 5 is a dead letter
    for n, one in zip(
        held, [i for i, body in zip(ids(records), values(records), strict=True) if "n" in body], strict=True
    ):
        expected = derived_id(app.name, "book", message_id(str(abs(n)).encode()), 0 if n > 0 else 1)
        assert one == str(uuid.UUID(bytes=expected))


@pytest.mark.parametrize("mistake", ["no cause", "another", "twice"])
async def test_a_batch_handler_without_a_usable_cause_is_refused(place: Place, mistake: str) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])
    errors: list[str] = []

    @app.handler(topic, batch=4, retry=QUICK)
    async def book(entries: list[str], tx: Tx) -> None:
        cause = {"no cause": None, "another": "other", "twice": entries[0]}[mistake]
        entries[:] = [entries[0]] * len(entries) if mistake == "twice" else entries
        try:
            tx.publish(out, b"", cause=cause)
        except TransactionMisuse as error:
            errors.append(str(error))

    await place.send(topic, *[Sent(b'"same"', id=str(n), key="k") for n in range(2)])
    await publish_all(app, place)
    assert errors and all(text.startswith("publish: ") and "cause=" in text for text in errors)


async def test_the_next_app_applies_each_record_once(place: Place) -> None:
    """A publishes, B needs no setting to recognize what comes again."""
    topic, out = await place.topic(partitions=2), await place.topic(partitions=2)
    first, second = App(name(), publishes=[out]), App(name())

    @first.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, entry, key=str(entry["n"] % 3))

    @second.handler(out)
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, str(entry["n"]))

    await place.send(topic, *[Sent({"n": n}, id=str(n), key=str(n % 5)) for n in range(200)])
    await publish_all(first, place)
    # The relay starts again from a watermark that was lost: everything is sent once more.
    await query(place.dsn, "update consumer.outbox_published set next_seq = 0 returning 1")
    await publish_all(first, place)
    records = await records_of(place.kafka, out)
    assert len(records) >= 400 and len(set(ids(records))) == 200
    await consume_all(second, place.settings())
    assert sorted(int(row[0]) for row in await place.effects()) == list(range(200))


async def test_the_order_of_a_key_holds_over_many_batches_and_owners(place: Place) -> None:
    topic, out = await place.topic(partitions=4), await place.topic(partitions=3)
    app = App(name(), publishes=[out])

    @app.handler(topic)
    async def forward(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.publish(out, {"n": message.value["n"]}, key=message.key)

    await place.send(topic, *[Sent({"n": n}, id=str(n), key=str(n % 40)) for n in range(3000)])
    settings = place.settings(batch_messages_max=100)
    workers = [Worker(app, settings) for _ in range(3)]
    tasks = [asyncio.create_task(workers[0].run())]
    try:
        for worker in workers[1:]:  # partitions move while records are published
            await asyncio.sleep(0.7)
            tasks.append(asyncio.create_task(worker.run()))
        await drained(app, settings)
        workers[0].stop()
        await asyncio.wait_for(tasks[0], 40)
        await all_published(place)
    finally:
        for worker in workers:
            worker.stop()
        await asyncio.gather(*tasks)
    first = await check_published(place, out)
    assert len(first) == 3000
    by_key: dict[bytes, list[int]] = {}
    for record in first:
        by_key.setdefault(record.key, []).append(json.loads(record.value)["n"])
    assert all(numbers == sorted(numbers) for numbers in by_key.values()) and len(by_key) == 40


async def test_a_declared_topic_that_does_not_exist_is_refused_at_start(place: Place) -> None:
    topic = await place.topic()
    app = App(name(), publishes=["not-there"])

    @app.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None: ...

    with pytest.raises(Misconfigured, match=r"publishes=\['not-there'\]\): the topic does not exist; have it created"):
        await Worker(app, place.settings()).run()


async def test_with_the_relay_off_rows_stay_in_the_table(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])

    @app.handler(topic)
    async def forward(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, entry)

    await place.send(topic, Sent({"n": 1}, id="1", key="k"))
    await consume_all(app, place.settings(outbox_relay="off"))
    assert await records_of(place.kafka, out) == []
    assert await value(place.dsn, "select count(*) from consumer.outbox") == 1
    await publish_all(app, place)
    assert values(await records_of(place.kafka, out)) == [{"n": 1}]


async def test_a_replay_publishes_what_it_applies_and_dry_runs_publish_nothing(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(name(), publishes=[out])

    @app.handler(topic)
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, str(entry["n"]))
        tx.publish(out, entry)

    await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in range(4)])
    await publish_all(app, place)
    await query(place.dsn, 'delete from consumer.ledger where "offset" = 2 returning 1')  # as if it was never applied
    looked = await run_replay(place, app, topic, call_handlers=True)
    assert looked.total("missing") == 1
    assert (await run_replay(place, app, topic, mode="rebuild", settings={"redis_url": None})).verdict().exit_code in (
        0,
        1,
    )
    assert await value(place.dsn, "select count(*) from consumer.outbox") == 4
    applied = await run_replay(place, app, topic, mode="apply")
    assert applied.total("applied_now") == 1
    assert await query(place.dsn, "select source_offset, count(*), count(distinct id) from consumer.outbox group by 1 order by 1") == [
        (0, 1, 1), (1, 1, 1), (2, 2, 1), (3, 1, 1),
    ]  # fmt: skip
    await publish_all(app, place)
    assert len(await records_of(place.kafka, out)) == 5
