"""What the messages of one batch share: the connection, the deferred writes in batch order, and the turn to use it.

Knows one connection; knows no Kafka and no handlers. The batch rule is kept here: what a batch leaves is what its messages would
leave one after the other. Writes go out in the order of their messages, grouped only where core/grouping.py proves that
nothing differs. With concurrency, a message takes the turn with its first statement and keeps it until its handler ends.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from consumer.columns import Columns
from consumer.core.grouping import Group, commute, group
from consumer.core.sqltext import traits

Writes: TypeAlias = Sequence[tuple[str, Sequence[Any]]]  # of one message, in order: SQL and arguments


class Sender(Protocol):
    """What is known here of a message's Tx.

    is_open: its handler has not ended. placed: it has begun to use the connection. touched: something of it was sent.
    waited_seconds: for the turn, so far; waiting_since: when it began to wait, if it waits now.
    """

    is_open: bool
    placed: bool
    touched: bool
    writes: list[tuple[str, Sequence[Any]]]
    waited_seconds: float
    waiting_since: float | None


_savepoint_numbers = itertools.count(1)  # never one name twice: a task left behind must not meet another's savepoint


def savepoint_name() -> str:
    """A name that no savepoint of this process has had."""
    return f"consumer_{next(_savepoint_numbers)}"


class Turn:
    """Lets one message after the other use the connection, each until its handler ends, in the order they asked."""

    def __init__(self) -> None:
        self.holder: Sender | None = None
        self._waiting: deque[tuple[Sender, asyncio.Future[None]]] = deque()

    async def take(self, tx: Sender) -> None:
        """Wait until this message has the turn; other tasks of its handler may be waiting for it too."""
        if self.holder is None:
            self.holder = tx
        while self.holder is not tx:
            entry = (tx, asyncio.get_running_loop().create_future())
            self._waiting.append(entry)
            since = time.monotonic()
            tx.waiting_since = tx.waiting_since or since
            try:
                await entry[1]
            finally:
                self._waiting.remove(entry)
                tx.waited_seconds += time.monotonic() - (tx.waiting_since or since)
                tx.waiting_since = None

    def release(self, tx: Sender) -> None:
        """Pass the turn on, if this message has it."""
        if self.holder is not tx:
            return
        self.holder = next((each for each, future in self._waiting if each.is_open and not future.done()), None)
        for each, future in self._waiting:
            if each is self.holder and not future.done():
                future.set_result(None)


class Scope:
    """The writes deferred so far, each message's at its place in the order.

    constraints: those of the database that are checked at COMMIT, once a statement was awaited. flush_error: what a flush
    has failed with.
    """

    def __init__(self, connection: Any, columns: Columns) -> None:
        self.connection = connection
        self.columns = columns
        self.turn = Turn()
        self.deferred: list[Sender] = []
        self.constraints: Sequence[str] | None = None
        self.flush_error: BaseException | None = None
        self._begun = False

    def _begin(self) -> None:
        """Forget what was learned in an earlier transaction that altered the schema, and may have been undone."""
        if not self._begun:
            self._begun = True
            if self.columns.altered:
                self.columns.forget()
                self.columns.altered = False

    def defer(self, tx: Sender) -> None:
        """Note that a message has deferred writes now. One that holds the turn comes before those that ended meanwhile."""
        if tx.placed:
            self.deferred.insert(0, tx)
        else:
            self.deferred.append(tx)

    async def flush(self, tx: Sender | None = None) -> None:
        """Send the deferred writes of all messages that have ended, and then those of `tx`, which is running.

        Once `tx` has begun to use the connection, only its own: what has ended since comes after it. Raises what the
        database says. It is not known whose write it was: `flush_error` then says that the batch has failed, whatever a
        handler does with the exception.
        """
        if tx is not None and not tx.placed:
            tx.placed = True
            self._begin()
            if self.constraints is None:
                self.constraints = await self.columns.deferred_constraints()
            pending = [each for each in self.deferred if not each.is_open and each is not tx]
            if tx.writes:
                pending.append(tx)
        elif tx is not None:
            pending = [tx] if tx.writes else []
        else:
            pending = self.deferred
        if not pending:
            return
        if len(pending) == len(self.deferred):
            self.deferred = []
        else:
            sent = set(pending)
            self.deferred = [each for each in self.deferred if each not in sent]
        messages = [each.writes for each in pending]
        for each in pending:
            each.touched, each.writes = True, []
        try:
            await self.send(messages)
        except BaseException as error:
            self.flush_error = error
            raise

    async def send(self, messages: Sequence[Writes]) -> None:
        """Send the writes of messages as if one message came after the other. Raises what the database says."""
        self._begin()
        by_statement: dict[str, list[Sequence[Any]]] = {}
        for writes in messages:
            for sql, arguments in writes:
                by_statement.setdefault(sql, []).append(arguments)
        kinds = [traits(sql) for sql in by_statement]
        if any(each.changes_schema for each in kinds):
            await self._send_each(messages)
            return
        constraints = await self.columns.deferred_constraints()
        if any(each.sets_constraints for each in kinds) or (
            constraints and None in (await self.columns.plans(by_statement)).values()
        ):
            for writes in messages:
                await self._send_groups(await self._groups(writes))
                await self.check_constraints()
            return
        several = 1 < len(by_statement) < sum(map(len, by_statement.values()))
        if len(by_statement) == 1 or (several and commute(plans := await self.columns.plans(by_statement))):
            await self._send_groups(list(by_statement.items()))
        elif several:
            await self._send_groups(group([write for writes in messages for write in writes], plans))
        else:
            await self._send_groups([(sql, [arguments]) for writes in messages for sql, arguments in writes])

    async def _groups(self, writes: Writes) -> list[Group]:
        statements: dict[str, list[Sequence[Any]]] = {}
        for sql, arguments in writes:
            statements.setdefault(sql, []).append(arguments)
        return group(writes, await self.columns.plans(statements))

    async def _send_groups(self, groups: Sequence[Group]) -> None:
        for sql, executions in groups:
            await self.columns.send(sql, executions)

    async def _send_each(self, messages: Sequence[Writes]) -> None:
        """One statement after the other, since each may change what the next one means."""
        self.schema_changed()
        try:
            for writes in messages:
                for sql, arguments in writes:
                    await self.connection.execute(sql, *arguments)
                await self.check_constraints()
        finally:
            self.schema_changed()

    def schema_changed(self) -> None:
        """A statement of this transaction may have changed the schema: look again, here and after its end."""
        self.columns.forget()
        self.columns.altered = True
        self.constraints = None

    def undone(self) -> None:
        """A part of the transaction was rolled back: what was learned of a schema that it had changed is no longer true."""
        if self.columns.altered:
            self.schema_changed()

    async def check_constraints(self) -> None:
        """Check what the COMMIT of a message alone would check, and leave the modes as its transaction would begin."""
        self.constraints = constraints = await self.columns.deferred_constraints()
        await self.connection.execute("set constraints all immediate")
        if constraints:
            await self.connection.execute(f"set constraints {', '.join(constraints)} deferred")
