"""The transaction as a handler sees it: write, read, defer.

A handler cannot commit it, roll it back or keep it. What it does here is stored together with the claim of its message, or
not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

from consumer.core.errors import TransactionMisuse
from consumer.outbox.record import HeadersArgument, Outgoing
from consumer.postgres.sql_settings import check_setting
from consumer.postgres.sql_text import refuse_transaction_control, traits
from consumer.transaction.dry_run_guard import is_dry_run
from consumer.transaction.publishing import Publisher
from consumer.transaction.scope import Scope, savepoint_name

_CANCELLED_SECONDS = 5.0
_SET_LOCAL = "select current_setting($1, true), set_config($1, $2, true)"
_RESET_LOCAL = "select set_config(s.name, s.value, true) from unnest($1::text[], $2::text[]) as s(name, value)"
_SEVERAL = "{}: several commands in one text, which PostgreSQL takes only without parameters; send them one by one"


class _Level:
    """The transaction, or a savepoint of one message in it.

    What is written inside a savepoint may be undone without the rest. lock: one statement at a time, and a savepoint inside is one long statement. writes: deferred inside a savepoint.
    """

    __slots__ = ("lock", "open", "outgoing", "parent", "tx", "writes")

    def __init__(self, tx: Tx | None = None, parent: _Level | None = None) -> None:
        self.tx = tx
        self.parent = parent
        self.lock = asyncio.Lock()
        self.open = True
        self.writes: list[tuple[str, Sequence[Any]]] = []
        self.outgoing: list[Outgoing] = []


# The savepoint that a task is inside of. Tasks started in it are inside too; their siblings are not.
_inside: ContextVar[_Level | None] = ContextVar("consumer_savepoint", default=None)


def _refuse_several(method: str, sql: str) -> None:
    if not isinstance(sql, str):
        raise TransactionMisuse(
            f"tx.{method}: no text, but {type(sql).__name__}; give SQL as text, or run a statement of SQLAlchemy with "
            "session(tx), or with tx.defer"
        )
    if ";" in sql and traits(sql).several:
        raise TransactionMisuse(_SEVERAL.format(method))


def _compiled(statement: Any, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Return SQL and arguments of a statement that is no plain text."""
    if isinstance(statement, str):
        return str(statement), args
    if args or not type(statement).__module__.startswith(("sqlalchemy.", "sqlmodel.")):
        raise TransactionMisuse(
            f"tx.defer: no statement, but {type(statement).__name__}{' and arguments' if args else ''}; give SQL as text and its "
            "arguments, or a statement of SQLAlchemy with its values"
        )
    from consumer.ext.sqlalchemy_statements import compiled  # only with the extra: it takes time to import

    return compiled(statement)


class Tx:
    """The PostgreSQL transaction of a handler's effects.

    A handler gets it by annotating a parameter ``Tx``. The methods are asyncpg's, with its arguments (``$1``, ``$2`` …) and its exceptions. A caller may not assume that
    the transaction is of this message alone, nor keep the Tx: after the handler has returned it raises
    `TransactionMisuse`. A statement that fails outside a `savepoint()` fails the message, even if the handler
    swallows the exception: PostgreSQL would store nothing of that transaction.
    """

    __slots__ = (
        *("_asking", "_others", "_owner", "_root", "_scope", "_settings", "arguments", "error", "is_open", "placed"),
        *("subject", "touched", "waited_seconds", "waiting_since", "writes"),
    )

    arguments: Sequence[Any]  # of a batch handler: what it is called with; set by its caller

    def __init__(self, scope: Scope, subject: object, owner: asyncio.Task[Any] | None) -> None:
        self._scope = scope
        self.subject = subject  # the message; of a batch handler, its messages
        self.is_open = True
        self._owner = owner  # the task that calls the handler
        self._others: dict[asyncio.Task[Any], int] | None = (
            None  # other tasks that use this, and how many times at once
        )
        self._root: _Level | None = None
        self.writes: list[tuple[str, Sequence[Any]]] = []
        self.placed = False  # it has begun to use the connection: its place among the messages is fixed
        self.touched = False  # something of this message was sent: only a rollback can take it back
        self.error: BaseException | None = None
        self._asking = 0  # statements that have not been answered yet
        self._settings: dict[str, str | None] | None = None  # set for this message, with the values before
        self.waited_seconds = 0.0  # for the turn
        self.waiting_since: float | None = None

    @property
    def dry_run(self) -> bool:
        """Whether this is a dry run, which is undone: avoid outside effects."""
        return is_dry_run()

    @property
    def in_statement(self) -> bool:
        """Whether the handler waits for PostgreSQL now."""
        return self._asking > 0

    def turn_seconds(self, now: float) -> float:
        """Return how long the handler has waited for its turn. now: monotonic."""
        return self.waited_seconds + (0.0 if self.waiting_since is None else now - self.waiting_since)

    def defer(self, sql: Any, *args: Any) -> None:
        """Add a write whose result is not needed.

        sql: text with its arguments, or an insert(), update() or delete() of SQLAlchemy's Core with its values.
        It is sent with the others of the batch, grouped by statement. The database ends up as if the write ran here. An awaited statement first sends what was deferred before it.
        Raises TransactionMisuse for transaction control, and for several commands with parameters. A caller may not assume
        that another error shows here: it shows when the write is sent, and then fails this message.
        """
        if sql.__class__ is not str:
            sql, args = _compiled(sql, args)
        self._check(sql)
        if args and ";" in sql and traits(sql).several:
            raise TransactionMisuse(_SEVERAL.format("defer"))
        level = _inside.get()
        if level is not None and (level := self._level()) is not self._root:
            level.writes.append((sql, args))
            return
        if not self.writes:
            self._scope.defer(self)
        self.writes.append((sql, args))

    def publish(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None = None,
        headers: HeadersArgument = None,
        id: object = None,
        *,
        cause: object = None,
    ) -> None:
        """Publish a record to a topic once this message's transaction has committed.

        It is stored in the transaction, and reaches Kafka at least once, under one message id, in the order of the
        messages of this partition. An undone savepoint and a failed message publish nothing.

        - topic: one of App(publishes=[...]).
        - value: bytes and str as they are, None as a tombstone, anything else as JSON; with App(encode=…) as that says.
        - headers: names with str, bytes or None. `traceparent` and `tracestate` of the message are passed on.
        - id: the message id. By default it is derived from App, handler, the message's id and how many records its
          handler has published for it before, so that the same message always publishes the same ids. Give one where
          concurrent tasks of the handler publish.
        - cause: in batch handlers, the message of the list that this record is of. Required there without id.

        Raises TransactionMisuse for an undeclared topic, a record that is too large, a reserved or bad header, and a
        value that cannot become JSON.
        """
        self._check(None)
        publisher = self._scope.publishers.get(self)
        if publisher is None:
            is_batch = isinstance(self.subject, list)
            deliveries: Any = self.subject if is_batch else [self.subject]
            publisher = Publisher(deliveries, self.arguments if is_batch else None)
            self._scope.publishers[self] = publisher
        level = _inside.get()
        entry = publisher.build(topic, value, key, headers, id, cause)
        if level is not None and (level := self._level()) is not self._root:
            level.outgoing.append(entry)
        else:
            publisher.entries.append(entry)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement. Returns its command tag, for example ``UPDATE 1``.

        timeout: seconds.
        """
        if args or sql.__class__ is not str:
            _refuse_several("execute", sql)
        result: str = await self._run("execute", sql, sql, *args, timeout=timeout)
        return result

    async def executemany(self, sql: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement once for every element of `args`."""
        _refuse_several("executemany", sql)
        await self._run("executemany", sql, sql, args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Run a query; returns its rows."""
        _refuse_several("fetch", sql)
        result: list[Any] = await self._run("fetch", sql, sql, *args, timeout=timeout)
        return result

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        """Run a query; returns its first row, or None."""
        _refuse_several("fetchrow", sql)
        return await self._run("fetchrow", sql, sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run a query; returns one column of its first row, or None."""
        _refuse_several("fetchval", sql)
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

    async def set_local(self, name: str, value: str) -> None:
        """Set a setting like ``app.tenant`` for this message's statements only.

        Those that are deferred after it are among them. The value before comes back for the next message; where there was
        none, PostgreSQL leaves the empty string. Raises TransactionMisuse for a name without a dot, or a value that is no str.
        """
        check_setting(name, value)
        before = await self._run("fetchrow", None, _SET_LOCAL, name, value, on=self._scope.own)
        if self._settings is None:
            self._settings = {}
        self._settings.setdefault(name.lower(), before[0])

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Run a block that may fail without failing the message.

        An exception undoes the block's writes and is raised. Deferred writes are sent where it begins and where it ends, so that they are inside or outside as written. Other
        tasks of the handler wait with their statements until it ends; those that are started inside are inside.
        """
        self._check(None)
        outer = self._level()
        with self._using():
            await self._scope.turn.take(self)
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
                        if self.is_open:  # else the transaction is over, and the connection may be another message's
                            self.error = None
                            await self._guarded(self._scope.connection.execute(f"rollback to savepoint {name}"))
                            self._scope.undone()
                            self.error = outer_error
                    raise
                await self._guarded(self._scope.connection.execute(f"release savepoint {name}"))
                self.error = outer_error
                if level.outgoing:
                    inner = outer.outgoing if outer is not self._root else self._scope.publishers[self].entries
                    inner += level.outgoing

    def _level(self) -> _Level:
        level = _inside.get()
        while level is not None and not (level.open and level.tx is self):
            level = level.parent
        if level is None:
            level = self._root = self._root or _Level()
        return level

    async def _run(self, method: str, sql: str | None, *args: Any, on: Any = None, **options: Any) -> Any:
        """Run a statement in its turn, after what was deferred before it.

        on: what has the method, by default the connection.
        """
        self._check(sql)
        level = self._level()
        kind = None if sql is None else traits(sql)
        with self._using():
            await self._scope.turn.take(self)
            async with level.lock:
                self._check(None)
                if not level.open:
                    raise TransactionMisuse(
                        "a statement: it outlived the savepoint that it was started in; await it inside"
                    )
                await self._guarded(self._flush(level))
                self.touched = True
                try:
                    return await self._guarded(getattr(on or self._scope.connection, method)(*args, **options))
                finally:
                    if kind is not None and kind.outlasts:
                        self._scope.note(kind)

    async def _flush(self, level: _Level) -> None:
        if level is self._root:
            await self._scope.flush(self)
        elif level.writes:
            writes, level.writes = level.writes, []
            await self._scope.send([writes], unfinished=True)

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
        if not self.is_open:
            raise TransactionMisuse("this Tx: it was used after its handler had returned; await everything you start")
        if sql is not None:
            refuse_transaction_control(sql)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Track a task other than the handler's own while it uses this."""
        task = asyncio.current_task()
        if task is self._owner or task is None:
            yield
            return
        if self._others is None:
            self._others = {}
        self._others[task] = self._others.get(task, 0) + 1
        try:
            yield
        finally:
            self._others[task] -= 1
            if not self._others[task]:
                del self._others[task]

    def close(self) -> bool:
        """End this. Returns False if `end` must be awaited instead."""
        if self._others or (self.touched and self._leaves_something()):
            return False
        self._close()
        return True

    def _close(self) -> None:
        self.is_open = False
        if self.placed:
            self._scope.turn.release(self)

    def _leaves_something(self) -> bool:
        """Whether later messages would meet settings or checks of this one."""
        return bool(self._settings) or self._scope.leaves_something

    async def end(self, *, failed: bool = False) -> None:
        """End this after the handler has returned.

        Tasks that the handler left in the middle of a statement or a savepoint are cancelled and waited for, so that none of
        them meets the next message. Raises TransactionMisuse when there were any. Then, unless it has failed, its writes
        are sent, what a COMMIT would check is checked, and its settings are as before; raises what the database says.
        """
        left = list(self._others or ())
        try:
            if left:
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=_CANCELLED_SECONDS)
            if not left and not failed and self.error is None and self._leaves_something():
                await self._guarded(self._leave())
        finally:
            self._close()
            if self._others:
                self._scope.connection.terminate()  # a task that does not end: nothing may follow on this connection
        if left:
            raise TransactionMisuse(
                "the handler: it returned while a task of its own still used its Tx; await the task"
            )

    async def _leave(self) -> None:
        await self._scope.flush(self)
        if self._scope.leaves_something:
            await self._scope.end_message()
        if self._settings:
            before = [value or "" for value in self._settings.values()]
            await self._scope.own.execute(_RESET_LOCAL, list(self._settings), before)

    def abandon(self) -> None:
        """Undo what was written, because the handler does not end."""
        self._close()
        self._scope.connection.terminate()

    def discard(self) -> None:
        """Forget what was deferred and not sent, and what was published."""
        self.writes = []
        self._scope.deferred = [sender for sender in self._scope.deferred if sender is not self]
        self._scope.publishers.pop(self, None)
