"""Codecs and search_path are for handlers, and not for our statements.

The oracle is plain asyncpg with the same codecs.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import asyncpg
import pytest
from harness import Place, Sent, as_worker, consume_all, execute, migrated, query, settings_for, value
from outgoing import publish_all, records_of
from rebuild_runs import rebuilt
from replay_runs import ledger_id, outcome_counts, run_replay

from consumer import App, Message, Misconfigured, RegistrationError, Reject, Retry, Settings, Tx
from consumer.dead_letters.retry import DeadLetterRetrier
from consumer.postgres.application_codecs import OwnStatements
from consumer.postgres.connection import connect
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.testing import ExactlyOnce
from consumer.testing import Sent as TrialSent
from consumer.transaction.scope import Scope

TYPES = """
create type mood as enum ('calm', 'angry');
create type money_of as (amount int, currency varchar);
create table things (n int, id uuid, body jsonb, price numeric, name text, mood mood, cost money_of, at timestamptz,
                     size int8, raw bytea);
"""
INSERT = "insert into things values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
COLUMNS = "id, body, price, name, mood, cost, at, size, raw"


class Mood(Enum):
    CALM = "calm"
    ANGRY = "angry"


async def own_types(connection: Any) -> None:
    """Codecs of builtin and of own types; two change values."""
    catalog = {"schema": "pg_catalog"}
    await connection.set_type_codec("jsonb", **catalog, encoder=json.dumps, decoder=json.loads)
    await connection.set_type_codec("numeric", **catalog, encoder=lambda pence: f"{pence / 100}", decoder=Decimal)
    await connection.set_type_codec("text", **catalog, encoder=str.upper, decoder=str.lower)
    await connection.set_type_codec(
        "uuid", **catalog, encoder=lambda id: id.hex, decoder=lambda text: uuid.UUID(text), format="text"
    )
    await connection.set_type_codec(
        "int8", **catalog, encoder=lambda n: str(n * 2), decoder=lambda text: int(text) // 2
    )
    await connection.set_type_codec("timestamptz", **catalog, encoder=str, decoder=str)
    await connection.set_type_codec(
        "bytea", **catalog, encoder=lambda text: rf"\x{text}", decoder=lambda text: text[2:]
    )
    await connection.set_type_codec("mood", encoder=lambda mood: mood.value, decoder=Mood)
    await connection.set_type_codec("money_of", encoder=tuple, decoder=list, format="tuple")


def thing(n: int) -> tuple[Any, ...]:
    body = [{"n": n, "é": ['"', "NULL", None]}, "text", 1.5, {}][n % 4]
    at = str(datetime(2026, 1, 1 + n % 9, tzinfo=UTC))
    mood = Mood.ANGRY if n % 3 else Mood.CALM
    return n, uuid.UUID(int=n % 5), body, n * 100, f"name {n}", mood, (n, "eur"), at, n, f"{n:02x}"


THINGS = [thing(n) for n in range(24)]


async def things(connection: Any) -> list[Any]:
    return [tuple(row) for row in await connection.fetch(f"select n, {COLUMNS} from things order by n")]


async def settings_of(dsn: str) -> Settings:
    await migrated(dsn, TYPES)
    await query(dsn, 'grant all on things to "test-worker"')
    return settings_for(as_worker(dsn), "127.0.0.1:1", None)


@pytest.mark.parametrize("pooler", [False, True], ids=["direct", "as behind a pooler"])
async def test_handlers_write_and_read_as_plain_asyncpg_with_the_codecs(database: str, pooler: bool) -> None:
    settings = (await settings_of(database)).model_copy(update={"postgres_pooler": pooler})
    plain = await asyncpg.connect(database)
    session = await Session.open(settings, init=own_types)
    try:
        await own_types(plain)
        for row in THINGS:
            await plain.execute(INSERT, *row)
        await plain.execute("update things set size = size + $2, name = $3 where id = $1", uuid.UUID(int=1), 5, "x")
        expected, read = await query(database, "select * from things order by n"), await things(plain)
        await plain.execute("truncate things")
        await session.begin()
        scope = Scope(session.handler_connection, session.bulk_writer, session.connection)
        tx = Tx(scope, object(), None)
        for row in THINGS[:10]:
            tx.defer(INSERT, *row)
        assert await tx.fetchval("select count(*) from things") == 5  # int8 is halved; and 10 rows were sent
        await tx.executemany(INSERT, THINGS[10:12])
        await tx.execute(INSERT, *THINGS[12])
        for row in THINGS[13:]:
            tx.defer(INSERT, *row)
        tx.defer("update things set size = size + $2, name = $3 where id = $1", uuid.UUID(int=1), 5, "x")
        assert await things(tx) == read
        await tx.set_local("app.tenant", "Ann")  # a statement of ours, with a text as its argument
        assert await tx.fetchval("select current_setting('app.tenant') = 'Ann'")
        await tx.end()
        await session.commit()
        assert await query(database, "select * from things order by n") == expected
    finally:
        await plain.close()
        session.close()


@pytest.mark.parametrize("key", ["uuid", "int8", "text"])
async def test_deferred_writes_by_a_key_with_a_codec_keep_their_order(database: str, key: str) -> None:
    """Values that differ in Python may be one key in the database."""
    settings = await settings_of(database)
    await query(database, f"create table kept (key {key} primary key, log text not null default '')")
    await query(database, 'grant all on kept to "test-worker"')
    one = {"uuid": uuid.UUID(int=1), "int8": 8, "text": "a"}[key]

    async def init(connection: Any) -> None:
        same = {"uuid": str(one), "int8": "8", "text": "a"}[key]
        await connection.set_type_codec(key, schema="pg_catalog", encoder=lambda _: same, decoder=str)

    writes = [("update kept set log = log || $2::varchar || ',' where key = $1", (n, f"{n}")) for n in range(30)]
    session = await Session.open(settings, init=init)
    try:
        await session.connection.execute("insert into kept values ($1)", one)
        await session.begin()
        await Scope(session.handler_connection, session.bulk_writer, session.connection).send([writes])
        await session.commit()
    finally:
        session.close()
    assert await value(database, "select log from kept") == "".join(f"{n}," for n in range(30))


# -- the framework's own statements ------------------------------------------------------------------------------------


def refuse(_: object) -> NoReturn:
    raise AssertionError("a statement of the framework has met a codec of the application")


async def poison(connection: Any) -> None:
    """A codec that raises for every builtin type, and another search_path."""
    scalars = await connection.fetch("""
        select typname from pg_type where typnamespace = 'pg_catalog'::regnamespace and typtype = 'b' and typelem = 0
        and typname !~ '^pg_' """)
    for (name,) in scalars:
        await connection.set_type_codec(name, schema="pg_catalog", encoder=refuse, decoder=refuse)
    await connection.execute("set search_path = elsewhere")


async def test_statements_of_the_framework_meet_no_codec_of_the_application(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = App(f"codecs-{uuid.uuid4().hex[:8]}", connection_init=poison, publishes=[out])
    fails = {"fails"}

    @app.handler(topic, name="settle", retry=Retry(attempts=2, base=0.01, cap=0.02))
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        id = message.value["id"]
        if id in fails:
            raise ValueError
        if id == "rejected":
            raise Reject("no")
        await tx.execute(f"insert into effects values ('{id}', 1, 1)")
        tx.defer("update accounts set balance = balance + 1 where id = 1")
        tx.publish(out, {"of": id})

    await execute(place.dsn, "create schema elsewhere; alter table effects set schema elsewhere")
    await query(place.dsn, "alter table accounts set schema elsewhere")
    await query(place.dsn, 'grant usage on schema elsewhere to "test-worker"')
    sent = [Sent({"id": id}, id=id, key=key) for id, key in [("a", "1"), ("fails", "2"), ("b", "2"), ("rejected", "3")]]
    await place.send(topic, *sent, sent[0], Sent({"id": "other"}, id="a", key="1"), Sent(b"{", id="unreadable"))
    await publish_all(app, place)
    assert sorted(await place.reasons()) == ["behind", "failed", "id_conflict", "rejected", "unreadable"]
    assert len(await records_of(place.kafka, out)) == 1

    fails.clear()
    retrier = await DeadLetterRetrier.open(app, place.settings(), "ann")
    try:
        for handler in app.handlers.values():
            handler.bind({})
        rows = await query(
            place.dsn, "select dead_letter from consumer.dead_letters where reason <> 'unreadable' order by 1"
        )
        results = [result.outcome async for result in retrier.retry([row[0] for row in rows])]
        assert sorted(results) == ["applied", "applied", "id_conflict", "rejected"]
    finally:
        retrier.close()
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("a"))
    assert outcome_counts(await run_replay(place, app, topic))["missing"] == 1
    await query(place.dsn, "delete from elsewhere.effects where id = 'a'")
    await query(place.dsn, "update elsewhere.accounts set balance = balance - 1 where id = 1")
    assert outcome_counts(await run_replay(place, app, topic, mode="apply"))["applied_now"] == 1
    assert (await rebuilt(place, app)).agrees
    assert await query(place.dsn, "select id from elsewhere.effects order by id") == [("a",), ("b",), ("fails",)]


# -- what is wrong ------------------------------------------------------------------------------------------------------


async def raises(connection: Any) -> None:
    await connection.fetch("select 'secret' from nowhere")


async def unfinished(connection: Any) -> None:
    await connection.execute("begin")


async def unknown(connection: Any) -> None:
    await connection.set_type_codec("moood", encoder=str, decoder=str)


async def without_schema(connection: Any) -> None:
    await connection.set_type_codec("jsonb", encoder=str, decoder=str)


async def lost(connection: Any) -> None:
    await connection.execute("select pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize(
    ("init", "kind", "text"),
    [
        (
            raises,
            Misconfigured,
            'failed: UndefinedTableError at {file}:{line} (relation "nowhere" does not exist); correct',
        ),
        (unfinished, Misconfigured, "left a transaction open; commit it, or begin none"),
        (
            unknown,
            Misconfigured,
            "failed: ValueError at {file}:{line} (unknown type: public.moood); correct it, or create",
        ),
        (
            without_schema,
            Misconfigured,
            'unknown type: public.jsonb); correct it, or create what it needs; types of PostgreSQL itself need schema="pg_catalog"',
        ),
        (lost, Outage, "lost the connection"),
    ],
)
async def test_an_init_that_fails_is_one_error(database: str, init: Any, kind: type[Exception], text: str) -> None:
    settings = await settings_of(database)
    with pytest.raises(kind) as raised:
        await Session.open(settings, init=init)
    line = init.__code__.co_firstlineno + 1
    assert text.format(file=Path(__file__).name, line=line) in str(raised.value)
    assert "the App's connection_init" in str(raised.value) and "secret" not in str(raised.value)


async def test_an_init_cannot_take_away_the_limits_of_workers(database: str) -> None:
    async def init(connection: Any) -> None:
        await connection.execute("set lock_timeout = 0; set synchronous_commit = off; set search_path = elsewhere")

    settings = await settings_of(database)
    connection = await connect(settings, init=init)
    try:
        assert not isinstance(connection, OwnStatements)  # no codecs: one kind of statement
        shown = [
            await connection.fetchval(f"show {name}") for name in ("lock_timeout", "synchronous_commit", "search_path")
        ]
        assert shown == [f"{settings.postgres_lock_timeout_seconds:g}s", "on", "elsewhere"]
    finally:
        connection.terminate()


def test_an_init_that_is_no_coroutine_function_is_refused() -> None:
    with pytest.raises(RegistrationError, match="connection_init= is no `async def` function; give"):
        App("billing", connection_init=lambda connection: None)  # type: ignore[arg-type, return-value]


async def test_a_codec_that_is_missing_later_stops_retry_and_rebuild(place: Place) -> None:
    topic = await place.topic()
    app = App(f"codecs-{uuid.uuid4().hex[:8]}", connection_init=own_types)
    fail = True

    @app.handler(topic, name="settle")
    async def settle(body: dict[str, Any], tx: Tx) -> None:
        if fail:
            raise Reject("not yet")
        await tx.execute(INSERT, *thing(body["n"]))

    await execute(place.dsn, TYPES)
    await query(place.dsn, 'grant all on things to "test-worker"')
    await place.send(topic, Sent({"n": 1}, id="1"))
    await consume_all(app, place.settings())
    await execute(place.dsn, "drop table things; drop type mood")
    before = await query(place.dsn, "select state, attempts from consumer.dead_letters")
    with pytest.raises(Misconfigured, match=r"unknown type: public\.mood"):
        await DeadLetterRetrier.open(app, place.settings(), "ann")
    with pytest.raises(Misconfigured, match=r"unknown type: public\.mood"):
        await rebuilt(place, app)
    assert await query(place.dsn, "select state, attempts from consumer.dead_letters") == before

    fail = False
    await execute(place.dsn, TYPES.replace("create type money_of as (amount int, currency varchar);", ""))
    await query(place.dsn, 'grant all on things to "test-worker"')
    retrier = await DeadLetterRetrier.open(app, place.settings(), "ann")
    try:
        for handler in app.handlers.values():
            handler.bind({})
        number = await value(place.dsn, "select dead_letter from consumer.dead_letters")
        assert [done.outcome async for done in retrier.retry(number)] == ["applied"]
    finally:
        retrier.close()
    assert (await rebuilt(place, app)).agrees


async def test_tests_of_an_application_use_its_codecs(exactly_once: ExactlyOnce) -> None:
    app = App("codecs", connection_init=own_types)

    @app.handler("things")
    async def settle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, *thing(body["n"]))

    trial = await exactly_once(app, schema=TYPES)
    await trial.deliver(TrialSent("things", {"n": 5}, id="5"))
    assert tuple((await trial.fetch("select body, mood from things"))[0]) == (thing(5)[2], Mood.ANGRY)
