"""Publishing in a transaction of SQLAlchemy, outside of handlers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from harness import execute, migrated, query
from sqlalchemy import String, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlmodel.ext.asyncio.session import AsyncSession as SqlModelSession

from consumer import App, TransactionMisuse

APP = App("web", publishes=["out"])


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "web_orders"
    id: Mapped[str] = mapped_column(String, primary_key=True)


@pytest.fixture
async def dsn(database: str) -> str:
    await migrated(database)
    await execute(database, "create table web_orders (id text primary key)")
    return database


@pytest.fixture
async def engine(dsn: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    yield engine
    await engine.dispose()


async def stored(dsn: str) -> tuple[list[str], list[str]]:
    """Return ids of orders, and the values that are published."""
    orders = [row[0] for row in await query(dsn, "select id from web_orders order by id")]
    values = [row[0].decode() for row in await query(dsn, "select value from consumer.outbox_intake order by place")]
    return orders, values


async def order(session: Any, id: str) -> None:
    """Write, and publish in the same transaction."""
    session.add(Order(id=id))
    async with APP.publishing(session) as out:
        out.publish("out", id)


@pytest.mark.parametrize("kind", [AsyncSession, SqlModelSession])
async def test_a_message_commits_with_the_rows_of_its_session(engine: AsyncEngine, dsn: str, kind: Any) -> None:
    async with kind(engine) as session:
        await order(session, "a")
        assert await stored(dsn) == ([], [])
        await session.commit()
        await order(session, "b")
        await session.rollback()
    async with kind(engine) as session, session.begin():
        await order(session, "c")
    async with kind(engine) as session:
        await order(session, "never committed")
    with pytest.raises(ZeroDivisionError):
        async with kind(engine) as session, session.begin():
            await order(session, "d")
            raise ZeroDivisionError
    assert await stored(dsn) == (["a", "c"], ["a", "c"])


async def test_a_savepoint_that_is_rolled_back_takes_its_message(engine: AsyncEngine, dsn: str) -> None:
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():  # before any statement of the session
                await order(session, "a")
                raise ZeroDivisionError
        async with session.begin_nested():
            await order(session, "b")
    assert await stored(dsn) == (["b"], ["b"])


async def test_scoped_sessions_and_connections_publish(engine: AsyncEngine, dsn: str) -> None:
    scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: None)
    await order(scoped, "scoped")
    await scoped.commit()
    await scoped.remove()
    async with engine.begin() as connection:
        await connection.execute(text("insert into web_orders values ('connection')"))
        async with APP.publishing(connection) as out:
            out.publish("out", "connection")
    assert await stored(dsn) == (["connection", "scoped"], ["scoped", "connection"])


async def test_a_transaction_that_ends_inside_of_the_block_publishes_nothing(engine: AsyncEngine, dsn: str) -> None:
    async with AsyncSession(engine) as session:
        with pytest.raises(TransactionMisuse, match=r"ended inside of the block.*commit after"):
            async with APP.publishing(session) as out:
                out.publish("out", "lost")
                await session.commit()
                await session.execute(text("select 1"))  # begins another one
        await session.commit()
    assert await stored(dsn) == ([], [])


async def test_a_session_that_commits_each_statement_is_refused(engine: AsyncEngine, dsn: str) -> None:
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionMisuse, match=r"no transaction is open.*without AUTOCOMMIT"):
            await order(session, "a")
    assert (await stored(dsn))[1] == []
