"""One message's fault is counted; a systemic one waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from harness import Place, Sent, consume_all, drained, execute, letters, until, value, working
from payments_app import INSERT, Payment

from consumer import App, Retry, RunAgain, Tx
from consumer.admin.counts import handler_counts, miscounts
from consumer.admin.dead_letters import dead_letter
from consumer.core.delivery import Batch, Delivery
from consumer.core.evidence import Evidence
from consumer.core.message import LogRecord
from consumer.core.outcome import RetryLater
from consumer.postgres import waiting_messages
from consumer.postgres.errors import Conflict, Outage
from consumer.transaction.dead_letter_rate import TooManyDeadLetters
from consumer.transaction.isolate import FAILURES_MAX, Part
from consumer.transaction.settle import next_parts
from consumer.worker.worker import Worker

QUICK = Retry(attempts=2, base=0.02, cap=0.1)


def raised(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


def payment(id: str, account: int = 1, key: str | None = None, partition: int | None = None) -> Sent:
    return Sent({"id": id, "account": account, "amount": 1}, id=id, key=key or id, partition=partition)


def app_of(topic: str, statement: str, retry: Retry = QUICK, deferred: bool = False) -> App:
    """An App whose handler runs one more statement on `bad` messages.

    It runs on all messages if the statement contains {account}.
    """
    app = App(f"evidence-{uuid4().hex[:8]}")

    @app.handler(topic, retry=retry)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        text = statement.replace("{account}", str(payment.account))
        if payment.account < 0 or "{account}" in statement:
            if deferred:
                tx.defer(text)
            else:
                await tx.execute(text)

    return app


async def waits(place: Place, app: App) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(place.dsn)
    try:
        return (await waiting_messages.read(connection, app.name))[0]
    finally:
        await connection.close()


def applied(place: Place, number: int) -> Callable[[], Awaitable[bool]]:
    async def enough() -> bool:
        return len(await place.effects()) >= number

    return enough


# name -> what makes it possible, what fails for one message
OF_ONE = {
    "row_level_security": (
        "create table secured (id int); alter table secured enable row level security;"
        'create policy p on secured with check (id > 0); grant all on secured to "test-worker";',
        "insert into secured values (-1)",
        "42501",
    ),
    "missing_table": ("", "insert into nowhere values (1)", "42P01"),
    "missing_schema": ("", "select nowhere.f()", "3F000"),
    "internal_error": (
        "create function gis() returns void language plpgsql as $$ begin raise 'bad geometry' using errcode = 'XX000'; end $$",
        "select gis()",
        "XX000",
    ),
    "missing_library": (
        "create function lib() returns void language plpgsql as $$ begin raise 'no file' using errcode = '58P01'; end $$",
        "select lib()",
        "58P01",
    ),
    "missing_partition": (
        "create table parted (id int) partition by list (id); create table parted_1 partition of parted for values in (1);",
        "insert into parted values (-1)",
        "23514",
    ),
    "odd_code": ("", "do $$ begin raise 'odd' using errcode = 'ZX123'; end $$", "ZX123"),
    "constraint": (
        "alter table accounts add constraint positive check (balance >= 0)",
        "update accounts set balance = -1 where id = 1",
        "23514",
    ),
    "serialization": ("", "do $$ begin raise 'again' using errcode = '40001'; end $$", "40001"),
    "locked": ("", "do $$ begin raise 'busy' using errcode = '55P03'; end $$", "55P03"),
    "full": ("", "do $$ begin raise 'full' using errcode = '53100'; end $$", "53100"),
    "shut_down": ("", "do $$ begin raise 'down' using errcode = '57P01'; end $$", "57P01"),
    "no_connection": ("", "do $$ begin raise 'far away' using errcode = '08006'; end $$", "08006"),
}


@pytest.mark.parametrize("deferred", [False, True], ids=["awaited", "deferred"])
@pytest.mark.parametrize("name", OF_ONE)
async def test_message_that_alone_fails_becomes_a_dead_letter(place: Place, name: str, deferred: bool) -> None:
    before, statement, code = OF_ONE[name]
    if before:
        await execute(place.dsn, before)
    topic = await place.topic()
    app = app_of(topic, statement, deferred=deferred)
    await place.send(topic, payment("bad", -1), *[payment(f"p{n}") for n in range(20)])
    async with working(app, place.settings()):
        await until("the others", applied(place, 20))
        more = 0

        async def buried() -> bool:
            nonlocal more
            await place.send(topic, payment(f"q{more}"))  # others go through: that is the evidence
            more += 1
            return bool(await letters(place.dsn))

        await until("the dead letter", buried, 60)
        await drained(app, place.settings())
    [letter] = await letters(place.dsn)
    assert (letter["reason"], letter["kind"]) == ("failed", code)
    assert len(await place.effects()) == 20 + more
    assert await waits(place, app) == []


# name -> what breaks it for all, what each message runs, what mends it, code
OF_ALL = {
    "missing_table": ("select 1", "insert into later values ({account})", "create table later (id int)", "42P01"),
    "no_right": (
        'create table closed (id int); revoke all on closed from "test-worker"',
        "insert into closed values ({account})",
        'grant all on closed to "test-worker"',
        "42501",
    ),
    "missing_partition": (
        "create table parted (id int) partition by range (id)",
        "insert into parted values ({account})",
        "create table parted_1 partition of parted for values from (0) to (1000)",
        "23514",
    ),
    "used_up_sequence": (
        "create sequence numbers maxvalue 2; select nextval('numbers'), nextval('numbers')",
        "select nextval('numbers') + {account}",
        "alter sequence numbers maxvalue 100000",
        "2200H",
    ),
    "no_replica_identity": (
        "create table published (id int); insert into published select generate_series(0, 99); create publication p for table published",
        "update published set id = id where id = {account}",
        "alter table published replica identity full",
        "55000",
    ),
    "internal_error": (
        "create function f(a int) returns void language plpgsql as $$ begin raise 'broken' using errcode = 'XX000'; end $$",
        "select f({account})",
        "create or replace function f(a int) returns void language plpgsql as $$ begin end $$",
        "XX000",
    ),
    "missing_reference": (
        "create table owners (id int primary key); create table owned (owner int references owners)",
        "insert into owned values ({account})",
        "insert into owners select generate_series(0, 99)",
        "23503",
    ),
}


@pytest.mark.parametrize("messages", [1, 30], ids=["lone", "many"])
@pytest.mark.parametrize("name", OF_ALL)
async def test_a_handler_whose_messages_all_fail_alike_waits_and_buries_nothing(
    place: Place, name: str, messages: int
) -> None:
    before, statement, mend, code = OF_ALL[name]
    if name == "missing_reference" and messages == 1:
        pytest.skip("a lone violation of a constraint is its message's: its retry policy decides")
    await execute(place.dsn, before)
    topic = await place.topic(2)
    app = app_of(topic, statement, retry=Retry(attempts=1, base=0.02, cap=0.2))
    await place.send(topic, *[payment(f"p{n}", n) for n in range(messages)])
    async with working(app, place.settings()):

        async def shown() -> bool:
            waiting = await waits(place, app)
            return bool(waiting) and sum(row["count"] for row in waiting) == messages

        await until("all to be shown as waiting", shown)
        waiting = await waits(place, app)
        assert all(row["systemic"] and code in row["error"] and row["handler"] == "settle" for row in waiting)
        assert await letters(place.dsn) == []
        assert await value(place.dsn, "select count(*) from consumer.attempts where attempts > 0") == 0
        await execute(place.dsn, mend)
        await execute(place.dsn, 'grant all on all tables in schema public to "test-worker"')
        await drained(app, place.settings())

        async def over() -> bool:
            return await waits(place, app) == []

        await until("nothing to be shown any more", over)
    assert len(await place.effects()) == messages
    assert await letters(place.dsn) == []


async def test_a_message_that_asks_to_run_again_is_shown_and_is_not_systemic(place: Place) -> None:
    topic = await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")
    may = asyncio.Event()

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        if not may.is_set():
            raise RunAgain("secret")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}", key="k") for n in range(5)])
    async with working(app, place.settings()):

        async def shown() -> list[dict[str, Any]]:
            return await waits(place, app)

        [row] = await until("it to be shown", shown)
        assert (row["count"], row["systemic"], row["topic"], row["partition"]) == (5, False, topic, 0)
        assert "RunAgain at test_systemic_failures.py:" in row["error"]
        assert "secret" not in row["error"]
        may.set()
        await drained(app, place.settings())


async def test_a_bug_that_fails_for_every_message_follows_the_retry_policy(place: Place) -> None:
    topic = await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")

    @app.handler(topic, retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        raise KeyError("absent")

    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await consume_all(app, place.settings())
    assert await place.reasons() == ["failed"] * 10


async def test_many_failures_of_one_kind_are_a_few_log_lines(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "consumer")
    topic = await place.topic()
    app = app_of(topic, "insert into nowhere values ({account})", retry=Retry(attempts=1, base=0.02, cap=0.1))
    await place.send(topic, *[payment(f"p{n}") for n in range(160)])
    async with working(app, place.settings()) as worker:

        async def many() -> bool:
            heads = [head for shard in worker.shards for head, _, _ in shard.scheduler.waiting()]
            return len(heads) == 160 and all(head.reruns >= 5 for head in heads)

        await until("all to have failed five times", many, 60)
    lines = [record for record in caplog.records if "uncounted" in record.getMessage()]
    assert 1 <= len(lines) <= 12  # for at least 800 failures
    fields = lines[0].fields  # type: ignore[attr-defined]
    assert fields["handler"] == "settle" and "test_systemic_failures.py:" in fields["error"]


async def test_dead_letter_limit_is_named_by_the_error_and_by_status(place: Place) -> None:
    topic = await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        raise KeyError(payment.id)

    await place.send(topic, *[payment(f"secret{n}") for n in range(200)])
    with pytest.raises(TooManyDeadLetters) as caught:
        await asyncio.wait_for(Worker(app, place.settings()).run(), 60)
    assert "failed: KeyError at test_systemic_failures.py:" in str(caught.value)
    assert "secret" not in str(caught.value)
    [row] = await waits(place, app)
    assert (
        row["systemic"]
        and "dead-letter limit" in row["error"]
        and "KeyError at test_systemic_failures.py:" in row["error"]
    )


async def test_a_dead_letter_keeps_the_frames_of_its_error_without_values(place: Place) -> None:
    topic = await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")

    def look_up(account: str) -> int:
        return {"a": 1}[account]

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: Payment, tx: Tx) -> None:
        look_up(f"secret-{payment.id}")

    await place.send(topic, payment("p"))
    await consume_all(app, place.settings())
    connection = await asyncpg.connect(place.dsn)
    try:
        letter = await dead_letter(connection, await value(place.dsn, "select dead_letter from consumer.dead_letters"))
    finally:
        await connection.close()
    assert letter is not None
    assert letter["trace"][0].startswith("KeyError at test_systemic_failures.py:")
    assert letter["trace"][-2].endswith(" in look_up") and "secret" not in "".join(letter["trace"])


async def test_waiting_for_another_topic_does_not_delay_that_topic(place: Place) -> None:
    """B4: however many wait of one kind, new messages are read."""
    shipped, ordered = await place.topic(), await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")

    @app.handler(shipped, retry=QUICK)
    async def ship(payment: Payment, tx: Tx) -> None:
        if not await tx.fetchval("select true from effects where id = $1", f"order {payment.id}"):
            raise RunAgain("not ordered yet")
        tx.defer(INSERT, f"ship {payment.id}", 1, 1)

    @app.handler(ordered)
    async def order(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, f"order {payment.id}", 1, 1)

    names = [f"p{n}" for n in range(600)]
    await execute(place.dsn, "create index on effects (id)")
    await place.send(shipped, *map(payment, names))
    settings = place.settings(parked_messages_max=100, lanes_max=1)
    async with working(app, settings) as worker:

        async def is_full() -> bool:
            return any(
                shard.scheduler.is_full(partition)
                for shard in worker.shards
                for partition in shard.scheduler.partitions
            )

        await until("the partition to be full", is_full)
        await place.send(ordered, *map(payment, names))
        await drained(app, settings, 120)
    assert len(await place.effects()) == 1200


async def test_a_busy_key_that_fails_holds_up_no_other_key_and_keeps_its_order(place: Place) -> None:
    """B40: messages behind a failing one leave room for other keys."""
    topic = await place.topic(2)
    app = App(f"evidence-{uuid4().hex[:8]}")
    repaired = asyncio.Event()
    order: list[str] = []

    @app.handler(topic, retry=Retry(attempts=100_000, base=0.05, cap=0.2))
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id.startswith("busy"):
            if not repaired.is_set():
                raise ConnectionError
            order.append(payment.id)
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    busy = [f"busy{n:04}" for n in range(1500)]
    await place.send(topic, *[payment(name, key="busy", partition=0) for name in busy])
    await place.send(topic, *[payment(f"p{n}", partition=n % 2) for n in range(200)])
    async with working(app, place.settings()):
        await until("the other keys", applied(place, 200))
        repaired.set()
        await drained(app, place.settings(), 120)
    assert len(await place.effects()) == 1700
    assert list(dict.fromkeys(order)) == busy


async def test_counters_agree_with_the_rows_of_the_ledger(place: Place) -> None:
    """B18: the counters that `status` reads are exact.

    Over duplicates, dead letters, retries and several partitions.
    """
    topic = await place.topic(3)
    app = app_of(topic, "do $$ begin raise 'no'; end $$")
    sent = [payment(f"p{n}", -1 if n % 50 == 7 else 1, partition=n % 3) for n in range(500)]
    await place.send(topic, *sent, *sent[:100])
    await consume_all(app, place.settings())
    connection = await asyncpg.connect(place.dsn)
    try:
        counted = (await handler_counts(connection, app))["settle"]
        assert (counted["applied"], counted["dead_lettered"]) == (490, 10)
        assert await miscounts(connection, app) == {}
        await connection.execute("delete from consumer.ledger where ctid = (select min(ctid) from consumer.ledger)")
        assert await miscounts(connection, app) == {"settle": {"rows": 489, "counter": 490}}
    finally:
        await connection.close()


@pytest.mark.parametrize("batch", [None, 10], ids=["single", "batch"])
async def test_handler_that_fails_for_all_delays_no_other_handler(place: Place, batch: int | None) -> None:
    topic = await place.topic()
    app = App(f"evidence-{uuid4().hex[:8]}")

    async def write(payments: list[Payment], tx: Tx) -> None:
        for payment in payments:
            tx.defer("insert into later values ($1)", payment.id)

    if batch is None:

        @app.handler(topic, retry=QUICK)
        async def broken(payment: Payment, tx: Tx) -> None:
            await write([payment], tx)

    else:

        @app.handler(topic, name="broken", retry=QUICK, batch=batch)
        async def broken_batch(payments: list[Payment], tx: Tx) -> None:
            await write(payments, tx)

    @app.handler(topic)
    async def good(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}") for n in range(40)])
    async with working(app, place.settings()):
        await until("the other handler", applied(place, 40))

        async def shown() -> bool:
            waiting = await waits(place, app)
            return bool(sum(row["count"] for row in waiting if row["systemic"]) == 40)

        await until("all of the broken one to be shown", shown)
        assert {row["handler"] for row in await waits(place, app)} == {"broken"}
        assert await letters(place.dsn) == []
        await execute(place.dsn, 'create table later (id text); grant all on later to "test-worker"')
        await drained(app, place.settings())
    assert await value(place.dsn, "select count(distinct id) from later") == 40
    assert await value(place.dsn, "select count(*) from later") == 40


@pytest.mark.parametrize(
    "error",
    [
        raised(Conflict("met"), asyncpg.SerializationError("could not serialize")),
        raised(Conflict("a claim vanished between two statements"), None),
        raised(Outage("lost"), ConnectionResetError()),
        raised(Outage("lost"), asyncpg.InterfaceError("connection is closed")),
        raised(Outage("lost"), None),
        ConnectionResetError(),
    ],
    ids=repr,
)
def test_conflict_or_outage_without_evidence_counts_no_attempt(error: Any) -> None:
    handler = app_of("t", "select 1").handlers["settle"]
    delivery = Delivery(handler, LogRecord("t", 0, 0, 0, None, b"{}", ()))
    next_parts(Part(Batch([delivery], {}, {}), failures=FAILURES_MAX - 1), error, lambda: 0.5)
    assert isinstance(delivery.outcome, RetryLater) and delivery.outcome.error == "put aside"
    assert delivery.attempts == 0


def answer(code: str, severity: str = "ERROR") -> asyncpg.PostgresError:
    """An error as the server sends it. FATAL ends the connection."""
    return asyncpg.PostgresError.new({"S": severity, "V": severity, "C": code, "M": "no"})


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (raised(Outage("full"), answer("53100")), True),
        (raised(Outage("down"), answer("57P01")), True),
        (raised(Conflict("locked"), answer("55P03")), True),
        (raised(Conflict("met"), answer("40P01")), True),
        (raised(Outage("down"), answer("57P01", "FATAL")), False),
        (raised(Outage("crowded"), answer("53300", "FATAL")), False),
        (raised(Outage("crash"), answer("XX000", "PANIC")), False),
        (raised(Outage("lost"), ConnectionResetError()), False),
        (raised(Outage("lost"), asyncpg.InterfaceError("connection is closed")), False),
        (raised(Outage("lost"), None), False),
    ],
    ids=repr,
)
def test_attempt_counts_after_an_answer_and_a_later_success_of_others(error: Any, counts: bool) -> None:
    handler = app_of("t", "select 1", retry=Retry(attempts=9)).handlers["settle"]
    delivery = Delivery(handler, LogRecord("t", 0, 0, 0, None, b"{}", ()))
    evidence = Evidence()
    attempts = []
    for others_succeed in (False, True, False, False, True):
        if others_succeed:
            evidence.succeeded("settle")
        delivery.outcome = None
        next_parts(Part(Batch([delivery], {}, {}), failures=FAILURES_MAX - 1), error, lambda: 0.5, evidence)
        attempts.append(delivery.attempts)
    assert attempts == ([0, 1, 1, 1, 2] if counts else [0] * 5)
