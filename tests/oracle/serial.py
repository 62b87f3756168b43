"""The reference: plain asyncpg, one message and transaction after the other.

Imports nothing of the framework.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg

from oracle.case import Handler, Message
from oracle.handlers import run, run_batch


class Rejected(Exception):
    """The handler refused its message."""


class Published(NamedTuple):
    """A record that a message publishes.

    ordinal: how many it has published before, also in undone savepoints.
    """

    topic: str
    ordinal: int
    key: str | None
    value: str


class PlainTx:
    """The methods of a Tx on a connection.

    Deferred statements are sent, in order, before the next statement or at the end.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._deferred: list[tuple[str, Sequence[Any]]] = []
        self._depth = 0
        self._turn = asyncio.Lock()  # a connection runs one statement at a time; who asks first is first
        self.published: list[Published] = []
        self._ordinal = 0  # counts also what an undone savepoint has published
        self._error: Exception | None = None  # of a statement outside a savepoint: it fails the message

    def defer(self, sql: str, *args: Any) -> None:
        self._deferred.append((sql, args))

    def publish(self, topic: str, value: list[str], key: str | None = None, cause: object = None) -> None:
        self.published.append(Published(topic, self._ordinal, key, json.dumps(value, ensure_ascii=False)))
        self._ordinal += 1

    async def flush(self) -> None:
        deferred, self._deferred = self._deferred, []
        for sql, args in deferred:
            await self._ask("execute", sql, *args)

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            return await getattr(self._connection, method)(*args, **options)
        except Exception as error:
            if not self._depth and self._error is None:
                self._error = error
            raise

    async def _now(self, method: str, *args: Any, **options: Any) -> Any:
        async with self._turn:
            await self.flush()
            return await self._ask(method, *args, **options)

    async def execute(self, sql: str, *args: Any) -> Any:
        return await self._now("execute", sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        return await self._now("fetchval", sql, *args)

    async def executemany(self, sql: str, args: Iterable[Sequence[Any]]) -> None:
        await self._now("executemany", sql, args)

    async def copy_records_to_table(self, table: str, **options: Any) -> None:
        await self._now("copy_records_to_table", table, **options)

    async def set_local(self, name: str, value: str) -> None:
        await self._now("execute", "select set_config($1, $2, true)", name, value)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        await self.flush()
        self._depth += 1
        before = len(self.published)
        try:
            async with self._connection.transaction():
                try:
                    yield
                    await self.flush()
                finally:
                    self._deferred = []
        except BaseException:
            del self.published[before:]
            raise
        finally:
            self._depth -= 1

    async def end(self) -> None:
        await self.flush()
        if self._error is not None:
            raise self._error


async def apply(
    connection: asyncpg.Connection, handler: Handler, message: Message, published: list[Published]
) -> Exception | None:
    """Run a handler on a message in its own transaction.

    published: gets what it publishes, if it succeeds. Returns its error, if any.
    """
    try:
        async with connection.transaction():
            tx = PlainTx(connection)
            if handler.batch is None:
                await run(handler.steps, tx, dict(message.fields), Rejected)
            else:
                await run_batch(handler, [message], tx, Rejected, [message])
            await tx.end()
    except Exception as error:
        return error
    published += tx.published
    return None
