"""Rows that handlers store outside their transaction are noticed.

Whatever connection, driver or process stores them.
"""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from consumer import App, Message, Tx
from consumer.testing import ExactlyOnce, Sent, outside_statements

TABLES = """
create table effects (id text not null);
create table mails (id text not null);
insert into mails values ('before');
"""
MAIL = "insert into mails values ('a mail')"

PROCESS = """
import asyncio, sys, asyncpg
async def main():
    connection = await asyncpg.connect(sys.argv[1])
    await connection.execute(sys.argv[2])
    await connection.close()
asyncio.run(main())
"""


class Elsewhere:
    """Connections beside the worker's.

    unseen: run in a thread, which hides them from asyncpg, as other drivers are hidden.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection: Any = None
        self.statement: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def unseen(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await work()

        begun = contextvars.Context().run(asyncio.run_coroutine_threadsafe, run(), self._loop)
        return await asyncio.wrap_future(begun)

    async def connect(self) -> None:
        self.connection = await asyncpg.connect(self.dsn)
        self.statement = await self.connection.prepare(MAIL)

    async def end(self) -> None:
        if self.connection is not None:
            with suppress(Exception):
                await self.unseen(self.connection.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def prepared_in_its_own_transaction(place: Elsewhere) -> None:
    async with place.connection.transaction():
        await place.statement.fetch()


async def autocommitted(place: Elsewhere) -> None:
    await place.connection.execute(MAIL)


async def updated_to_the_same(place: Elsewhere) -> None:
    await place.connection.execute("update mails set id = id")


async def deleted(place: Elsewhere) -> None:
    await place.connection.execute("delete from mails")


async def truncated(place: Elsewhere) -> None:
    await place.connection.execute("truncate mails")


async def copied(place: Elsewhere) -> None:
    await place.connection.copy_records_to_table("mails", records=[("a mail",)])


async def made_a_table(place: Elsewhere) -> None:
    await place.connection.execute("create table if not exists more (id int)")


async def connected_for_it(place: Elsewhere) -> None:
    connection = await asyncpg.connect(place.dsn)
    await connection.execute(MAIL)
    await connection.close()


async def left_open(place: Elsewhere) -> None:
    if not place.connection.is_in_transaction():
        await place.connection.execute("begin")
    await place.connection.execute(MAIL)


async def begun_by_one_call_and_committed_by_another(place: Elsewhere) -> None:
    if place.connection.is_in_transaction():
        await place.connection.execute("commit")
    else:
        await left_open(place)


WAYS = [
    prepared_in_its_own_transaction,
    autocommitted,
    updated_to_the_same,
    deleted,
    truncated,
    copied,
    made_a_table,
    connected_for_it,
    left_open,
    begun_by_one_call_and_committed_by_another,
]


def app_of(act: Callable[[Message[Any]], Awaitable[None]]) -> App:
    app = App("shop")

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer("insert into effects values ($1)", message.id)
        await act(message)

    return app


def payments(number: int = 2) -> list[Sent]:
    return [Sent("payments", {"n": n}, id=f"p{n}", key=str(n)) for n in range(number)]


# As for a role that may not see what the sessions of others run.
NO_SESSIONS = (
    "select 0 as sessions, null::int as pid, '' as application_name, '' as query, null::timestamptz as query_start"
)


@pytest.mark.parametrize("shown", ["by asyncpg here", "by another driver", "by rows alone"])
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
async def test_rows_stored_outside_are_found(
    exactly_once: ExactlyOnce, way: Callable[[Elsewhere], Awaitable[None]], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown == "by asyncpg here"
    if shown == "by rows alone":
        monkeypatch.setattr(outside_statements, "SESSIONS", f"{NO_SESSIONS} where $1::int[] is not null")
    places: list[Elsewhere] = []

    async def act(message: Message[Any]) -> None:
        [place] = places
        if seen:
            await way(place)
        else:
            await place.unseen(lambda: way(place))

    trial = await exactly_once(app_of(act), schema=TABLES)
    place = Elsewhere(trial.dsn)
    places.append(place)
    try:
        await (place.connect() if seen else place.unseen(place.connect))
        await trial.deliver(*payments())
        assert await trial.fetchval("select count(*) from effects") == 2
        with pytest.raises(AssertionError, match=r"settle.*, through ") as caught:
            trial.assert_nothing_outside()
        if shown == "by rows alone":
            assert "public." in str(caught.value) and "through another connection" in str(caught.value)
    finally:
        if seen and place.connection is not None:
            place.connection.terminate()
            place.connection = None
        await place.end()


async def test_rows_stored_by_another_process_are_found_at_each_crash(
    exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside_statements, "SESSIONS", f"{NO_SESSIONS} where $1::int[] is not null")
    dsn: list[str] = []

    async def act(message: Message[Any]) -> None:
        subprocess.run([sys.executable, "-c", PROCESS, dsn[0], MAIL], check=True)  # noqa: ASYNC221

    for step in ("handled", "before_commit", "committed"):
        trial = await exactly_once(app_of(act), schema=TABLES)
        dsn[:] = [trial.dsn]
        await trial.deliver(*payments(1), crash_at=step)
        [statement] = trial.outside_statements()
        assert (statement.handler, statement.message) == ("settle", "payments:0@0")
        assert statement.statement == "unknown: it changed rows of public.mails"


@pytest.mark.parametrize("calls", [1, 2, 4])
async def test_prove_with_rows_stored_outside_by_a_single_call_fails(exactly_once: ExactlyOnce, calls: int) -> None:
    """The first call is the undisturbed run, on a copy.

    The handler writes to the database that it knows.
    """
    dsn: list[str] = []
    call_count = 0

    async def act(message: Message[Any]) -> None:
        nonlocal call_count
        call_count += 1
        if call_count == calls:
            subprocess.run([sys.executable, "-c", PROCESS, dsn[0], MAIL], check=True)  # noqa: ASYNC221

    trial = await exactly_once(app_of(act), schema=TABLES)
    dsn[:] = [trial.dsn]
    with pytest.raises(AssertionError, match=r"(?s)outside their transactions.*settle.*"):
        await trial.prove(*payments(1))


async def test_a_function_that_stores_rows_through_dblink_is_found(exactly_once: ExactlyOnce) -> None:
    app = App("shop")

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        await tx.execute("insert into effects values ($1)", message.id)
        await tx.execute("select dblink_exec($1, $2)", dsn[0], MAIL)

    trial = await exactly_once(app, schema=TABLES)
    dsn = [trial.dsn]
    if not await trial.fetchval("select exists (select from pg_available_extensions where name = 'dblink')"):
        pytest.skip("this PostgreSQL has no dblink")
    await trial.execute("create extension dblink")
    await trial.deliver(*payments(1))
    with pytest.raises(AssertionError, match=r"settle.*, through "):
        trial.assert_nothing_outside()


async def test_rows_of_the_workers_transaction_are_not_outside(exactly_once: ExactlyOnce) -> None:
    """Statements of any kind, with savepoints, rollbacks and deferred triggers.

    While other databases are written to.
    """
    app = App("shop")
    other: list[asyncpg.Connection] = []

    @app.handler("payments", batch=2)
    async def settle(messages: list[Message[dict[str, Any]]], tx: Tx) -> None:
        for message in messages:
            await tx.execute("insert into effects values ($1)", message.id)
            await tx.execute("insert into parts values (1), (11)")
            await tx.execute("insert into later values (1)")
            await tx.copy_records_to_table("mails", records=[("copied",)])
            with suppress(asyncpg.PostgresError):
                async with tx.savepoint():
                    await tx.execute("delete from mails")
                    await tx.execute("select 1 / 0")
            async with tx.savepoint():
                await tx.execute("update mails set id = id")
            await tx.execute("truncate short")
            await tx.execute(f"create table made_{message.value['n']} (id int)")
            await tx.execute("refresh materialized view seen")
        await other[0].execute("insert into noise values (1)")

    schema = """
        create table parts (n int) partition by range (n);
        create table parts_low partition of parts for values from (0) to (10);
        create table parts_high partition of parts for values from (10) to (20);
        create table short (n int); insert into short values (1);
        create materialized view seen as select count(*) from mails;
        create table later (n int); create table late (n int);
        create function note() returns trigger language plpgsql as $$ begin insert into late values (1); return null; end $$;
        create constraint trigger t after insert on later deferrable initially deferred for each row execute function note();
    """
    trial = await exactly_once(app, schema=TABLES + schema)
    neighbour = await exactly_once(app, schema="create table noise (n int)")
    other.append(await asyncpg.connect(neighbour.dsn))
    try:
        for step in ("handled", "before_commit", "committed"):
            await trial.deliver(*payments(4), crash_at=step, batch=2)
            await trial.execute("insert into mails values ('by the test')")
        await trial.deliver(batch=2)
        await trial.deliver_again()
    finally:
        await other[0].close()
    assert await trial.fetchval("select count(*) from late") > 0
    # asyncpg tells of statements on the neighbour's connection; no row of this database was stored by others.
    assert {statement.statement for statement in trial.outside_statements()} == {"insert into noise values (1)"}


async def test_a_transaction_that_was_open_before_is_not_laid_to_a_handler(exactly_once: ExactlyOnce) -> None:
    async def act(message: Message[Any]) -> None:
        pass

    trial = await exactly_once(app_of(act), schema=TABLES)
    connection = await asyncpg.connect(trial.dsn)
    try:
        async with connection.transaction():
            await connection.execute(MAIL)
            await trial.deliver(*payments())
        await trial.deliver_again()
        trial.assert_nothing_outside()
    finally:
        await connection.close()
