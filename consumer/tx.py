"""The transaction as a handler sees it: write, read, defer. It cannot be committed, rolled back or kept.

Knows one connection and the order of writes; knows no Kafka. Everything a handler does here is stored together with
the claim of its message, or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from consumer.core.errors import TransactionMisuse
from consumer.core.grouping import group
from consumer.core.sqltext import refuse_transaction_control

if TYPE_CHECKING:
    from collections.abc import Hashable


class Ordered(Protocol):
    """What a Tx writes for: a message, or the messages of one call of a batch handler."""

    def unit(self) -> Hashable: ...


class Scope:
    """What the messages of one batch share: the connection, and the writes deferred so far in order of their messages."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.lock = asyncio.Lock()  # a connection runs one statement at a time; handlers may run concurrently
        self.deferred: list[Tx] = []
        self.flush_error: BaseException | None = None
        self._savepoints = 0

    async def flush(self, only: Tx | None = None) -> None:
        """Send the deferred writes of the batch, grouped, or those of one message.

        Raises what the database says. Without `only` nobody knows whose write it was: `flush_error` then says that
        the batch has failed, whatever a handler does with the exception.
        """
        if not self.deferred:
            return
        if only is None:
            pending, self.deferred = self.deferred, []
        else:
            pending = [only] if only.writes else []
            self.deferred = [each for each in self.deferred if each is not only]
        writes = []
        for tx in pending:
            tx.touched = True
            unit = tx.subject.unit()
            writes += [(unit, sql, args) for sql, args in tx.writes]
            tx.writes = []
        try:
            for sql, arguments in group(writes):
                if len(arguments) == 1:
                    await self.connection.execute(sql, *arguments[0])
                else:
                    await self.connection.executemany(sql, arguments)
        except BaseException as error:
            if only is None:
                self.flush_error = error
            raise

    def savepoint_name(self) -> str:
        self._savepoints += 1
        return f"consumer_{self._savepoints}"


class Tx:
    """The PostgreSQL transaction that a handler's effects belong to. Ask for it by annotating a parameter ``Tx``.

    The methods are asyncpg's, with its arguments (``$1``, ``$2`` …) and its exceptions. A caller may not assume that
    the transaction is of this message alone, nor keep the Tx: after the handler has returned it raises
    `TransactionMisuse`. A statement that fails outside a `savepoint()` fails the message, even if the handler
    swallows the exception: PostgreSQL would store nothing of that transaction.
    """

    __slots__ = ("_depth", "_open", "_scope", "error", "subject", "touched", "writes")

    def __init__(self, scope: Scope, subject: Ordered) -> None:
        self._scope = scope
        self._open = True
        self._depth = 0
        self.subject = subject
        self.writes: list[tuple[str, Sequence[Any]]] = []
        self.touched = False  # something of this message was sent: only a rollback can take it back
        self.error: BaseException | None = None

    def defer(self, sql: str, *args: Any) -> None:
        """Add a write whose result is not needed: it is sent with the others of the batch, grouped by statement.

        Writes of one message key keep their order. An awaited statement of the batch first sends what was deferred.
        Raises TransactionMisuse for transaction control. A caller may not assume that an error shows here: it shows
        when the write is sent, and then fails this message.
        """
        self._check(sql)
        if not self.writes:
            self._scope.deferred.append(self)
        self.writes.append((sql, args))

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement; returns its command tag, for example ``UPDATE 1``. timeout: seconds."""
        result: str = await self._run("execute", sql, sql, *args, timeout=timeout)
        return result

    async def executemany(self, sql: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement once for each element of `args`."""
        await self._run("executemany", sql, sql, args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Run a query; returns its rows."""
        result: list[Any] = await self._run("fetch", sql, sql, *args, timeout=timeout)
        return result

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        """Run a query; returns its first row, or None."""
        return await self._run("fetchrow", sql, sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run a query; returns one column of its first row, or None."""
        return await self._run("fetchval", sql, sql, *args, column=column, timeout=timeout)

    async def copy_records_to_table(
        self,
        table_name: str,
        *,
        records: Iterable[Sequence[Any]],
        columns: Sequence[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Copy rows into a table with COPY; returns the command tag."""
        result: str = await self._run(
            "copy_records_to_table",
            None,
            table_name,
            records=records,
            columns=columns,
            schema_name=schema_name,
            timeout=timeout,
        )
        return result

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """A part that may fail without failing the message: on an exception its writes are undone, and it is raised on.

        Deferred writes are sent where it begins and where it ends, so that they are inside or outside as written.
        """
        self._check(None)
        name = self._scope.savepoint_name()
        if self._depth == 0:
            await self._scope.lock.acquire()  # nothing of another message may fall inside
        self._depth += 1
        try:
            await self._guarded(self._scope.flush())
            self.touched = True
            await self._guarded(self._scope.connection.execute(f"savepoint {name}"))
            outer_error, self.error = self.error, None
            try:
                yield
                await self._scope.flush(self)
                if self.error is not None:
                    raise self.error
            except BaseException:
                self._drop_deferred()
                await self._guarded(self._scope.connection.execute(f"rollback to savepoint {name}"))
                self.error = outer_error
                raise
            await self._guarded(self._scope.connection.execute(f"release savepoint {name}"))
            self.error = outer_error
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._scope.lock.release()

    async def _run(self, method: str, sql: str | None, *args: Any, **options: Any) -> Any:
        self._check(sql)
        if self._depth:
            return await self._send(method, args, options)
        async with self._scope.lock:
            return await self._send(method, args, options)

    async def _send(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        await self._guarded(self._scope.flush(self if self._depth else None))
        self.touched = True
        return await self._guarded(getattr(self._scope.connection, method)(*args, **options))

    async def _guarded(self, statement: Any) -> Any:
        try:
            return await statement
        except BaseException as error:
            self.error = error
            raise

    def _check(self, sql: str | None) -> None:
        if not self._open:
            raise TransactionMisuse("this Tx was used after its handler had returned: await everything you start")
        if sql is not None:
            refuse_transaction_control(sql)

    def _drop_deferred(self) -> None:
        self.writes = []
        self._scope.deferred = [each for each in self._scope.deferred if each is not self]

    def close(self) -> None:
        """End of the handler: nothing more may be written through this Tx."""
        self._open = False

    def discard(self) -> None:
        """Forget what was deferred and not sent."""
        self._drop_deferred()
