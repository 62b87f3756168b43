"""Every message ends as applied, duplicate, dead-lettered or skipped.

On real services, with one worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import pydantic
import pytest
from harness import (
    Place,
    Sent,
    buffered,
    consume_all,
    counts,
    drained,
    letters,
    migrated,
    query,
    until,
    value,
    working,
)
from payments_app import INSERT, UPDATE, Payment, payment, payments_app

from consumer import App, Message, Reject, Retry, Tx

QUICK = Retry(attempts=3, base=0.01, cap=0.05)


async def test_a_message_delivered_twice_is_applied_once(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"), payment("b", 2), payment("a"))
    await consume_all(app, place.settings())
    await place.send(topic, payment("a"), payment("b", 2))  # in another run, too
    await consume_all(app, place.settings())
    assert await place.effects() == [("a", 1, 10), ("b", 2, 10)]
    assert await query(place.dsn, "select id, balance from accounts where balance <> 0 order by id") == [
        (1, 10),
        (2, 10),
    ]
    counted = (await counts(app, place.dsn))["settle"]
    assert counted["applied"] == 2
    assert sum(counted["duplicates"].values()) == 3
    assert counted["dead_lettered"] == 0


async def test_without_redis_the_ledger_stops_every_duplicate(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    for _ in range(2):
        await place.send(topic, *[payment(f"p{n}") for n in range(20)])
        await consume_all(app, place.settings(redis_url=None))
    counted = (await counts(app, place.dsn))["settle"]
    assert (counted["applied"], counted["duplicates"]["ledger"], counted["duplicates"]["precheck"]) == (20, 20, 0)


async def test_with_redis_the_precheck_stops_them_before_they_are_decoded(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    for _ in range(2):
        await place.send(topic, *[payment(f"p{n}") for n in range(20)])
        await consume_all(app, place.settings())
    counted = (await counts(app, place.dsn))["settle"]
    assert (counted["applied"], counted["duplicates"]["ledger"], counted["duplicates"]["precheck"]) == (20, 0, 20)


async def test_marks_of_a_recreated_database_are_ignored(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    for statement in ("drop schema consumer cascade", "truncate effects"):
        await query(place.dsn, statement)
    await migrated(place.dsn, "")
    other = payments_app(topic, name=app.name, retry=QUICK)  # the same scope, and Redis still holds the mark
    await place.send(topic, payment("a"))
    # A person has decided to go on at the group's offset: without a position the partition would stop.
    await query(
        place.dsn,
        "insert into consumer.positions (app, topic, partition, next_offset) values ($1, $2, 0, 1)",
        app.name,
        topic,
    )
    await consume_all(other, place.settings())
    assert await place.effects() == [("a", 1, 10)]


async def test_one_id_with_two_payloads_is_a_conflict_not_a_duplicate(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a", id="same"), payment("b", id="same"))
    await consume_all(app, place.settings())
    await place.send(topic, payment("c", id="same"), payment("b", id="same"), payment("a", id="same"))
    await consume_all(app, place.settings())
    assert await place.effects() == [("a", 1, 10)]
    assert await place.reasons() == ["id_conflict", "id_conflict"]


async def test_applied_message_stays_a_duplicate_behind_a_conflicting_payload(place: Place) -> None:
    """Without Redis both reach the ledger, which holds the second."""
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    settings = place.settings(redis_url=None)
    await place.send(topic, payment("a", id="same"))
    await consume_all(app, settings)
    await place.send(topic, payment("b", id="same"), payment("a", id="same"), payment("b", id="same"))
    await consume_all(app, settings)
    assert await place.effects() == [("a", 1, 10)]
    assert await place.reasons() == ["id_conflict"]
    duplicates = (await counts(app, place.dsn))["settle"]["duplicates"]
    assert (duplicates["ledger"], duplicates["batch"]) == (1, 1)


@pytest.mark.parametrize("size", [1, 36, 5000])
async def test_an_id_of_any_length_and_any_bytes_works(place: Place, size: int) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    raw = (bytes(range(256)) * 20)[-size:]
    await place.send(topic, *[Sent({"id": "x", "account": 1, "amount": 1}, id=raw)] * 3)
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 1


async def test_unreadable_messages_become_dead_letters_with_their_bytes(
    place: Place,
) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK, message_id="header:message-id")
    await place.send(
        topic,
        Sent(b"\xff not json", id="1"),
        Sent({"id": "x", "account": "no number", "amount": 1}, id="2"),
        Sent({"id": "no id", "account": 1, "amount": 1}),
        Sent({"id": "two", "account": 1, "amount": 1}, headers=[("message-id", b"a"), ("message-id", b"b")]),
        Sent({"id": "empty", "account": 1, "amount": 1}, headers=[("message-id", b"")]),
        Sent(None, id="3", key="k"),
        payment("good"),
    )
    await consume_all(app, place.settings())
    await place.send(topic, Sent(b"\xff not json", id="1"))
    await consume_all(app, place.settings())
    assert await place.reasons() == [
        "unreadable", "unreadable", "no_message_id", "ambiguous_message_id", "no_message_id", "no_value",
    ]  # fmt: skip
    assert await place.effects() == [("good", 1, 10)]
    rows = await query(
        place.dsn, 'select value, header_keys, header_values, "offset" from consumer.dead_letters order by 4'
    )
    assert rows[0] == (b"\xff not json", [b"message-id"], [b"1"], 0)
    counted = (await counts(app, place.dsn))["settle"]
    assert counted["duplicates"]["dead_letter"] == 1


async def test_an_id_from_a_field_and_from_a_function(place: Place) -> None:
    topic = await place.topic()
    app = App("ids")

    @app.handler(topic, message_id="field:meta.id", name="nested")
    async def nested(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, f"nested {body['meta']['id']}", 1, 1)

    @app.handler(topic, message_id=lambda body: (body["meta"]["id"] or "").upper(), name="function")
    async def function(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, f"function {body['meta']['id']}", 1, 1)

    await place.send(topic, *[Sent({"meta": {"id": id}}) for id in ("a", "a", "b", None)])
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["function a", "function b", "nested a", "nested b"]
    assert await place.reasons() == ["no_message_id", "no_message_id"]


async def test_message_without_an_id_uses_its_offset_and_warns_once(place: Place, caplog: Any) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    body = {"id": "x", "account": 1, "amount": 1}
    await place.send(topic, Sent(body), Sent(body))
    with caplog.at_level("WARNING", logger="consumer"):
        await consume_all(app, place.settings())
    assert len(await place.effects()) == 2
    assert sum("their offset is used" in record.message for record in caplog.records) == 1


@dataclasses.dataclass
class AsDataclass:
    id: str


class AsTypedDict(TypedDict):
    id: str


class AsModel(pydantic.BaseModel):
    id: str


async def test_payloads_are_decoded_by_annotation(place: Place) -> None:
    topic = await place.topic()
    app = App("types")
    seen: dict[str, object] = {}

    def note(name: str, declared: Any) -> None:
        async def handle(body: Any) -> None:
            seen[name] = body

        handle.__annotations__["body"] = declared
        app.handler(topic, name=name, idempotent=False)(handle)

    for name, declared in {
        "struct": Payment, "dataclass": AsDataclass, "typeddict": AsTypedDict, "pydantic": AsModel,
        "dict": dict, "str": str, "bytes": bytes, "message": Message[AsModel], "optional": Payment | None,
    }.items():  # fmt: skip
        note(name, declared)
    text = '{"id": "ü", "account": 1, "amount": 2}'
    await place.send(topic, Sent(text.encode(), id="i", key="k", headers=[("h", b"1"), ("h", b"2")]))
    await consume_all(app, place.settings())
    assert seen["struct"] == seen["optional"] == Payment("ü", 1, 2)
    assert seen["dataclass"] == AsDataclass("ü")
    assert seen["pydantic"] == AsModel(id="ü")
    assert seen["typeddict"] == {"id": "ü"}
    assert seen["dict"] == {"id": "ü", "account": 1, "amount": 2}
    assert (seen["str"], seen["bytes"]) == (text, text.encode())
    message = seen["message"]
    assert isinstance(message, Message)
    assert (message.value, message.topic, message.partition, message.offset) == (AsModel(id="ü"), topic, 0, 0)
    assert (message.key, message.headers) == (b"k", (("message-id", b"i"), ("h", b"1"), ("h", b"2")))
    assert message.timestamp > 1_700_000_000_000


async def test_a_tombstone_reaches_a_handler_that_takes_none(place: Place) -> None:
    topic = await place.topic()
    app = App("tombstones")

    @app.handler(topic)
    async def take(body: dict[str, Any] | None, tx: Tx) -> None:
        tx.defer(INSERT, str(body), 1, 1)

    await place.send(topic, Sent(None, id="1", key="k"))
    await consume_all(app, place.settings())
    assert await place.effects() == [("None", 1, 1)]


async def test_a_handler_that_raises_costs_its_own_message_only(place: Place) -> None:
    topic = await place.topic(2)
    app = App("raising")
    runs: list[str] = []

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        runs.append(payment.id)
        if payment.id == "bad":
            raise ValueError("secret-canary")
        if payment.id == "refused":
            raise Reject("not this one")

    names = [f"p{n}" for n in range(30)]
    names[7], names[19] = "bad", "refused"
    await place.send(topic, *[payment(name, account=n) for n, name in enumerate(names)])
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == sorted(set(names) - {"bad", "refused"})
    dead = await letters(place.dsn)
    assert sorted((letter["reason"], letter["attempts"]) for letter in dead) == [("failed", 3), ("rejected", 1)]
    assert runs.count("bad") == 3
    assert runs.count("refused") == 1
    assert runs.count("p3") == 1  # a message that only deferred is taken out of its batch; the others are not run again


async def test_message_that_succeeds_at_its_third_attempt_keeps_its_order(
    place: Place,
) -> None:
    topic = await place.topic()
    app = App("again")
    failures = {"a2": 2}

    @app.handler(topic, retry=Retry(attempts=5, base=0.05, cap=0.1))
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(
            "insert into effects select $1, $2, count(*) from effects where account = $2", payment.id, payment.account
        )
        if failures.get(payment.id, 0):
            failures[payment.id] -= 1
            raise RuntimeError("not yet")

    await place.send(topic, *[payment(f"{k}{n}", account=ord(k)) for n in range(5) for k in "ab"])
    await consume_all(app, place.settings())
    in_order = await query(place.dsn, "select id from effects where account = 97 order by amount")
    assert [row[0] for row in in_order] == ["a0", "a1", "a2", "a3", "a4"]
    assert len(await place.effects()) == 10


async def test_retry_on_names_the_exceptions_worth_another_attempt(place: Place) -> None:
    topic = await place.topic()
    app = App("choosy")
    runs = 0

    @app.handler(topic, retry=Retry(attempts=5, base=0.01, cap=0.01, on=(KeyError,)))
    async def settle(payment: Payment, tx: Tx) -> None:
        nonlocal runs
        runs += 1
        raise ValueError

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    assert runs == 1
    assert await place.reasons() == ["failed"]


@pytest.mark.parametrize("neighbours", [0, 5, 150])
async def test_swallowed_database_error_claims_no_message_without_its_effect(place: Place, neighbours: int) -> None:
    topic = await place.topic()
    app = App("swallower")

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        if payment.id == "bad":
            try:
                await tx.execute("select 1/0")
            except Exception:
                pass

    names = [f"p{n}" for n in range(neighbours)] + ["bad"]
    await place.send(topic, *[payment(name, account=n % 90) for n, name in enumerate(names)])
    await consume_all(app, place.settings())
    assert len(await place.effects()) == neighbours
    assert await place.reasons() == ["failed"]
    assert (await counts(app, place.dsn))["settle"]["applied"] == neighbours


async def test_a_deferred_write_that_fails_is_found_among_many(place: Place) -> None:
    topic = await place.topic()
    app = App("deferring")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        tx.defer("update accounts set balance = 100 / $2::int where id = $1", payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}", account=n % 90, amount=0 if n in (41, 170) else 1) for n in range(300)])
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 295
    assert sorted(await place.reasons()) == ["behind"] * 3 + ["failed"] * 2  # three of the same accounts come later
    assert "division by zero" in (await letters(place.dsn))[0]["error"]


async def test_a_constraint_checked_at_commit_costs_its_own_message_only(place: Place) -> None:
    await query(place.dsn, "create table parents (id int primary key)")
    await query(place.dsn, "insert into parents select generate_series(0, 98)")
    await query(
        place.dsn, "alter table effects add foreign key (account) references parents deferrable initially deferred"
    )
    topic = await place.topic()
    app = payments_app(topic, retry=Retry(attempts=1))
    await place.send(topic, *[payment(f"p{n}", account=n) for n in range(100)])
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 99
    assert await place.reasons() == ["failed"]


@pytest.mark.parametrize("statement", ["commit", "ROLLBACK", "select 1; commit", "/* x */ begin", "savepoint a"])
async def test_transaction_control_in_a_handler_is_refused(place: Place, statement: str) -> None:
    topic = await place.topic()
    app = App("controller")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        if payment.id == "bad":
            await tx.execute(statement)

    await place.send(topic, payment("a"), payment("bad", 2), payment("c", 3))
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["a", "c"]
    assert "TransactionMisuse" in (await letters(place.dsn))[0]["error"]


async def test_procedure_that_commits_is_refused_and_claims_nothing(place: Place) -> None:
    await query(place.dsn, "create procedure sneaky() language plpgsql as $$ begin commit; end $$")
    topic = await place.topic()
    app = App("sneaky")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        await tx.execute("call sneaky()")

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    assert await place.effects() == []
    assert await place.reasons() == ["failed"]


async def test_a_handler_cancelled_from_within_is_a_failed_attempt(place: Place) -> None:
    topic = await place.topic()
    app = App("cancelling")

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        if payment.id == "bad":
            task = asyncio.ensure_future(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task

    await place.send(topic, payment("a"), payment("bad", 2), payment("c", 3))
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["a", "c"]
    assert await place.reasons() == ["failed"]


@pytest.mark.parametrize("neighbours", [0, 5])
async def test_cancelled_statement_claims_no_message_without_its_effect(place: Place, neighbours: int) -> None:
    """The handler's own timeout cancels its statement, and it goes on."""
    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    slow = {"slow"}

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if payment.id in slow:
            slow.clear()  # the next attempt is quick
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await tx.execute("select pg_sleep(30)")

    await place.send(topic, payment("slow"), *[payment(f"p{n}", n) for n in range(neighbours)])
    await consume_all(app, place.settings())
    names = sorted(["slow", *(f"p{n}" for n in range(neighbours))])
    assert [row[0] for row in await place.effects()] == names
    assert (await counts(app, place.dsn))["settle"]["applied"] == len(names)


async def test_buffers_are_bounded_in_messages_and_in_bytes(place: Place) -> None:
    """What is fetched stays below the limits plus one fetch."""
    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    gate, called = asyncio.Event(), asyncio.Event()

    @app.handler(topic)
    async def settle(value: bytes) -> None:
        called.set()
        await gate.wait()

    size = 20_000
    await place.send(topic, *[Sent(bytes(size), id=str(n)) for n in range(600)])  # 12 MB
    settings = place.settings(
        lanes_max=1, buffer_bytes_max=1_000_000, batch_bytes_max=100_000, kafka_partition_fetch_bytes_max=200_000
    )
    async with working(app, settings) as worker:
        await called.wait()
        highest = 0

        async def still() -> bool:  # the feeder waits for room
            nonlocal highest
            highest = max(highest, buffered(worker)[1])
            return highest >= settings.buffer_bytes_max and not worker.partitions.room.is_set()

        await until("the buffers to be full", still)
        assert highest <= settings.buffer_bytes_max + 2 * settings.kafka_partition_fetch_bytes_max
        gate.set()
        await drained(app, settings)
    assert (await counts(app, place.dsn))["settle"]["applied"] == 600


async def test_a_transaction_kept_beyond_its_handler_refuses_to_write(place: Place) -> None:
    topic = await place.topic()
    app = App("leaking")
    kept: list[Tx] = []

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        kept.append(tx)

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    from consumer import TransactionMisuse

    with pytest.raises(TransactionMisuse):
        kept[0].defer("select 1")
    with pytest.raises(TransactionMisuse):
        await kept[0].execute("select 1")


async def test_a_savepoint_may_fail_and_the_message_still_counts(place: Place) -> None:
    topic = await place.topic()
    app = App("saving")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        try:
            async with tx.savepoint():
                tx.defer(INSERT, "inside", 1, 1)
                await tx.execute("select 1/0")
        except Exception:
            tx.defer(INSERT, f"{payment.id} fallback", 1, 1)
        async with tx.savepoint():
            tx.defer(INSERT, f"{payment.id} kept", 1, 1)

    await place.send(topic, payment("a"), payment("b", 2))
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["a", "a fallback", "a kept", "b", "b fallback", "b kept"]
    assert await place.reasons() == []


async def test_an_awaited_read_sees_what_earlier_messages_of_its_key_deferred(place: Place) -> None:
    topic = await place.topic()
    app = App("reading")

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        balance = await tx.fetchval("select balance from accounts where id = $1", payment.account)
        tx.defer(INSERT, payment.id, payment.account, balance)
        tx.defer(UPDATE, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}") for n in range(5)])
    await consume_all(app, place.settings())
    assert [row[2] for row in await place.effects()] == [0, 10, 20, 30, 40]


async def test_batch_handler_gets_no_duplicates_and_its_bad_message_is_isolated(place: Place) -> None:
    topic = await place.topic()
    app = App("batches")
    sizes: list[int] = []

    @app.handler(topic, batch=50, retry=Retry(attempts=1))
    async def book(entries: list[Payment], tx: Tx) -> None:
        sizes.append(len(entries))
        await tx.executemany(INSERT, [(entry.id, entry.account, entry.amount) for entry in entries])
        if any(entry.id == "p77" for entry in entries):
            raise ValueError

    await place.send(
        topic, *[payment(f"p{n}", account=n % 90) for n in range(120)], payment("p3", 3), Sent(b"?", id="bad")
    )
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 119
    assert max(sizes) <= 50
    assert sorted(await place.reasons()) == ["failed", "unreadable"]
    assert (await counts(app, place.dsn))["book"]["applied"] == 119


async def test_a_handler_that_opted_out_runs_without_a_ledger_row(place: Place) -> None:
    topic = await place.topic()
    app = App("skipping")
    seen: list[str] = []

    @app.handler(topic, idempotent=False, retry=QUICK)
    async def count(click: dict[str, str]) -> None:
        if click["n"] == "bad":
            raise ValueError
        seen.append(click["n"])

    await place.send(topic, *[Sent({"n": number}) for number in ("1", "2", "bad", "2")])
    await consume_all(app, place.settings())
    assert sorted(seen) == ["1", "2", "2"]
    assert await value(place.dsn, "select count(*) from consumer.ledger") == 0
    counted = (await counts(app, place.dsn))["count"]
    assert (counted["applied"], counted["skipped"], counted["dead_lettered"]) == (0, 3, 1)


async def test_two_handlers_of_one_topic_and_one_of_two_topics_each_apply_once(place: Place) -> None:
    first, second = await place.topic(), await place.topic()
    app = App("several")

    @app.handler(first, name="one")
    async def one(body: Payment, tx: Tx) -> None:
        tx.defer(INSERT, f"one {body.id}", 1, 1)

    @app.handler(first, second, name="both")
    async def both(message: Message[Payment], tx: Tx) -> None:
        tx.defer(INSERT, f"both {message.value.id}", 1, 1)

    await place.send(first, payment("a"), payment("a"))
    await place.send(second, payment("a"), payment("b"))
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["both a", "both b", "one a"]


async def test_two_apps_share_a_database_and_a_redis_and_nothing_leaks(place: Place) -> None:
    topic = await place.topic()
    apps = [payments_app(topic, retry=QUICK), payments_app(topic, retry=QUICK)]
    for _ in range(2):
        await place.send(topic, payment("a"), payment("b", 2))
        for app in apps:
            await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["a", "a", "b", "b"]
    for app in apps:
        counted = (await counts(app, place.dsn))["settle"]
        assert (counted["applied"], sum(counted["duplicates"].values())) == (2, 2)


async def test_one_handler_failing_does_not_hold_up_another_of_the_topic(place: Place) -> None:
    topic = await place.topic()
    app = App("beside")

    @app.handler(topic, name="fails", retry=Retry(attempts=2, base=0.01, cap=0.01))
    async def fails(body: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, "never", 1, 1)
        raise ValueError

    @app.handler(topic, name="works")
    async def works(body: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, body.id, 1, 1)

    await place.send(topic, payment("a"), payment("b"))
    await consume_all(app, place.settings())
    assert [row[0] for row in await place.effects()] == ["a", "b"]
    assert len(await letters(place.dsn)) == 2


class Client:
    """A resource of the application's own."""

    open = True


async def test_the_lifespan_hands_resources_over_by_annotation_and_by_name(place: Place) -> None:
    topic = await place.topic()
    client = Client()

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[dict[str, object]]:
        yield {"client": client, "rate": 7}
        client.open = False

    app = App("resources", lifespan=lifespan)
    got: list[object] = []

    @app.handler(topic)
    async def settle(body: Payment, remote: Client, rate: int, tx: Tx) -> None:
        got.append((remote, rate, remote.open))
        tx.defer(INSERT, body.id, 1, rate)

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    assert got == [(client, 7, True)]
    assert not client.open
    assert await place.effects() == [("a", 1, 7)]


@pytest.mark.parametrize("order", ["key", "partition", "none"])
async def test_concurrent_handlers_keep_the_order_of_their_units(place: Place, order: Any) -> None:
    topic = await place.topic()
    app = App("slow")
    running = most = 0
    seen: dict[int, list[int]] = {}

    @app.handler(topic, order=order, concurrency=16)
    async def settle(body: Payment, tx: Tx) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        seen.setdefault(body.account, []).append(body.amount)
        tx.defer(INSERT, body.id, body.account, body.amount)

    await place.send(topic, *[payment(f"p{n}", account=n % 10, amount=n // 10) for n in range(200)])
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 200
    if order == "partition":
        assert most == 1
    else:
        assert most > 4
    if order != "none":
        assert all(amounts == sorted(amounts) for amounts in seen.values())


async def test_deferred_writes_reach_a_key_in_the_order_of_its_messages(place: Place) -> None:
    await query(place.dsn, "create table journal (account int, entry int, seq bigint generated always as identity)")
    topic = await place.topic(4)
    app = App("journal")

    @app.handler(topic)
    async def settle(body: Payment, tx: Tx) -> None:
        tx.defer("insert into journal (account, entry) values ($1, $2)", body.account, body.amount)
        if body.amount % 3 == 0:
            tx.defer("insert into journal (account, entry) values ($1, $2 + 0)", body.account, body.amount)

    await place.send(topic, *[payment(f"p{n}", account=n % 7, amount=n // 7) for n in range(700)])
    await consume_all(app, place.settings())
    rows = await query(place.dsn, "select account, array_agg(entry order by seq) from journal group by account")
    assert len(rows) == 7
    assert all(entries == sorted(entries) for _, entries in rows)


async def test_offsets_set_with_kafkas_own_tools_have_no_effect_and_that_is_said(place: Place, caplog: Any) -> None:
    from aiokafka import AIOKafkaConsumer, TopicPartition

    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await consume_all(app, place.settings())
    tool = AIOKafkaConsumer(bootstrap_servers=place.kafka, group_id=app.name, enable_auto_commit=False)
    await tool.start()
    tool.assign([TopicPartition(topic, 0)])
    await tool.commit({TopicPartition(topic, 0): 3})
    await tool.stop()

    async def opened() -> bool:
        return any(record.message == "partitions opened" for record in caplog.records)

    with caplog.at_level("INFO", logger="consumer"):
        async with working(app, place.settings()):
            await until("the partition to be opened", opened, 120)
            await drained(app, place.settings())
    logged = [record for record in caplog.records if "differs from the position" in record.message]
    assert len(logged) == 1
    assert "consumer positions" in logged[0].fields["do"]
    assert len(await place.effects()) == 10


async def test_a_position_moved_by_an_operator_is_noticed_by_a_running_worker(place: Place) -> None:
    import asyncpg

    from consumer.admin.positions import move_position
    from consumer.core.message import Partition

    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    settings = place.settings(redis_url=None)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    async with working(app, settings):
        await drained(app, settings)
        connection = await asyncpg.connect(place.dsn)
        assert await move_position(connection, app.name, Partition(topic, 0), 0) == 10
        await connection.close()
        await place.send(topic, payment("p10"))
        await drained(app, settings)

        async def seen_again() -> bool:
            return bool((await counts(app, place.dsn))["settle"]["duplicates"]["ledger"] == 10)

        await until("the ten to be seen again", seen_again)
    assert len(await place.effects()) == 11


async def test_the_fingerprint_in_the_ledger_is_that_of_the_bytes_produced(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    sent = payment("a")
    await place.send(topic, sent)
    await consume_all(app, place.settings())
    expected = int.from_bytes(hashlib.blake2b(sent.value or b"", digest_size=8).digest(), "big", signed=True)
    assert await value(place.dsn, "select fingerprint from consumer.ledger") == expected
