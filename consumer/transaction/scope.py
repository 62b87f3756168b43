"""What the messages of a batch share: connection and deferred writes.

The batch rule is kept here: a batch leaves what its messages would leave one after the other. Writes go out in the
order of their messages, grouped only where deferred_writes/statement_order.py proves that nothing differs. With
concurrency, a message takes the turn with its first statement and keeps it until its handler ends.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from consumer.core.identifiers import ident
from consumer.deferred_writes.statement_order import Group, commute, group
from consumer.deferred_writes.writer import BulkWriter
from consumer.postgres.sql_text import Traits, traits
from consumer.transaction.publishing import Publisher

if TYPE_CHECKING:  # the pytest plugin imports this file and must not load the driver
    from consumer.postgres.application_codecs import Preparer

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


_TEMPORARY = """
select relname, relkind = 'v' from pg_class
where relnamespace = pg_my_temp_schema() and relkind in ('r', 'p', 'v')
"""
_DROP = {True: "drop view if exists pg_temp.{} cascade", False: "drop table if exists pg_temp.{} cascade"}
_savepoint_numbers = itertools.count(1)  # never one name twice: a task left behind must not meet another's savepoint


def savepoint_name() -> str:
    """A name that no savepoint of this process has had."""
    return f"consumer_{next(_savepoint_numbers)}"


class Turn:
    """Lets messages use the connection in turn, until their handlers end."""

    def __init__(self) -> None:
        self.holder: Sender | None = None
        self._waiting: deque[tuple[Sender, asyncio.Future[None]]] = deque()

    async def take(self, tx: Sender) -> None:
        """Wait until this message has the turn.

        Several tasks of its handler may wait for it.
        """
        if self.holder is None:
            self.holder = tx
        while self.holder is not tx and tx.is_open:
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
        """Pass the turn on, if this message has it; end its waiting."""
        if self._waiting:
            for sender, future in self._waiting:
                if sender is tx and not future.done():
                    future.set_result(None)
        if self.holder is not tx:
            return
        self.holder = next((sender for sender, future in self._waiting if sender.is_open and not future.done()), None)
        for sender, future in self._waiting:
            if sender is self.holder and not future.done():
                future.set_result(None)


class Scope:
    """The deferred writes of a batch, in the order of its messages.

    connection: runs the handlers' statements. own: the same one, without the application's codecs, for statements of ours.
    preparer: where an ORM prepares its statements.
    constraints: those of the database that are checked at COMMIT, once a statement was awaited. flush_error: what a
    flush has failed with.
    """

    def __init__(
        self, connection: Any, bulk_writer: BulkWriter, own: Any = None, preparer: Preparer | None = None
    ) -> None:
        self.connection = connection
        self.own = connection if own is None else own
        self.preparer = preparer
        self.bulk_writer = bulk_writer
        self.turn = Turn()
        self.deferred: list[Sender] = []
        self.constraints: Sequence[str] | None = None
        self.flush_error: BaseException | None = None
        self.publishers: dict[Sender, Publisher] = {}  # of the messages that have published something
        self._begun = False
        # What the running message leaves beside rows, until its end.
        self.makes_temporary = self.opens_cursor = self.sets_constraints = False

    def _begin(self) -> None:
        """Forget what an earlier transaction learned if it altered the schema.

        It may have been rolled back.
        """
        if not self._begun:
            self._begun = True
            if self.bulk_writer.altered:
                self.bulk_writer.forget()
                self.bulk_writer.altered = False

    def defer(self, tx: Sender) -> None:
        """Note that a message has deferred writes now.

        One that holds the turn comes before those that ended meanwhile.
        """
        if tx.placed:
            self.deferred.insert(0, tx)
        else:
            self.deferred.append(tx)

    async def flush(self, tx: Sender | None = None) -> None:
        """Send the deferred writes of ended messages, then those of `tx`.

        `tx` is running. Once `tx` has begun to use the connection, only its own: what has ended since comes after it.
        Raises what the database says. It is not known whose write it was: `flush_error` then says that the batch has
        failed, whatever a handler does with the exception.
        """
        if tx is not None and not tx.placed:
            tx.placed = True
            self._begin()
            if self.constraints is None:
                self.constraints = await self.bulk_writer.deferred_constraints()
            pending = [sender for sender in self.deferred if not sender.is_open and sender is not tx]
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
            self.deferred = [sender for sender in self.deferred if sender not in sent]
        messages = [sender.writes for sender in pending]
        for sender in pending:
            sender.touched, sender.writes = True, []
        try:
            await self.send(messages, unfinished=tx is not None and pending[-1] is tx)
        except BaseException as error:
            self.flush_error = error
            raise

    async def send(self, messages: Sequence[Writes], *, unfinished: bool = False) -> None:
        """Send writes as if one message came after the other.

        Raises what the database says. unfinished: the last of them goes on after this.
        """
        self._begin()
        by_statement: dict[str, list[Sequence[Any]]] = {}
        for writes in messages:
            for sql, arguments in writes:
                by_statement.setdefault(sql, []).append(arguments)
        kinds = [traits(sql) for sql in by_statement]
        constraints = await self.bulk_writer.deferred_constraints()
        if any(kind.outlasts for kind in kinds) or (
            constraints and None in (await self.bulk_writer.plans(by_statement)).values()
        ):
            await self._send_apart(messages, unfinished)
            return
        several = 1 < len(by_statement) < sum(map(len, by_statement.values()))
        if len(by_statement) == 1 or (several and commute(plans := await self.bulk_writer.plans(by_statement))):
            await self._send_groups(list(by_statement.items()))
        elif several:
            await self._send_groups(group([write for writes in messages for write in writes], plans))
        else:
            await self._send_groups([(sql, [arguments]) for writes in messages for sql, arguments in writes])

    async def _send_apart(self, messages: Sequence[Writes], unfinished: bool) -> None:
        """Send messages one by one, with the ends of their own transactions."""
        for number, writes in enumerate(messages, 1):
            kinds = [traits(sql) for sql, _ in writes]
            for kind in kinds:
                self.note(kind)
            if any(kind.changes_schema for kind in kinds):  # a statement may change what the next one means
                for sql, arguments in writes:
                    await self.bulk_writer.connection_for(sql).execute(sql, *arguments)
                self.schema_changed()
            else:
                await self._send_groups(await self._groups(writes))
            if number < len(messages) or not unfinished:
                await self.end_message()

    async def _groups(self, writes: Writes) -> list[Group]:
        statements: dict[str, list[Sequence[Any]]] = {}
        for sql, arguments in writes:
            statements.setdefault(sql, []).append(arguments)
        return group(writes, await self.bulk_writer.plans(statements))

    async def _send_groups(self, groups: Sequence[Group]) -> None:
        for sql, executions in groups:
            await self.bulk_writer.send(sql, executions)

    def schema_changed(self) -> None:
        """Forget what was read of the schema, here and after the transaction."""
        self.bulk_writer.forget()
        self.bulk_writer.altered = True
        self.constraints = None

    def undone(self) -> None:
        """Forget a schema whose change was rolled back to a savepoint."""
        if self.bulk_writer.altered:
            self.schema_changed()

    def note(self, kind: Traits) -> None:
        """Note what a statement of the running message leaves beside rows."""
        if kind.changes_schema:
            self.schema_changed()
        self.makes_temporary |= kind.makes_temporary
        self.opens_cursor |= kind.opens_cursor
        self.sets_constraints |= kind.sets_constraints or kind.changes_schema

    @property
    def leaves_something(self) -> bool:
        """Whether the end of the running message has work to do here."""
        return self.makes_temporary or self.opens_cursor or self.sets_constraints or bool(self.constraints)

    async def end_message(self) -> None:
        """Check and clean up as the COMMIT of this message alone would."""
        self.constraints = constraints = await self.bulk_writer.deferred_constraints()
        if constraints or self.sets_constraints:
            await self.connection.execute("set constraints all immediate")
        if constraints:
            await self.connection.execute(f"set constraints {', '.join(constraints)} deferred")
        if self.opens_cursor:
            await self.connection.execute("close all")
        if self.makes_temporary:
            for name, is_view in await self.own.fetch(_TEMPORARY):
                await self.own.execute(_DROP[is_view].format(ident(name)))
            self.schema_changed()
        self.makes_temporary = self.opens_cursor = self.sets_constraints = False
