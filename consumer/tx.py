"""The transaction as a handler sees it: write, read, defer. It cannot be committed, rolled back or kept.

Knows one connection and the order of writes; knows no Kafka. Everything a handler does here is stored together with
the claim of its message, or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from consumer.columns import Columns
from consumer.core.errors import TransactionMisuse
from consumer.core.grouping import are_apart, group
from consumer.core.sqltext import refuse_transaction_control

if TYPE_CHECKING:
    from collections.abc import Hashable


_CANCELLED_SECONDS = 5.0


class Ordered(Protocol):
    """What a Tx writes for: a message, or the messages of one call of a batch handler."""

    def unit(self) -> Hashable: ...


class _Level:
    """The transaction, or a savepoint of one message in it: what is written inside may be undone without the rest.

    lock: one statement at a time, and a savepoint inside is one long statement. writes: deferred inside a savepoint.
    """

    __slots__ = ("lock", "open", "parent", "tx", "writes")

    def __init__(self, tx: Tx | None = None, parent: _Level | None = None) -> None:
        self.tx = tx
        self.parent = parent
        self.lock = asyncio.Lock()
        self.open = True
        self.writes: list[tuple[str, Sequence[Any]]] = []


# The savepoint that a task is inside of. Tasks started in it are inside too; their siblings are not.
_inside: ContextVar[_Level | None] = ContextVar("consumer_savepoint", default=None)

_savepoint_numbers = itertools.count(1)  # never one name twice: a task left behind must not meet another's savepoint


def savepoint_name() -> str:
    """A name that no savepoint of this process has had."""
    return f"consumer_{next(_savepoint_numbers)}"


class Scope:
    """What the messages of one batch share: the connection, and the writes deferred so far in order of their messages."""

    def __init__(self, connection: Any, columns: Columns) -> None:
        self.connection = connection
        self.columns = columns
        self.root = _Level()
        self.deferred: list[Tx] = []
        self.flush_error: BaseException | None = None

    async def flush(self) -> None:
        """Send the deferred writes of the batch, grouped.

        Raises what the database says. Nobody knows whose write it was: `flush_error` then says that the batch has
        failed, whatever a handler does with the exception.
        """
        if not self.deferred:
            return
        pending, self.deferred = self.deferred, []
        writes = [(tx.subject, sql, args) for tx in pending for sql, args in tx.writes]
        for tx in pending:
            tx.touched, tx.writes = True, []
        try:
            await self.send(writes)
        except BaseException as error:
            self.flush_error = error
            raise

    async def send(self, writes: Sequence[tuple[Ordered, str, Sequence[Any]]]) -> None:
        """Send writes in groups. Raises what the database says."""
        by_statement: dict[str, list[Sequence[Any]]] = {}
        for _, sql, arguments in writes:
            by_statement.setdefault(sql, []).append(arguments)
        several = 1 < len(by_statement) < len(writes)
        touches = await self.columns.touches(by_statement) if several else None
        if len(by_statement) == 1 or (touches is not None and are_apart(touches)):
            groups = list(by_statement.items())  # and nobody needs to know the units
        else:
            groups = group([(subject.unit(), sql, arguments) for subject, sql, arguments in writes], touches)
        for sql, each in groups:
            await self.columns.send(sql, each)


class Tx:
    """The PostgreSQL transaction that a handler's effects belong to. Ask for it by annotating a parameter ``Tx``.

    The methods are asyncpg's, with its arguments (``$1``, ``$2`` …) and its exceptions. A caller may not assume that
    the transaction is of this message alone, nor keep the Tx: after the handler has returned it raises
    `TransactionMisuse`. A statement that fails outside a `savepoint()` fails the message, even if the handler
    swallows the exception: PostgreSQL would store nothing of that transaction.
    """

    __slots__ = ("_asking", "_open", "_others", "_owner", "_scope", "error", "subject", "touched", "writes")

    def __init__(self, scope: Scope, subject: Ordered, owner: asyncio.Task[Any] | None) -> None:
        self._scope = scope
        self._open = True
        self._owner = owner  # the task that calls the handler
        self._others: dict[
            asyncio.Task[Any], int
        ] = {}  # tasks of the handler that use this, and how many times at once
        self.subject = subject
        self.writes: list[tuple[str, Sequence[Any]]] = []
        self.touched = False  # something of this message was sent: only a rollback can take it back
        self.error: BaseException | None = None
        self._asking = 0  # statements that have not been answered yet

    @property
    def in_statement(self) -> bool:
        """Whether the handler waits for PostgreSQL now."""
        return self._asking > 0

    def defer(self, sql: str, *args: Any) -> None:
        """Add a write whose result is not needed: it is sent with the others of the batch, grouped by statement.

        Writes of one message key keep their order. An awaited statement of the batch first sends what was deferred.
        Raises TransactionMisuse for transaction control. A caller may not assume that an error shows here: it shows
        when the write is sent, and then fails this message.
        """
        self._check(sql)
        level = self._level()
        if level is not self._scope.root:
            level.writes.append((sql, args))
            return
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

        Deferred writes are sent where it begins and where it ends, so that they are inside or outside as written. Other
        tasks of the handler wait with their statements until it ends; those that are started inside are inside.
        """
        self._check(None)
        outer = self._level()
        with self._using():
            async with outer.lock:
                self._check(None)  # it may have ended while this waited
                await self._guarded(self._flush(outer))
                name = savepoint_name()
                self.touched = True
                await self._guarded(self._scope.connection.execute(f"savepoint {name}"))
                level = _Level(self, outer)
                before = _inside.get()
                _inside.set(level)
                outer_error, self.error = self.error, None
                try:
                    try:
                        yield
                    finally:
                        _inside.set(before)
                    async with level.lock:
                        self._check(None)
                        await self._flush(level)
                        if self.error is not None:
                            raise self.error
                        level.open = False
                except BaseException:
                    async with level.lock:
                        level.open = False
                        if self._open:  # else the transaction is over, and the connection may be another message's
                            self.error = None
                            await self._guarded(self._scope.connection.execute(f"rollback to savepoint {name}"))
                            self.error = outer_error
                    raise
                await self._guarded(self._scope.connection.execute(f"release savepoint {name}"))
                self.error = outer_error

    def _level(self) -> _Level:
        level = _inside.get()
        while level is not None and not (level.open and level.tx is self):
            level = level.parent
        return level or self._scope.root

    async def _run(self, method: str, sql: str | None, *args: Any, **options: Any) -> Any:
        self._check(sql)
        level = self._level()
        with self._using():
            async with level.lock:
                self._check(None)
                if not level.open:
                    raise TransactionMisuse(
                        "a statement outlived the savepoint that it was started in: await it inside"
                    )
                await self._guarded(self._flush(level))
                self.touched = True
                return await self._guarded(getattr(self._scope.connection, method)(*args, **options))

    async def _flush(self, level: _Level) -> None:
        if level is self._scope.root:
            await self._scope.flush()
        elif level.writes:
            writes, level.writes = level.writes, []
            await self._scope.send([(self.subject, sql, args) for sql, args in writes])

    async def _guarded(self, statement: Any) -> Any:
        self._asking += 1
        try:
            return await statement
        except BaseException as error:
            if self.error is None:  # the first says what it was; those after it only that the transaction is lost
                self.error = error
                if isinstance(error, asyncio.CancelledError):
                    self.error = TimeoutError("a statement was cancelled, by a timeout of the handler perhaps")
            raise
        finally:
            self._asking -= 1

    def _check(self, sql: str | None) -> None:
        if not self._open:
            raise TransactionMisuse("this Tx was used after its handler had returned: await everything you start")
        if sql is not None:
            refuse_transaction_control(sql)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Note a task other than the handler's own, for as long as it uses this."""
        task = asyncio.current_task()
        if task is self._owner or task is None:
            yield
            return
        self._others[task] = self._others.get(task, 0) + 1
        try:
            yield
        finally:
            self._others[task] -= 1
            if not self._others[task]:
                del self._others[task]

    def close(self) -> bool:
        """The handler has returned: nothing more is written through this. False when `end` must be awaited instead."""
        if self._others:
            return False
        self._open = False
        return True

    async def end(self) -> None:
        """The handler has returned: nothing more is written through this.

        Tasks that it left in the middle of a statement or a savepoint are cancelled and waited for, so that none of
        them meets the next message. Raises TransactionMisuse when there were any.
        """
        left = list(self._others)
        if left:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=_CANCELLED_SECONDS)
        self._open = False
        if self._others:
            self._scope.connection.terminate()  # a task that does not end: nothing may follow on this connection
        if left:
            raise TransactionMisuse("the handler returned while a task of its own was still using its Tx: await it")

    def abandon(self) -> None:
        """Its handler does not end: nothing more is written through this, and what was written is undone."""
        self._open = False
        self._scope.connection.terminate()

    def discard(self) -> None:
        """Forget what was deferred and not sent."""
        self.writes = []
        self._scope.deferred = [each for each in self._scope.deferred if each is not self]
