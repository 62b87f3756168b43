"""Handlers, logs and databases that behave badly.

Each of these was a bug once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from harness import Place, buffered, consume_all, counts, drained, letters, query, until, value, working
from payments_app import INSERT, UPDATE, Payment, payment
from stored_state import effect_ids

from consumer import App, Retry, TransactionMisuse, Tx
from consumer.admin.positions import move_position
from consumer.core.message import Partition
from consumer.local_servers import Postgres
from consumer.postgres.session import Session
from consumer.worker.worker import Worker

ONCE = Retry(attempts=1)


def new_app() -> App:
    return App(f"adversity-{uuid.uuid4().hex[:8]}")


# -- what a handler does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 10])
async def test_a_payload_that_a_handler_changes_is_new_in_the_next_run(place: Place, batch: int | None) -> None:
    """The batch runs again with the payload as it was produced."""
    topic = await place.topic()
    app = new_app()

    async def settle(payments: list[dict[str, Any]], tx: Tx) -> None:
        for body in payments:
            body["amount"] += 1
            tx.defer(INSERT, body.pop("id"), body["account"], body["amount"])
            if body["account"] == 2:
                tx.defer("select 1/0")

    if batch:
        app.handler(topic, batch=batch, retry=ONCE)(settle)
    else:

        @app.handler(topic, retry=ONCE)
        async def one(payment: dict[str, Any], tx: Tx) -> None:
            await settle([payment], tx)

    await place.send(topic, payment("good"), payment("bad", 2), payment("also", 3))
    await consume_all(app, place.settings())
    assert await place.effects() == [("also", 3, 11), ("good", 1, 11)]
    assert await place.reasons() == ["failed"]


async def test_deferred_writes_beside_a_failed_savepoint_are_kept(place: Place) -> None:
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        inside = asyncio.Event()

        async def optional() -> None:
            with suppress(ValueError):
                async with tx.savepoint():
                    await asyncio.gather(tx.execute(INSERT, "optional", 1, 1), tx.fetchval("select 1"))
                    tx.defer(INSERT, "optional too", 1, 1)
                    inside.set()
                    await asyncio.sleep(0.05)
                    raise ValueError

        async def needed() -> None:
            await inside.wait()
            tx.defer(UPDATE, payment.account, payment.amount)
            await tx.execute(INSERT, payment.id, payment.account, payment.amount)

        await asyncio.gather(optional(), needed())

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    assert await effect_ids(place) == ["a"]
    assert await value(place.dsn, "select balance from accounts where id = 1") == 10


@pytest.mark.parametrize("left", ["statement", "savepoint", "waiting"])
async def test_a_task_left_behind_meets_no_other_messages_transaction(place: Place, left: str) -> None:
    topic = await place.topic()
    app = new_app()
    tasks: list[asyncio.Task[None]] = []

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        begun = asyncio.Event()

        async def behind() -> None:
            begun.set()
            if left == "statement":
                await tx.execute("select pg_sleep(2)")
            async with tx.savepoint():
                await asyncio.sleep(0.3)
                raise ValueError

        async def waiting() -> None:
            await tx.execute(INSERT, "LEFT", 1, 1)

        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if payment.id == "bad":
            tasks.append(asyncio.create_task(behind()))
            await begun.wait()
            if left == "waiting":
                tasks.append(asyncio.create_task(waiting()))
                await asyncio.sleep(0)

    await place.send(topic, payment("bad", 2), payment("c", 3))
    async with working(app, place.settings()):
        await drained(app, place.settings())
        await place.send(topic, *[payment(f"d{n}", n + 10) for n in range(5)])
        await drained(app, place.settings())
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await effect_ids(place) == ["c", "d0", "d1", "d2", "d3", "d4"]
    assert [letter["error"].split(":")[0] for letter in await letters(place.dsn)] == [TransactionMisuse.__name__]


class Panic(BaseException):
    """As extensions raise them."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize(
    "error",
    [Panic("x"), Mute(), GeneratorExit(), SystemExit(0), asyncio.CancelledError(), BaseExceptionGroup("x", [Panic()])],
)
async def test_any_exception_of_a_handler_costs_its_own_message_only(
    place: Place, error: BaseException, idempotent: bool
) -> None:
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE, idempotent=idempotent)
    async def settle(payment: Payment) -> None:
        if payment.id == "bad":
            raise error

    await place.send(topic, payment("a"), payment("bad", 2), payment("c", 3))
    await consume_all(app, place.settings())
    counted = (await counts(app, place.dsn))["settle"]
    assert (counted["applied"] + counted["skipped"], counted["dead_lettered"]) == (2, 1)


async def test_session_setting_is_refused_before_it_reaches_another_message(place: Place) -> None:
    await query(place.dsn, "create schema tenant")
    await query(place.dsn, "create table tenant.effects (like public.effects)")
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id == "a":
            await tx.execute("set search_path = tenant")
        await tx.execute(INSERT, payment.id, 1, 1)

    await place.send(topic, payment("a"), payment("b", 2))
    await consume_all(app, place.settings())
    assert await effect_ids(place) == ["b"]
    assert await place.reasons() == ["failed"]


async def test_the_first_of_two_errors_says_what_it_was(place: Place) -> None:
    """A swallowed deadlock runs again, although another error follows."""
    topic = await place.topic()
    app = new_app()
    runs: list[int] = []

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        runs.append(1)
        with suppress(asyncpg.PostgresError):
            if len(runs) == 1:
                await tx.execute("do $$ begin raise 'x' using errcode = '40P01'; end $$")
        await tx.execute(INSERT, payment.id, 1, 1)

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    assert await effect_ids(place) == ["a"]


# -- what never ends ------------------------------------------------------------------------------------------------


async def test_slow_handlers_commit_before_postgresql_ends_their_transaction(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    calls: list[str] = []

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        calls.append(payment.id)
        await asyncio.sleep(0.1)  # something far away
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n:02}", n % 10) for n in range(40)])
    await consume_all(app, place.settings(postgres_idle_in_transaction_timeout_seconds=1.5))
    assert await effect_ids(place) == [f"p{n:02}" for n in range(40)]
    assert sorted(calls) == [f"p{n:02}" for n in range(40)]  # each once: nothing was begun again
    for account in range(10):
        own = [int(id[1:]) for id in calls if int(id[1:]) % 10 == account]
        assert own == sorted(own)


async def test_slow_calls_of_a_batch_handler_are_committed_in_time_too(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    calls: list[str] = []

    @app.handler(topic, batch=5)
    async def settle(payments: list[Payment], tx: Tx) -> None:
        calls.extend(settled.id for settled in payments)
        await asyncio.sleep(0.25)
        for settled in payments:
            tx.defer(INSERT, settled.id, settled.account, settled.amount)

    names = [f"p{n:02}" for n in range(60)]
    await place.send(topic, *[payment(name, int(name[1:]) % 10) for name in names])
    await consume_all(app, place.settings(postgres_idle_in_transaction_timeout_seconds=1.5))
    assert await effect_ids(place) == names
    assert sorted(calls) == names


@pytest.mark.parametrize("code", ["55P03", "40001", "53100", "08001"])
async def test_message_that_always_meets_a_conflict_or_outage_stops_no_other(place: Place, code: str) -> None:
    topic = await place.topic()
    app = new_app()
    runs: list[str] = []

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        runs.append(payment.id)
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if payment.id == "bad":
            await tx.execute(f"do $$ begin raise 'x' using errcode = '{code}'; end $$")

    await place.send(topic, *[payment(f"p{n}", n) for n in range(20)], payment("bad", 50))
    async with working(app, place.settings()):

        async def others() -> bool:
            return len(await effect_ids(place)) == 20

        await until("the other messages", others)
        assert await place.reasons() == []  # not known to be its own fault


async def test_retries_of_slow_failures_do_not_starve_other_keys(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    runs: list[str] = []

    @app.handler(topic, retry=Retry(attempts=1000, base=0.2, cap=2), concurrency=16)
    async def settle(payment: Payment, tx: Tx) -> None:
        runs.append(payment.id)
        if payment.id.startswith("bad"):
            await asyncio.sleep(0.1)
            raise ConnectionError
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, *[payment(f"bad{n}", n) for n in range(50)])
    async with working(app, place.settings()):

        async def retried() -> bool:
            return len(runs) >= 60

        await until("retries", retried)
        await place.send(topic, *[payment(f"good{n}", 60 + n) for n in range(20)])

        async def there() -> bool:
            return len(await effect_ids(place)) == 20

        await until("the good keys", there)


async def test_failing_key_of_one_partition_leaves_room_for_another(place: Place) -> None:
    topic = await place.topic(2)
    app = new_app()

    @app.handler(topic, retry=Retry(attempts=100, base=30, cap=30))
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id == "bad":
            raise ValueError
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, payment("bad", partition=0), *[payment(f"p{n}", partition=0) for n in range(600)])
    settings = place.settings(buffer_messages_max=200, batch_messages_max=50, parked_messages_max=100)
    async with working(app, settings) as worker:

        async def full() -> bool:
            return buffered(worker)[0] >= 100

        await until("the first lane to be full", full)
        await place.send(topic, *[payment(f"q{n}", 2, partition=1) for n in range(50)])

        async def there() -> bool:
            return len(await effect_ids(place)) == 50

        await until("the other partition", there)


async def test_deployment_fault_at_commit_is_no_unknown_outcome(place: Place) -> None:
    await query(
        place.dsn,
        """create function chk() returns trigger language plpgsql as
           $$ begin if new.id = 'bad' then perform x from nothing_here; end if; return null; end $$""",
    )
    await query(
        place.dsn,
        """create constraint trigger t after insert on effects deferrable initially deferred
           for each row execute function chk()""",
    )
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, payment("a"), payment("bad", 2), payment("c", 3))
    async with working(app, place.settings()):

        async def others() -> bool:
            return await effect_ids(place) == ["a", "c"]

        await until("the others to be applied", others)
        await drained(app, place.settings())
    # It fails alone while others go through, so it is its own fault, and nothing was stored of it.
    assert await effect_ids(place) == ["a", "c"]
    assert [letter["kind"] for letter in await letters(place.dsn)] == ["42P01"]


async def test_a_table_altered_meanwhile_costs_no_message(place: Place) -> None:
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.fetch("select * from accounts where id = $1", payment.account)
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)

    async with working(app, place.settings()):
        await place.send(topic, payment("a"))
        await drained(app, place.settings())
        await query(place.dsn, "alter table accounts add column more int")
        await place.send(topic, payment("b"))
        await drained(app, place.settings())
    assert await effect_ids(place) == ["a", "b"]


# -- connections and positions ----------------------------------------------------------------------------------------


async def test_connections_that_are_ended_at_any_instant_end_no_worker(place: Place) -> None:
    topic = await place.topic(4)
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        tx.defer(UPDATE, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}", n % 90) for n in range(6000)])
    worker = Worker(app, place.settings(batch_messages_max=100))
    task = asyncio.create_task(worker.run())
    connection = await asyncpg.connect(place.dsn)
    ended, begun = 0, time.monotonic()
    try:
        # Reconnecting backs off, so on a busy machine the tenth takes longer; it is waited for.
        while ended < 60 and time.monotonic() < begun + (10 if ended >= 10 else 60) and not task.done():
            ended += await connection.fetchval(
                """select count(pg_terminate_backend(pid)) from pg_stat_activity
                   where application_name = 'idempotent-consumer' and datname = current_database()"""
            )
            await asyncio.sleep(0.004)
    finally:
        await connection.close()
    assert not task.done(), task.exception()
    await drained(app, place.settings())
    worker.stop()
    await task
    assert ended >= 10
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(6000, 6000)]
    assert await value(place.dsn, "select sum(balance) from accounts") == 60_000


async def test_postgresql_killed_under_load_loses_and_doubles_nothing(place: Place) -> None:
    """The server is killed with SIGKILL and started again."""
    from harness import as_worker, migrated, settings_for

    with Postgres() as server:
        dsn = server.dsn()
        await migrated(dsn)
        topic = await place.topic(2)
        app = new_app()

        @app.handler(topic, retry=ONCE)
        async def settle(payment: Payment, tx: Tx) -> None:
            tx.defer(INSERT, payment.id, payment.account, payment.amount)

        settings = settings_for(as_worker(dsn), place.kafka, place.redis_url, batch_messages_max=50)
        async with working(app, settings):
            for n in range(3):
                await place.send(topic, *[payment(f"p{n}-{i}", i % 50) for i in range(1000)])

                async def some(least: int = n * 1000 + 100) -> bool:
                    return int(await value(dsn, "select count(*) from effects")) > least

                await until("progress", some)
                server.kill()
                server.run()
                await asyncio.to_thread(server.wait)
            await drained(app, settings)
        assert await query(dsn, "select count(*), count(distinct id) from effects") == [(3000, 3000)]
        counted = (await counts(app, dsn))["settle"]
        assert (counted["applied"], counted["dead_lettered"]) == (3000, 0)


async def test_a_database_put_back_in_time_gets_its_lost_effects_again(place: Place) -> None:
    """Redis has marks of another epoch than the restored database."""
    topic = await place.topic()
    app = new_app()

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    settings = place.settings()
    async with working(app, settings):
        await place.send(topic, *[payment(f"p{n}") for n in range(50)])
        await drained(app, settings)
        connection = await asyncpg.connect(place.dsn)
        async with connection.transaction():
            await connection.execute(
                "delete from effects; delete from consumer.ledger; update consumer.positions set next_offset = 0"
            )
            await connection.execute("update consumer.installation set nonce = gen_random_uuid()")
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'idempotent-consumer'"
            " and datname = current_database()"
        )
        await connection.close()
        await place.send(topic, payment("after"))

        async def all_there() -> bool:
            return len(await effect_ids(place)) == 51

        await until("the lost effects", all_there)
    assert len(set(await effect_ids(place))) == 51


async def test_position_moved_back_is_noticed_when_idle_and_when_full(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    gate = asyncio.Event()

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        await gate.wait()

    async def move_back() -> None:
        connection = await asyncpg.connect(place.dsn)
        try:
            await move_position(connection, app.name, Partition(topic, 0), 0)
        finally:
            await connection.close()

    settings = place.settings(redis_url=None, lanes_max=1, buffer_messages_max=100, batch_messages_max=50)
    await place.send(topic, *[payment(f"p{n}", n % 50) for n in range(1000)])
    async with working(app, settings) as worker:

        async def full() -> bool:
            return buffered(worker)[0] >= 100 and not worker.partitions.room.is_set()

        await until("full buffers", full)
        await move_back()
        gate.set()
        await drained(app, settings)
        await move_back()
        await drained(app, settings)
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(1000, 1000)]


async def test_a_partition_that_begins_with_aborted_records_only_is_settled(place: Place) -> None:
    topic = await place.topic()
    app = new_app()

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None: ...

    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"x", partition=0)
        await producer.abort_transaction()
    finally:
        await producer.stop()
    await consume_all(app, place.settings())
    assert await query(place.dsn, "select next_offset from consumer.positions") == [(2,)]


async def test_every_delivery_is_counted_once(place: Place) -> None:
    """Repeated failures are stored once, and counted as often as delivered."""
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=ONCE)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    @app.handler(topic, retry=ONCE, idempotent=False)
    async def observe(payment: Payment) -> None:
        raise ValueError

    same = [payment("a", id="same"), *[payment("b", id="same") for _ in range(3)]]
    await place.send(topic, *same)
    await consume_all(app, place.settings())
    await place.send(topic, *same)
    await consume_all(app, place.settings())
    for counted in (await counts(app, place.dsn)).values():
        assert (
            counted["applied"] + sum(counted["duplicates"].values()) + counted["dead_lettered"] + counted["skipped"]
            == 8
        )


async def test_a_commit_that_was_answered_with_rollback_is_noticed(place: Place) -> None:
    """The session checks this itself, without an earlier error."""
    session = await Session.open(place.settings())
    try:
        await session.begin()
        with suppress(asyncpg.PostgresError):
            await session.connection.execute("select 1/0")
        with pytest.raises(AssertionError, match="ROLLBACK"):
            await session.commit()
    finally:
        session.close()
