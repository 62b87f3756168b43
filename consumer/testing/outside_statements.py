"""What handlers do on other connections than their transaction's.

Statements, as far as they can be seen: of the sessions of the test's database, and by asyncpg in this process. And rows
that others have changed, which PostgreSQL shows whatever has changed them (outside_rows.py). Limitations: see
`Trial.outside_statements`.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.message import Message
from consumer.postgres.sql_text import transaction_control
from consumer.testing.messages import Outside, place_of
from consumer.testing.outside_rows import OutsideRows

SESSIONS = """
select d.sessions, a.pid, a.application_name, a.query, a.query_start
from pg_stat_database d
left join pg_stat_activity a on a.datid = d.datid and a.backend_type = 'client backend' and a.pid <> all($1::int[])
where d.datname = current_database()
"""
_CHANGED = "unknown: it changed rows of {tables}"
_LEFT_OPEN = "unknown: its transaction, which has not ended, has written, to {tables} it seems"
_BLIND = "unknown: the connection that watches has failed ({tables})"
_NOTED = (
    "execute", "executemany", "fetch", "fetchrow", "fetchval", "fetchmany", "prepare", "cursor",
    "copy_from_table", "copy_from_query", "copy_to_table", "copy_records_to_table",
)  # fmt: skip
_RUN = ("cursor", "executemany", "fetch", "fetchmany", "fetchrow", "fetchval")  # of a prepared statement


@dataclass(slots=True)
class _Call:
    """A running handler: its messages, transaction and asyncpg sessions."""

    handler: str
    message: str
    transaction: Any  # the connection
    outside: list[Outside]
    pids: set[int] = field(default_factory=set)
    prepared: set[str] = field(default_factory=set)  # texts, in this call
    noted: bool = False

    def note(self, connection: str, statement: str) -> None:
        self.noted = True
        self.outside.append(Outside(self.handler, self.message, connection, statement))


_calling: ContextVar[_Call | None] = ContextVar(
    "consumer_testing_call", default=None
)  # tasks of the handler inherit it


class Watch:
    """Looks at the other sessions of the database after each call.

    connection: one of its own. outside: where to add what was seen.
    """

    def __init__(self, connection: Any, outside: list[Outside]) -> None:
        self._connection = connection
        self._outside = outside
        self._own = {connection.get_server_pid()}
        self._transaction: Any = None
        self._lock = asyncio.Lock()
        self._seen: dict[int, Any] = {}  # pid -> when its last statement began
        self._sessions = 0  # opened in this database, ever
        self._rows = OutsideRows(connection)
        self._called: set[str] = set()  # handlers with a transaction
        self._is_blind = False  # the connection is gone

    async def start(self) -> None:
        """Note what is there before the first message."""
        await self.look(None)
        await self._rows.start(self._own)

    def own(self, connection: Any) -> None:
        """Note the connection of the transaction."""
        self._own.add(connection.get_server_pid())
        self._transaction = connection
        self._sessions += 1

    def around(self, handler: Handler) -> Callable[[Any, Any, Any], Awaitable[object]]:
        """The handler's call, watched."""
        inner = handler.call
        assert inner is not None

        async def call(value: Any, message: Any, tx: Any) -> object:
            called = None
            if handler.idempotent:  # else all that it does is outside, by its own choice
                self._called.add(handler.name)
                called = _Call(handler.name, _messages(message, tx), self._transaction, self._outside)
            token = _calling.set(called)
            try:
                return await inner(value, message, tx)
            finally:
                _calling.reset(token)
                await self.look(called)

        return call

    async def look(self, call: _Call | None) -> None:
        """Note what was run since the last look.

        It is attributed to this call; without one, it is what was there before.
        """
        async with self._lock:
            try:
                rows = await self._connection.fetch(SESSIONS, list(self._own))
                changed = await self._rows.changed()
            except Exception as error:
                self._note_blind(error)
                return
            opened, self._sessions = rows[0]["sessions"] - self._sessions, rows[0]["sessions"]
            there = {row["pid"]: row for row in rows if row["pid"] is not None}
            before, self._seen = self._seen, {pid: row["query_start"] for pid, row in there.items()}
        if call is None:
            return
        for pid, row in there.items():
            if pid not in call.pids and (pid not in before or before[pid] != row["query_start"]):
                name = row["application_name"] or "a session without a name"
                call.note(f"{name} (pid {pid})", row["query"] or "nothing yet")
        gone = opened - len({*there, *call.pids} - set(before))
        if gone > 0:
            call.note("another connection", f"unknown: {gone} session(s) opened and closed again")
        if not call.noted:
            self._note_rows(call.handler, call.message, changed)

    async def committing(self, transaction: Any, written: Collection[str]) -> None:
        """Note what is about to be stored, and what others have stored."""
        async with self._lock:
            await self._rows.committing(transaction, written)
            await self._look_at_rows()
            self._rows.in_doubt()

    def committed(self) -> None:
        """The transaction of ours is stored."""
        self._rows.committed()

    async def end(self) -> None:
        """Note what others have stored, or not stored yet."""
        async with self._lock:
            try:
                self._note_rows("", "", await self._rows.left_open(self._own), _LEFT_OPEN)
            except Exception as error:
                self._note_blind(error)
            await self._look_at_rows()

    async def _look_at_rows(self) -> None:
        try:
            self._note_rows("", "", await self._rows.changed())
        except Exception as error:
            self._note_blind(error)

    def _note_rows(self, handler: str, message: str, tables: Collection[str], text: str = _CHANGED) -> None:
        handler = handler or " or ".join(sorted(self._called))
        if tables and self._called:  # else it was handlers that opted out
            outside = Outside(handler, message, "another connection", text.format(tables=", ".join(tables)))
            self._outside.append(outside)

    def _note_blind(self, error: BaseException) -> None:
        """Note that nothing can be seen any more.

        A handler ended all connections, or locked tables.
        """
        if not self._is_blind and self._called:
            self._is_blind = True
            self._note_rows("", "", [type(error).__name__], _BLIND)


def _messages(message: Any, tx: Any) -> str:
    """Return the places of the messages, as far as known.

    A batch handler knows them only if it asks for Message.
    """
    if isinstance(tx.subject, Delivery):
        return place_of(tx.subject.record)
    return ", ".join(place_of(part) for part in message if isinstance(part, Message))


@contextmanager
def noting() -> Iterator[None]:
    """Note what asyncpg connections run while a handler is called.

    Prepared statements too.
    """
    driver = sys.modules["asyncpg"]  # loaded by the package postgres, which alone imports it
    prepared = driver.prepared_stmt.PreparedStatement
    originals = [
        (kind, name, vars(kind)[name], noted)
        for kind, names, noted in ((driver.Connection, _NOTED, _noting), (prepared, _RUN, _noting_prepared))
        for name in names
        if name in vars(kind)
    ]
    for kind, name, original, noted in originals:
        setattr(kind, name, noted(name, original))
    try:
        yield
    finally:
        for kind, name, original, _ in originals:
            setattr(kind, name, original)


def _noting(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        call = _calling.get()
        if call is not None and self is not call.transaction and not self.is_closed():
            text = str(args[0] if args else next(iter(options.values()), ""))
            call.pids.add(self.get_server_pid())
            # Not a pool's own statement, and not the frame around what is noted anyway.
            if name == "prepare":
                call.prepared.add(text)
            if text != self.get_reset_query() and not transaction_control(text):
                call.note("asyncpg", f"{name} {text}" if name.startswith("copy") else text)
        return original(self, *args, **options)

    return method


def _noting_prepared(name: str, original: Any) -> Any:
    """Note a statement when it runs, if it was prepared before."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        call = _calling.get()
        connection = self._connection
        if call is not None and connection is not call.transaction and not connection.is_closed():
            call.pids.add(connection.get_server_pid())
            if (text := self.get_query()) not in call.prepared:
                call.note("asyncpg", text)
        return original(self, *args, **options)

    return method
