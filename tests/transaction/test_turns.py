"""Concurrent messages leave what single ones leave, settings included."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from harness import Place, consume_all, letters, migrated, query, value
from harness import Sent as Produced

from consumer import App, Message, Reject, Retry, Tx
from consumer.core.errors import TransactionMisuse
from consumer.testing import ExactlyOnce, Sent

pytest_plugins = ["consumer.testing"]

TABLES = """
create table accounts (id int primary key, balance bigint not null default 0);
insert into accounts select generate_series(0, 3);
create table log (place bigserial, n int, what text);
create table tenants (n int, tenant text default current_setting('app.tenant', true));
"""
GET = "select balance from accounts where id = $1"
SET = "update accounts set balance = $2 where id = $1"
NOTE = "insert into log (n, what) values ($1, $2)"
OF_TENANT = "insert into tenants (n) values ($1)"


def app_of(handle: Callable[[int, Tx], Awaitable[None]], **options: Any) -> App:
    app = App("turns")

    @app.handler("t", name="handle", **options)
    async def handler(n: int, tx: Tx) -> None:
        await handle(n, tx)

    return app


def sent(count: int) -> list[Sent]:
    return [Sent("t", n, id=f"id-{n}", key=str(n)) for n in range(count)]


# -- concurrency -------------------------------------------------------------------------------------------------------


async def test_concurrency_read_and_write_of_one_row_loses_no_update(exactly_once: ExactlyOnce) -> None:
    async def handle(n: int, tx: Tx) -> None:
        await asyncio.sleep(0)
        balance = await tx.fetchval(GET, 0)
        await asyncio.sleep(0.001)
        await tx.execute(SET, 0, balance + 1)

    trial = await exactly_once(app_of(handle, concurrency=8), schema=TABLES)
    assert {result.outcome for result in await trial.deliver(*sent(40))} == {"applied"}
    assert await trial.fetchval(GET, 0) == 40


async def test_concurrency_deferred_writes_of_a_message_stay_together(exactly_once: ExactlyOnce) -> None:
    """A flush sends no half of another message.

    What it reads includes all earlier writes of that message.
    """

    async def handle(n: int, tx: Tx) -> None:
        tx.defer("update accounts set balance = balance + 1 where id = $1", 0)
        await asyncio.sleep(0.001 * (n % 3))
        if n % 2:
            first, second = await tx.fetchrow(
                "select sum(balance) filter (where id = 0) - 1, sum(balance) filter (where id = 1) from accounts"
            )
            tx.defer(NOTE, n, "equal" if first == second else f"{first} and {second}")
        await asyncio.sleep(0)
        tx.defer("update accounts set balance = balance + 1 where id = $1", 1)

    trial = await exactly_once(app_of(handle, concurrency=8), schema=TABLES)
    await trial.deliver(*sent(60))
    assert await trial.fetchval(GET, 0) == await trial.fetchval(GET, 1) == 60
    assert await trial.fetchval("select array_agg(distinct what) from log") == ["equal"]


async def test_concurrency_what_ends_during_a_turn_comes_after_it(exactly_once: ExactlyOnce) -> None:
    reading, deferred = asyncio.Event(), asyncio.Event()

    async def handle(n: int, tx: Tx) -> None:
        if n == 0:
            before = await tx.fetchval(GET, 0)
            reading.set()
            await deferred.wait()
            tx.defer(SET, 0, before + 1)
            await tx.execute(NOTE, n, str(await tx.fetchval(GET, 0)))
            tx.defer("update accounts set balance = balance * 10 where id = 0")
        else:
            await reading.wait()
            tx.defer("update accounts set balance = balance + 5 where id = 0")
            deferred.set()

    trial = await exactly_once(app_of(handle, concurrency=2), schema=TABLES)
    await trial.deliver(*sent(2))
    assert await trial.fetchval("select what from log") == "1"
    assert await trial.fetchval(GET, 0) == 15


async def test_concurrency_waiting_before_the_first_statement_overlaps(exactly_once: ExactlyOnce) -> None:
    together = asyncio.Barrier(8)

    async def handle(n: int, tx: Tx) -> None:
        await together.wait()  # an HTTP call, say: all eight are in it at once
        await tx.execute("update accounts set balance = balance + 1 where id = 0")

    trial = await exactly_once(app_of(handle, concurrency=8), schema=TABLES)
    await trial.deliver(*sent(16))
    assert await trial.fetchval(GET, 0) == 16


async def test_concurrency_tasks_of_one_handler_share_its_turn(exactly_once: ExactlyOnce) -> None:
    async def handle(n: int, tx: Tx) -> None:
        async with asyncio.TaskGroup() as group:
            for account in range(4):
                group.create_task(tx.execute("update accounts set balance = balance + 1 where id = $1", account))
        async with tx.savepoint():
            await asyncio.gather(*(tx.execute(NOTE, n, "inside") for _ in range(3)))

    trial = await exactly_once(app_of(handle, concurrency=6), schema=TABLES)
    assert {result.outcome for result in await trial.deliver(*sent(24))} == {"applied"}
    assert await trial.fetchval("select sum(balance) from accounts") == 96
    assert await trial.fetchval("select count(*) from log") == 72


async def test_concurrency_a_failure_in_a_turn_passes_it_on(exactly_once: ExactlyOnce) -> None:
    async def handle(n: int, tx: Tx) -> None:
        if n % 5 == 3:
            raise Reject("before any statement")
        await tx.execute("update accounts set balance = balance + 1 where id = 0")
        await asyncio.sleep(0)
        if n % 5 == 1:
            raise Reject("after a statement")
        if n % 5 == 2:
            await tx.execute("select 1 / 0")

    trial = await exactly_once(app_of(handle, concurrency=4, retry=Retry(attempts=1)), schema=TABLES)
    results = await trial.deliver(*sent(20))
    assert [result.outcome for result in results] == [
        "dead-lettered" if n % 5 in (1, 2, 3) else "applied" for n in range(20)
    ]
    assert await trial.fetchval(GET, 0) == 8


# -- order of handlers, several commands, constraints --------------------------------------------------------------------


async def test_batch_order_holds_across_handlers_of_one_topic(exactly_once: ExactlyOnce) -> None:
    app = App("turns")

    @app.handler("t", name="double")
    async def double(n: int, tx: Tx) -> None:
        tx.defer("update accounts set balance = balance * 2 where id = 0")

    @app.handler("t", name="add")
    async def add(n: int, tx: Tx) -> None:
        tx.defer("update accounts set balance = balance + $1 where id = 0", n)

    trial = await exactly_once(app, schema=TABLES)
    await trial.deliver(*sent(10))
    expected = 0
    for n in range(10):
        expected = expected * 2 + n
    assert await trial.fetchval(GET, 0) == expected


async def test_defer_several_commands_without_parameters_run(exactly_once: ExactlyOnce) -> None:
    async def handle(n: int, tx: Tx) -> None:
        for _ in range(2):
            tx.defer(
                "update accounts set balance = balance + 1 where id = 0; update accounts set balance = balance * 2 where id = 0"
            )

    trial = await exactly_once(app_of(handle), schema=TABLES)
    assert {result.outcome for result in await trial.deliver(*sent(5))} == {"applied"}
    assert await trial.fetchval(GET, 0) == 2**11 - 2


@pytest.mark.parametrize("method", ["defer", "execute", "fetch", "fetchval", "fetchrow", "executemany"])
async def test_several_commands_that_cannot_work_fail_their_message(exactly_once: ExactlyOnce, method: str) -> None:
    async def handle(n: int, tx: Tx) -> None:
        if n == 1:
            text = "insert into log (n) values ($1); insert into log (n) values ($1)"
            pending = getattr(tx, method)(text, [(n,)] if method == "executemany" else n)
            if pending is not None:
                await pending
        tx.defer(NOTE, n, "")

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=TABLES)
    results = await trial.deliver(*sent(3))
    assert [result.outcome for result in results] == ["applied", "dead-lettered", "applied"]
    assert isinstance(results[1].exception, TransactionMisuse)
    assert str(results[1].exception).startswith(f"{method}: several commands in one text")
    assert "\n" not in str(results[1].exception)


DEFERRED = """
create table parents (id int primary key);
create table children (parent int references parents deferrable initially deferred);
create table siblings (parent int references parents deferrable initially immediate);
"""


@pytest.mark.parametrize("deferring", [True, False])
async def test_a_deferred_constraint_is_checked_for_each_message(exactly_once: ExactlyOnce, deferring: bool) -> None:
    """Message 1 violates it until message 2 comes; message 3 repairs itself.

    Alone, message 1 fails at COMMIT.
    """

    async def handle(n: int, tx: Tx) -> None:
        texts = {
            1: ["insert into children values (1)"],
            2: ["insert into parents values (1)"],
            3: ["insert into children values (3)", "insert into parents values (3)"],
        }
        for text in texts.get(n, []):
            if deferring:
                tx.defer(text)
            else:
                await tx.execute(text)

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=DEFERRED)
    results = await trial.deliver(*sent(4))
    assert [result.outcome for result in results] == ["applied", "dead-lettered", "applied", "applied"]
    assert await trial.fetchval("select array_agg(parent) from children") == [3]


@pytest.mark.parametrize("deferring", [True, False])
async def test_set_constraints_ends_with_its_message(exactly_once: ExactlyOnce, deferring: bool) -> None:
    async def handle(n: int, tx: Tx) -> None:
        texts = ["set constraints all deferred"] if n == 0 else []
        texts += [f"insert into siblings values ({n})", f"insert into parents values ({n})"]
        for text in texts:
            if deferring:
                tx.defer(text)
            else:
                await tx.execute(text)

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=DEFERRED)
    assert [result.outcome for result in await trial.deliver(*sent(3))] == ["applied", "dead-lettered", "dead-lettered"]


@pytest.mark.parametrize("last", ["defer", "execute"])
async def test_a_deferred_constraint_may_be_violated_within_a_message(exactly_once: ExactlyOnce, last: str) -> None:
    """A flush in the middle of a message is not its end."""

    async def handle(n: int, tx: Tx) -> None:
        tx.defer(f"insert into children values ({n})")
        await tx.fetchval("select 1")
        async with tx.savepoint():
            tx.defer(f"insert into children values ({n})")
        pending = getattr(tx, last)("insert into parents values ($1)", n)
        if pending is not None:
            await pending

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=DEFERRED)
    assert {result.outcome for result in await trial.deliver(*sent(5))} == {"applied"}


@pytest.mark.parametrize("way", ["defer", "execute"])
async def test_temporary_tables_and_cursors_end_with_their_message(exactly_once: ExactlyOnce, way: str) -> None:
    async def handle(n: int, tx: Tx) -> None:
        for text in (
            "create temp table staging (n int) on commit drop",
            f"insert into staging values ({n})",
            "declare c cursor for select n from staging",
            "insert into log (n) select n from staging",
        ):
            pending = getattr(tx, way)(text)
            if pending is not None:
                await pending

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=TABLES)
    assert {result.outcome for result in await trial.deliver(*sent(5))} == {"applied"}
    assert await trial.fetchval("select array_agg(n order by n) from log") == [0, 1, 2, 3, 4]


async def test_ddl_of_an_awaited_statement_is_seen_at_once(exactly_once: ExactlyOnce) -> None:
    """Writes are sent as arrays only until a statement-level trigger exists."""

    async def handle(n: int, tx: Tx) -> None:
        if n == 20:
            await tx.execute(
                "create function seen() returns trigger language plpgsql as $$ begin "
                "insert into log (n) select count(*) from fresh; return null; end $$"
            )
            await tx.execute("create trigger seen after insert on plain for each statement execute function seen()")
        tx.defer("insert into plain values ($1)", n)

    schema = TABLES + "create table plain (n int); create view fresh as select * from plain;"
    trial = await exactly_once(app_of(handle), schema=schema)
    await trial.deliver(*sent(40))
    assert await trial.fetchval("select array_agg(n order by n) from log") == list(range(21, 41))


# -- set_local ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"concurrency": 4}, {"batch": 3}], ids=str)
async def test_set_local_is_valid_for_its_own_message_only(exactly_once: ExactlyOnce, options: dict[str, Any]) -> None:
    app = App("turns")

    async def one(n: int, tx: Tx) -> None:
        tx.defer(OF_TENANT, n)  # before: it is not among them
        if n % 3:
            await tx.set_local("app.tenant", f"tenant {n % 3}")
        tx.defer(OF_TENANT, n)
        if n % 2:
            await tx.execute(OF_TENANT, n)
        if n % 3 == 2:
            async with tx.savepoint():
                await tx.set_local("App.Tenant", "another")
                tx.defer(OF_TENANT, n)

    if "batch" in options:

        @app.handler("t", name="handle", **options)
        async def handle_all(values: list[int], tx: Tx) -> None:
            for n in values:
                await tx.set_local("app.tenant", "")
                await one(n, tx)
    else:

        @app.handler("t", name="handle", **options)
        async def handle(n: int, tx: Tx) -> None:
            await one(n, tx)

    trial = await exactly_once(app, schema=TABLES)
    assert {result.outcome for result in await trial.deliver(*sent(30))} == {"applied"}
    rows = await trial.fetch(
        "select n, array_agg(coalesce(tenant, '') order by ctid) as t from tenants group by n order by n"
    )
    for n, tenants in rows:
        own = f"tenant {n % 3}" if n % 3 else ""
        assert tenants == ["", own, *([own] if n % 2 else []), *(["another"] if n % 3 == 2 else [])], n


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_set_local_is_reset_after_every_kind_of_failure(exactly_once: ExactlyOnce, concurrency: int) -> None:
    async def handle(n: int, tx: Tx) -> None:
        if n % 2:
            await tx.set_local("app.tenant", "leaked")
            if n % 8 == 1:
                raise Reject("no")
            if n % 8 == 3:
                await tx.execute("select 1 / 0")
            if n % 8 == 5:
                tx.defer("insert into accounts values (0)")
            if n % 8 == 7:
                try:
                    async with tx.savepoint():
                        await tx.set_local("app.tenant", "undone")
                        raise LookupError
                except LookupError:
                    tx.defer(OF_TENANT, n)
        else:
            tx.defer(OF_TENANT, n)

    trial = await exactly_once(app_of(handle, concurrency=concurrency, retry=Retry(attempts=1)), schema=TABLES)
    results = await trial.deliver(*sent(24))
    assert [result.outcome for result in results] == [
        "dead-lettered" if n % 8 in (1, 3, 5) else "applied" for n in range(24)
    ]
    rows = {(n, tenant or "") for n, tenant in await trial.fetch("select n, tenant from tenants")}
    assert rows == {(n, "") for n in range(0, 24, 2)} | {(n, "leaked") for n in range(7, 24, 8)}


async def test_set_local_gives_a_default_of_the_database_back(exactly_once: ExactlyOnce) -> None:
    async def handle(n: int, tx: Tx) -> None:
        if n % 2:
            await tx.set_local("app.tenant", str(n))
        tx.defer(OF_TENANT, n)

    trial = await exactly_once(app_of(handle), schema=TABLES)
    await trial.execute(
        "do $$ begin execute format('alter database %I set app.tenant = ''default''', current_database()); end $$"
    )
    await trial.deliver(*sent(12))
    rows = await trial.fetch("select n, tenant from tenants order by n")
    assert [tuple(row) for row in rows] == [(n, str(n) if n % 2 else "default") for n in range(12)]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("work_mem", "64MB", "write two words with a dot"),
        ("search_path", "x", "write two words with a dot"),
        ("app.", "x", "write two words with a dot"),
        ("app.te nant", "x", "write two words with a dot"),
        ("app.tenant'; drop table log", "x", "write two words with a dot"),
        (7, "x", "write two words with a dot"),
        ("app.tenant", 7, "pass a str"),
        ("app.tenant", None, "pass a str"),
        ("app.tenant", "a\0b", "NUL"),
    ],
)
async def test_set_local_refuses_in_one_line(exactly_once: ExactlyOnce, name: Any, value: Any, says: str) -> None:
    async def handle(n: int, tx: Tx) -> None:
        await tx.set_local(name, value)

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=TABLES)
    [result] = await trial.deliver(*sent(1))
    assert result.outcome == "dead-lettered" and isinstance(result.exception, TransactionMisuse)
    assert says in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize("way", ["execute", "defer", "fetchval"])
@pytest.mark.parametrize(
    "sql",
    [
        "select set_config('app.tenant', 'x', false)",
        "select pg_catalog.\"set_config\"('app.tenant', 'x', true)",
        "do $$ begin perform set_config('app.tenant', 'x', false); end $$",
    ],
)
async def test_set_config_is_refused_and_reaches_no_other_message(
    exactly_once: ExactlyOnce, way: str, sql: str
) -> None:
    async def handle(n: int, tx: Tx) -> None:
        if n == 1:
            pending = getattr(tx, way)(sql)
            if pending is not None:
                await pending
        tx.defer(OF_TENANT, n)

    trial = await exactly_once(app_of(handle, retry=Retry(attempts=1)), schema=TABLES)
    results = await trial.deliver(*sent(3))
    assert [result.outcome for result in results] == ["applied", "dead-lettered", "applied"]
    assert "tx.set_local" in str(results[1].exception)
    assert await trial.fetchval("select count(*) from tenants where coalesce(tenant, '') <> ''") == 0


ROWS_BY_TENANT = """
create table invoices (tenant text not null, n int);
alter table invoices enable row level security;
create policy own on invoices using (tenant = current_setting('app.tenant', true))
    with check (tenant = current_setting('app.tenant', true));
create table counts (tenant text, n int, visible int);
"""


async def test_set_local_serves_row_security_by_tenant(place: Place) -> None:
    """As a role that does not own the tables: the policies apply."""
    await migrated(place.dsn, ROWS_BY_TENANT)
    topic = await place.topic()
    app = App("tenants")

    @app.handler(topic, name="invoice", retry=Retry(attempts=1))
    async def invoice(message: Message[int], tx: Tx) -> None:
        n = message.value
        await tx.set_local("app.tenant", f"t{n % 3}")
        tx.defer("insert into invoices values ($1, $2)", f"t{n % 3}", n)
        visible = await tx.fetchval("select count(*) from invoices")
        tx.defer("insert into counts values ($1, $2, $3)", f"t{n % 3}", n, visible)

    @app.handler(topic, name="audit")
    async def audit(n: int, tx: Tx) -> None:
        tx.defer("insert into counts select 'none', $1::int, count(*) from invoices", n)

    await place.send(topic, *[Produced(n, id=f"i{n}") for n in range(12)])
    await consume_all(app, place.settings())
    assert await letters(place.dsn) == []
    assert await value(place.dsn, "select count(*) from invoices") == 12
    rows = await query(place.dsn, "select tenant, n, visible from counts order by n, tenant")
    assert rows == sorted(
        [("none", n, 0) for n in range(12)] + [(f"t{n % 3}", n, n // 3 + 1) for n in range(12)],
        key=lambda row: (row[1], row[0]),
    )
