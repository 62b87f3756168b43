"""Sessions and deferred statements of SQLAlchemy in handlers.

The oracle is SQLAlchemy on a connection of its own, which commits by itself.
"""

from __future__ import annotations

import asyncio
import enum
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
import sqlmodel
from harness import Place, Sent, as_worker, consume_all, execute, migrated, query, settings_for, value
from rebuild_runs import message_id, rebuilt
from replay_runs import outcome_counts, run_replay
from sqlalchemy import (
    ARRAY,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.dialects.postgresql.base import PGCompiler
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from sqlalchemy.orm import Session as SyncSession
from sqlmodel.ext.asyncio.session import AsyncSession as SqlModelSession

from consumer import App, Message, RegistrationError, Reject, Retry, TransactionMisuse, Tx
from consumer.deferred_writes.grammar import shape_of
from consumer.ext.sqlalchemy import session
from consumer.ext.sqlalchemy_statements import compiled
from consumer.postgres.session import Session
from consumer.transaction.scope import Scope

NO_RETRY = Retry(attempts=1, base=0.01, cap=0.02)


class Base(DeclarativeBase):
    pass


class State(enum.Enum):
    NEW = "new"
    PAID = "paid"


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[uuid.UUID] = mapped_column(unique=True)
    state: Mapped[State] = mapped_column(default=State.NEW)
    body: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    tags: Mapped[list[str]] = mapped_column(ARRAY(String), default=lambda: ["a", 'b"'])
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2), default=Decimal("1.50"))
    count: Mapped[int] = mapped_column(server_default=text("7"))
    at: Mapped[datetime | None] = mapped_column(server_default=None, default=None)
    lines: Mapped[list[Line]] = relationship(back_populates="order", order_by="Line.id", cascade="all, delete-orphan")


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    name: Mapped[str]
    order: Mapped[Order] = relationship(back_populates="lines")


LINES: Any = Line.__table__


class Note(sqlmodel.SQLModel, table=True):
    __tablename__ = "notes"
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    body: str = sqlmodel.Field(default="none")


TABLES = """
create type state as enum ('NEW', 'PAID');
create table orders (id serial primary key, reference uuid unique not null, state state not null, body jsonb,
                     tags varchar[] not null, price numeric(10, 2) not null, count int not null default 7, at timestamp);
create table lines (id serial primary key, order_id int not null references orders, name text not null);
create table notes (id serial primary key, body text not null);
"""
EVERYTHING = """
select (select json_agg(o order by id) from orders o)::text, (select json_agg(l order by id) from lines l)::text,
       (select json_agg(n order by id) from notes n)::text
"""
ONE = uuid.UUID(int=1)


@pytest.fixture
async def dsn(database: str) -> str:
    await migrated(database, TABLES)
    await query(database, 'grant all on all tables in schema public to "test-worker"')
    await query(database, 'grant all on all sequences in schema public to "test-worker"')
    return database


@asynccontextmanager
async def transaction(dsn: str, init: Any = None) -> AsyncIterator[Tx]:
    """A Tx as a worker has it, committed at the end."""
    connection = await Session.open(settings_for(as_worker(dsn), "127.0.0.1:1", None), init=init)
    try:
        await connection.begin()
        scope = Scope(connection.handler_connection, connection.bulk_writer, connection.connection, connection.preparer)
        tx = Tx(scope, object(), asyncio.current_task())
        yield tx
        if not tx.close():
            await tx.end()
        if tx.error is not None:
            raise tx.error
        await scope.flush()
        await connection.commit()
    finally:
        connection.close()


@asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[AsyncSession]:
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
    try:
        async with AsyncSession(engine, expire_on_commit=False) as opened:
            yield opened
            await opened.commit()
    finally:
        await engine.dispose()


def idle_of(tx: Tx) -> list[Any]:
    """The connections of SQLAlchemy that wait for the next message."""
    assert tx._scope.preparer is not None
    return tx._scope.preparer.idle


async def columns(s: AsyncSession) -> object:
    """JSON, enums, arrays, defaults of both sides, RETURNING."""
    order = Order(reference=ONE, body={"é": [1, None, "'"]}, at=datetime(2026, 1, 2, 3))
    none = Order(reference=uuid.UUID(int=2), body=None, state=State.PAID, tags=[])
    s.add_all([order, none])
    await s.flush()
    assert (order.count, order.id, none.id) == (7, 1, 2)
    await s.refresh(none)
    rows = await s.execute(
        update(Order).where(Order.body["é"][0].astext == "1").values(state=State.PAID).returning(Order.id, Order.state)
    )
    s.expunge_all()
    read = (await s.scalars(select(Order).order_by(Order.id))).all()
    return [tuple(row) for row in rows], [
        (one.reference, one.state, one.body, one.tags, one.price, one.count, one.at) for one in read
    ]


async def relations(s: AsyncSession) -> object:
    order = Order(reference=ONE, body={}, lines=[Line(name="a"), Line(name="b")])
    s.add(order)
    await s.commit()  # flushes
    order.lines[0].name = "changed"
    order.lines.pop()
    await s.flush()
    s.expunge_all()
    [read] = (await s.scalars(select(Order).options(selectinload(Order.lines)))).all()
    joined = await s.execute(select(Order.id, func.count(Line.id)).join(Line).group_by(Order.id))
    return [line.name for line in read.lines], [tuple(row) for row in joined]


async def bulk(s: AsyncSession) -> object:
    """Many rows: with RETURNING and without, upserts, updates by key."""
    orders = [{"reference": uuid.UUID(int=n), "body": {"n": n}} for n in range(1, 2500)]
    ids = (await s.scalars(insert(Order).returning(Order.id), orders)).all()
    await s.execute(insert(Line), [{"order_id": id, "name": f"line {id}"} for id in ids[:100]])
    await s.execute(update(Order), [{"id": id, "count": id} for id in ids[:50]])
    await s.execute(
        upsert(Order)
        .values(reference=ONE, body={"again": True})
        .on_conflict_do_update(index_elements=["reference"], set_={"body": {"again": True}})
    )
    gone: Any = await s.execute(delete(Line).where(Line.id > 90))
    return len(ids), gone.rowcount, await s.scalar(select(func.sum(Order.count)))


async def savepoints(s: AsyncSession) -> object:
    s.add(Order(reference=ONE, body={}))
    await s.flush()
    with pytest.raises(IntegrityError):
        async with s.begin_nested():
            s.add(Order(reference=ONE, body={"twice": True}))
    with pytest.raises(ZeroDivisionError):
        async with s.begin_nested():
            s.add(Line(order_id=1, name="undone"))
            await s.flush()
            async with s.begin_nested():
                s.add(Line(order_id=1, name="undone, too"))
            raise ZeroDivisionError
    outer = await s.begin_nested()
    s.add(Line(order_id=1, name="kept"))
    inner = await s.begin_nested()
    s.add(Line(order_id=1, name="undone"))
    await s.flush()
    await inner.rollback()
    await outer.commit()
    return [line.name for line in (await s.scalars(select(Line))).all()]


async def open_savepoints(s: AsyncSession) -> None:
    """At the end they are committed with the session."""
    for body in ("outer", "inner"):
        await s.begin_nested()
        s.add(Note(body=body))


async def models(s: AsyncSession) -> object:
    note = Note(body="from sqlmodel")
    s.add(note)
    await s.flush()
    return note.id, [one.body for one in (await s.scalars(sqlmodel.select(Note))).all()]


@pytest.mark.parametrize("work", [columns, relations, bulk, savepoints, open_savepoints, models])
async def test_a_session_on_a_tx_does_what_one_of_its_own_does(
    dsn: str, work: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    async with plain(dsn) as own:
        expected = await work(own)
    stored = await query(dsn, EVERYTHING)
    await query(dsn, "truncate orders, lines, notes restart identity cascade")

    async def init(connection: Any) -> None:  # codecs are for SQL as text: SQLAlchemy has types of its own
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        await connection.set_type_codec("uuid", schema="pg_catalog", encoder=str, decoder=str)
        await connection.set_type_codec("int4", schema="pg_catalog", encoder=str, decoder=str)

    for codecs in (None, init):
        async with transaction(dsn, codecs) as tx, session(tx) as s:
            assert await work(s) == expected
        assert await query(dsn, EVERYTHING) == stored
        await query(dsn, "truncate orders, lines, notes restart identity cascade")


async def test_a_session_sends_first_what_was_deferred_before(dsn: str) -> None:
    async with transaction(dsn) as tx:
        for _ in range(3):
            tx.defer("insert into notes (body) values ($1)", "deferred")
            async with session(tx, SqlModelSession) as s:
                assert isinstance(s, SqlModelSession)
                counted = await s.exec(sqlmodel.select(func.count()).select_from(Note))
                before = counted.one()
                s.add(Note(body="orm"))
            assert await tx.fetchval("select count(*) from notes") == before + 1
        assert len(idle_of(tx)) == 1
    bodies = await query(dsn, "select body from notes order by id")
    assert bodies == [("deferred",), ("orm",)] * 3


@pytest.mark.parametrize(
    "sql", ["commit", "rollback", "begin", "savepoint a", "set lock_timeout = 0", "select 1; select 2"]
)
async def test_a_session_cannot_control_the_transaction(dsn: str, sql: str) -> None:
    with pytest.raises((TransactionMisuse, asyncpg.PostgresSyntaxError)):
        async with transaction(dsn) as tx, session(tx) as s:
            await s.execute(text("insert into notes (body) values ('x')"))
            await s.execute(text(sql))
    assert await value(dsn, "select count(*) from notes") == 0


async def test_a_rollback_is_refused_and_one_that_is_swallowed_fails_the_message(dsn: str) -> None:
    async def asked(s: AsyncSession) -> None:
        s.add(Note(body="x"))
        await s.flush()
        await s.rollback()

    async def swallowed(s: AsyncSession) -> None:
        with pytest.raises(ZeroDivisionError):
            async with s.begin():
                s.add(Note(body="x"))
                await s.flush()
                raise ZeroDivisionError

    async def failed(s: AsyncSession) -> None:
        s.add(Order(reference=ONE, body={}))
        s.add(Order(reference=ONE, body={}))
        with pytest.raises(IntegrityError):
            await s.flush()
        with pytest.raises(PendingRollbackError):
            await s.execute(select(Note))

    for work, error in (
        (asked, TransactionMisuse),
        (swallowed, TransactionMisuse),
        (failed, asyncpg.UniqueViolationError),
    ):
        with pytest.raises(error):
            async with transaction(dsn) as tx, session(tx) as s:
                await work(s)
        assert (await query(dsn, EVERYTHING)) == [(None, None, None)]


async def test_an_error_leaves_the_block_as_that_of_the_driver(dsn: str) -> None:
    with pytest.raises(asyncpg.NotNullViolationError) as raised:
        async with transaction(dsn) as tx:
            with pytest.raises(asyncpg.NotNullViolationError):
                async with session(tx) as s:
                    await s.execute(insert(Order).values(reference=None, body={}))
    assert raised.value.column_name == "reference"


async def test_error_inside_of_an_open_savepoint_stays_what_it_is(dsn: str) -> None:
    async def twice(s: AsyncSession) -> None:
        await s.execute(insert(Note), [{"id": 1}, {"id": 1}])

    async def rejected(s: AsyncSession) -> None:
        raise Reject("no")

    for work, error in ((twice, asyncpg.UniqueViolationError), (rejected, Reject)):
        with pytest.raises(error):
            async with transaction(dsn) as tx:
                with pytest.raises(error):
                    async with session(tx) as s:
                        await s.begin_nested()
                        s.add(Note(body="undone"))
                        await s.flush()
                        await work(s)
                assert len(idle_of(tx)) == 1
                await tx.execute("select 1")  # the savepoint is undone
                raise error
    assert await value(dsn, "select count(*) from notes") == 0


async def test_a_cancelled_statement_closes_nothing_and_fails_the_message(dsn: str) -> None:
    with pytest.raises(TimeoutError):
        async with transaction(dsn) as tx:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3), session(tx) as s:
                    await s.execute(text("select pg_sleep(60)"))
            assert not tx._scope.connection.is_closed() and idle_of(tx) == []


async def test_statements_and_sessions_in_the_wrong_place_say_what_to_write(dsn: str) -> None:
    statement: Any = insert(Note).values(body="x")
    async with transaction(dsn) as tx:
        for run in (tx.execute, tx.fetch, tx.fetchval, tx.fetchrow):
            with pytest.raises(TransactionMisuse, match=r"no text, but Insert; .* session\(tx\)"):
                await run(statement)
        with pytest.raises(TransactionMisuse, match="executemany: no text, but TextClause"):
            await tx.executemany(text("select 1"), [(1,)])  # type: ignore[arg-type]
        wrong: list[Any] = [(object(), AsyncSession, "is no Tx"), (tx, SyncSession, "is no AsyncSession")]
        for given, kind, problem in wrong:
            with pytest.raises(TransactionMisuse, match=problem):
                async with session(given, kind):
                    pass
    for hint in (SyncSession, async_sessionmaker):

        async def settle(body: dict[str, Any], s: Any) -> None: ...

        settle.__annotations__["s"] = hint
        app = App("orm")
        app.handler("a")(settle)
        with pytest.raises(RegistrationError, match=r"asks for 's', .* annotate it as AsyncSession for a session"):
            app.handlers["settle"].bind({})


async def test_a_load_after_the_session_is_refused(dsn: str) -> None:
    async with transaction(dsn) as tx:
        async with session(tx) as s:
            order = Order(reference=ONE, body={}, lines=[Line(name="a")])
            s.add(order)
            await s.flush()
            s.expire(order)
            connection = await s.connection()
        with pytest.raises(TransactionMisuse, match="was used after its session had ended"):
            await connection.execute(select(Order))


async def test_calls_that_need_a_connection_of_their_own_are_refused(dsn: str) -> None:
    async with transaction(dsn) as tx:
        async with session(tx) as s:
            with pytest.raises(TransactionMisuse, match="isolation_level"):
                await s.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        async with session(tx) as s:
            with pytest.raises(TransactionMisuse, match="stream"):
                await s.stream(select(Order))
            with pytest.raises(TransactionMisuse, match="yield_per"):
                await s.execute(select(Order).execution_options(yield_per=2))


async def test_a_session_that_is_kept_writes_nothing_for_the_next_message(dsn: str) -> None:
    async with transaction(dsn) as tx:
        async with session(tx) as kept:
            kept.add(Note(body="first"))
        async with session(tx):  # of the next message, on the same connection
            kept.add(Note(body="of no message"))
            for use in (kept.flush, kept.connection, lambda: kept.execute(select(Note))):
                with pytest.raises(TransactionMisuse, match="was used after its session had ended"):
                    await use()
            await kept.close()
    assert await query(dsn, "select body from notes") == [("first",)]


# -- deferred statements ----------------------------------------------------------------------------------------------


def writes() -> list[Any]:
    """Statements of several shapes, with other values in each."""
    statements: list[Any] = []
    for n in range(1, 30):
        statements += [
            insert(Order).values(id=n, reference=uuid.UUID(int=n), body={"n": n}, at=datetime(2026, 1, n)),
            insert(LINES).values(id=n, order_id=n, name=f"line {n}"),
            update(Order).where(Order.id == n % 5 + 1).values(count=Order.count + n),
            update(Order).where(Order.id.in_([n, n + 1])).values(state=State.PAID),
        ]
    statements.append(delete(Line).where(Line.id > 20, Line.name.like("line%")))
    statements.append(upsert(Note).values(id=1, body="a").on_conflict_do_nothing())
    return statements


@pytest.mark.parametrize("coded", [False, True])
async def test_deferred_statements_leave_what_a_session_of_its_own_leaves(dsn: str, coded: bool) -> None:
    async with plain(dsn) as own:
        for statement in writes():
            await own.execute(statement)
    stored = await query(dsn, EVERYTHING)
    await query(dsn, "truncate orders, lines, notes restart identity cascade")

    async def init(connection: Any) -> None:
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        await connection.set_type_codec("int4", schema="pg_catalog", encoder=lambda _: "0", decoder=str)

    async with transaction(dsn, init if coded else None) as tx:
        for statement in writes():
            tx.defer(statement)
    assert await query(dsn, EVERYTHING) == stored


@pytest.mark.unit
def test_deferred_statements_are_understood() -> None:
    statement = update(Order).where(Order.id == 1).values(count=Order.count + 2)
    shape = shape_of(compiled(statement)[0])
    assert shape is not None and (shape.added, shape.keys) == ((("count", 0),), (("id", 1),))
    shape = shape_of(compiled(insert(Order).values(reference=ONE, body={}))[0])
    assert shape is not None and "reference" in shape.columns


@pytest.mark.unit
def test_a_deferred_statement_is_compiled_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("compiled_once", MetaData(), Column("id", Integer), Column("name", String))
    compilations = []
    compiler: Any = PGCompiler
    visit_insert, visit_update = compiler.visit_insert, compiler.visit_update

    def insert_counted(self: Any, statement: Any, *args: Any, **options: Any) -> Any:
        compilations.append("insert")
        return visit_insert(self, statement, *args, **options)

    def update_counted(self: Any, statement: Any, *args: Any, **options: Any) -> Any:
        compilations.append("update")
        return visit_update(self, statement, *args, **options)

    monkeypatch.setattr(PGCompiler, "visit_insert", insert_counted)
    monkeypatch.setattr(PGCompiler, "visit_update", update_counted)
    sent = []
    for n in range(1, 20):
        sent.append(compiled(insert(table).values(id=n, name=f"line {n}")))
        sent.append(compiled(update(table).where(table.c.id.in_(list(range(n)))).values(name=f"line {n}")))
    assert compilations == ["insert", "update"]
    assert [arguments for _, arguments in sent[:3]] == [(1, "line 1"), ("line 1", 0), (2, "line 2")]
    assert len({sql for sql, _ in sent}) == 20  # the insert, and the update with 1 to 19 places


async def test_deferred_inserts_are_sent_as_arrays(dsn: str) -> None:
    sent: list[str] = []
    async with transaction(dsn) as tx:
        tx._scope.connection.add_query_logger(lambda entry: sent.append(entry.query))
        for n in range(40):
            tx.defer(insert(LINES).values(id=n, order_id=1, name=f"line {n}"))
        tx.defer("insert into orders (id, reference, state, tags, price) values (1, $1, 'NEW', '{}', 1)", ONE)
        tx.writes.insert(0, tx.writes.pop())
    assert await value(dsn, "select count(*) from lines") == 40
    assert len({sql for sql in sent if "lines" in sql and "unnest" in sql}) == 1


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        (select(Note), "insert\\(\\), update\\(\\) or delete\\(\\)"),
        (text("select 1"), "TextClause is no write"),
        (12, "but int"),
    ],
)
async def test_a_statement_that_is_no_write_cannot_be_deferred(dsn: str, statement: Any, problem: str) -> None:
    async with transaction(dsn) as tx:
        with pytest.raises(TransactionMisuse, match=problem):
            tx.defer(statement)
        with pytest.raises(TransactionMisuse, match="and arguments"):
            tx.defer(insert(Note), "x")


# -- in a worker ------------------------------------------------------------------------------------------------------


async def test_handlers_with_a_session_are_applied_once_replayed_and_rebuilt(place: Place) -> None:
    await execute(place.dsn, TABLES)
    await query(place.dsn, 'grant all on all tables in schema public to "test-worker"')
    await query(place.dsn, 'grant all on all sequences in schema public to "test-worker"')
    topic = await place.topic()
    app = App(f"orm-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, retry=NO_RETRY)
    async def settle(message: Message[dict[str, Any]], s: AsyncSession) -> None:
        n = message.value["n"]
        order = Order(id=n, reference=uuid.UUID(int=message.value.get("ref", n)), body=message.value)
        order.lines = [Line(id=n, name=f"line {n}")]
        s.add(order)

    @app.handler(topic, name="add", concurrency=4)
    async def add(body: dict[str, Any], s: SqlModelSession, tx: Tx) -> None:
        tx.defer(insert(Note).values(id=body["n"], body=f"note {body['n']}"))
        note = await s.get_one(Note, body["n"])
        note.body += "!"

    sent = [Sent({"n": n}, id=message_id(f"m{n}"), key=str(n % 5)) for n in range(1, 31)]
    await place.send(topic, *sent, Sent({"n": 99, "ref": 1}, id=message_id("m99"), key="99"), *sent[:10])
    await consume_all(app, place.settings())
    assert await place.reasons() == ["failed"]
    kinds = await query(place.dsn, "select kind from consumer.dead_letters")
    assert kinds == [("23505",)]
    assert await value(place.dsn, "select count(*) from lines") == 30
    assert await value(place.dsn, "select count(*) from notes where body = 'note ' || id || '!'") == 31
    findings = await run_replay(place, app, topic)
    assert findings.ok and outcome_counts(findings, "settle")
    result = await rebuilt(place, app)
    assert result.agrees and {table["table"] for table in result.tables} == {
        "public.orders", "public.lines", "public.notes"
    }  # fmt: skip
    await query(place.dsn, "update orders set count = 8 where id = 3")
    assert not (await rebuilt(place, app)).agrees


def test_a_session_is_refused_where_there_is_no_transaction() -> None:
    app = App("orm")

    async def watch(body: dict[str, Any], s: AsyncSession) -> None: ...

    async def two(body: dict[str, Any], s: AsyncSession, other: SqlModelSession) -> None: ...

    with pytest.raises(RegistrationError, match="drop the session parameter, or drop idempotent=False"):
        app.handler("a", idempotent=False)(watch)
    with pytest.raises(RegistrationError, match="asks for two sessions"):
        app.handler("a")(two)
