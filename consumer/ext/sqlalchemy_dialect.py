"""The PostgreSQL dialect of SQLAlchemy on a handler's Tx.

SQLAlchemy's own dialect for asyncpg takes a `Driver` for its connection, which sends statements through the Tx: after what
was deferred, in the message's turn, refused where they control the transaction, and with the error noted. It begins,
commits and closes nothing. Knows a Tx by its methods only. Sources: sqlalchemy/dialects/postgresql/asyncpg.py of 2.0
and 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, NoReturn

from sqlalchemy import pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from consumer.core.errors import TransactionMisuse

ENDED = (
    "session(tx): an object of SQLAlchemy was used after its session had ended; load what you need inside "
    "`async with session(tx)`"
)
_VERSION = (14, 0)  # the oldest server that is supported: what a newer one can do besides is DDL


class _Undone(Exception):
    """Ends a savepoint that SQLAlchemy rolls back."""


class Driver:
    """What SQLAlchemy takes for an asyncpg connection.

    tx: the Tx of the running message; set for as long as a session of it is open.
    """

    def __init__(self) -> None:
        self.tx: Any = None
        self._savepoints: list[tuple[str, AbstractAsyncContextManager[None]]] = []

    async def prepare(self, sql: str, *, name: str | None = None) -> Statement:
        tx = self._tx()
        return Statement(self, sql, await tx._run("prepare", sql, sql, on=tx._scope.preparer))

    async def executemany(self, sql: str, arguments: Iterable[Sequence[Any]]) -> None:
        statement = await self.prepare(sql)
        await self._tx()._run("executemany", sql, arguments, on=statement.prepared)

    async def fetchrow(self, sql: str) -> None:
        """Answer a ping: nothing is sent."""

    async def reload_schema_state(self) -> None:
        """Do nothing: what does not fit any more is prepared again."""

    def is_closed(self) -> bool:
        return False  # SQLAlchemy would drop it; the Tx notes what the connection's errors mean

    async def close(self, timeout: float | None = None) -> None:
        """Close nothing: the connection belongs to the worker."""

    def terminate(self) -> None:
        """Close nothing, either, after a cancellation."""

    def _tx(self) -> Any:
        if self.tx is None:
            raise TransactionMisuse(ENDED)
        return self.tx

    async def savepoint(self, name: str) -> None:
        block = self._tx().savepoint()
        await block.__aenter__()
        self._savepoints.append((name, block))

    def is_inside(self, name: str) -> bool:
        """Whether this savepoint is open."""
        return any(known == name for known, _ in self._savepoints)

    async def release(self, name: str) -> None:
        while True:
            known, block = self._savepoints.pop()
            await block.__aexit__(None, None, None)
            if known == name:
                return

    async def undo_all(self) -> None:
        """End the savepoints that are still open, with their writes undone."""
        if self._savepoints:
            await self.roll_back_to(self._savepoints[0][0])

    async def roll_back_to(self, name: str) -> None:
        while True:
            known, block = self._savepoints.pop()
            undone = _Undone()
            with suppress(_Undone):
                await block.__aexit__(_Undone, undone, None)
            if known == name:
                return


class Statement:
    """A prepared statement that runs through the Tx of its driver."""

    __slots__ = ("_driver", "_sql", "prepared")

    def __init__(self, driver: Driver, sql: str, prepared: Any) -> None:
        self._driver = driver
        self._sql = sql
        self.prepared = prepared

    async def fetch(self, *arguments: Any) -> Any:
        return await self._driver._tx()._run("fetch", self._sql, *arguments, on=self.prepared)

    def get_attributes(self) -> Any:
        return self.prepared.get_attributes()

    def get_statusmsg(self) -> str:
        return str(self.prepared.get_statusmsg())

    def cursor(self, *arguments: Any) -> NoReturn:
        raise TransactionMisuse(
            "stream() and yield_per: a handler's statement is answered whole; use execute(), and LIMIT for few rows"
        )


class TxDialect(PGDialect_asyncpg):
    """SQLAlchemy's dialect for asyncpg; asks the server nothing by itself."""

    driver = "consumer"
    supports_statement_cache = True
    # The connection has no codec for JSON, so SQLAlchemy's types read its text. In 2.0 two types say otherwise.
    supports_native_json_deserialization = False
    colspecs = {  # noqa: RUF012 - as in its base
        kind: implementation
        for kind, implementation in PGDialect_asyncpg.colspecs.items()
        if implementation.__name__ not in ("AsyncpgJSON", "AsyncpgJSONB")
    }

    def on_connect(self) -> None:
        return None

    def _get_server_version_info(self, connection: Any) -> tuple[int, ...]:
        return _VERSION

    def _get_default_schema_name(self, connection: Any) -> str:
        return "public"

    def get_default_isolation_level(self, dbapi_conn: Any) -> Any:
        return "AUTOCOMMIT"

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        if level != "AUTOCOMMIT":  # the engine's own: nothing is begun here
            raise TransactionMisuse(
                "isolation_level of a session in a handler: the transaction is READ COMMITTED and holds other messages too; "
                "leave it out, and lock rows with with_for_update()"
            )
        super().set_isolation_level(dbapi_connection, level)  # type: ignore[no-untyped-call]

    def _set_backslash_escapes(self, connection: Any) -> None:
        self._backslash_escapes = False

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        return False

    def do_savepoint(self, connection: Any, name: str) -> None:
        await_only(_driver_of(connection).savepoint(name))

    def do_release_savepoint(self, connection: Any, name: str) -> None:
        driver = _driver_of(connection)
        if driver.is_inside(name):
            await_only(driver.release(name))

    def do_rollback_to_savepoint(self, connection: Any, name: str) -> None:
        driver = _driver_of(connection)
        if driver.is_inside(name):  # else the session is closed after `undo_all`, where nothing can be awaited
            await_only(driver.roll_back_to(name))


def _driver_of(connection: Any) -> Driver:
    driver: Driver = connection.connection.dbapi_connection._connection
    return driver


registry.register("postgresql.consumer", __name__, "TxDialect")
_engines: list[AsyncEngine] = []


def engine() -> AsyncEngine:
    """The engine of all sessions: what it knows is compiled statements."""
    if not _engines:
        _engines.append(
            create_async_engine(
                "postgresql+consumer://", poolclass=pool.NullPool, isolation_level="AUTOCOMMIT", async_creator=_create
            )
        )
    return _engines[0]


async def _create() -> Driver:
    return Driver()


async def connect() -> tuple[AsyncConnection, Driver]:
    """Return a connection of SQLAlchemy without a pool, and its driver."""
    connection = await engine().connect()
    raw: Any = await connection.get_raw_connection()
    driver: Driver = raw.dbapi_connection._connection
    connection.sync_connection.detach()  # type: ignore[union-attr]
    return connection, driver
