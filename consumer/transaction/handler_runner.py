"""Calls the handlers of one transaction, and sets the outcomes of failures.

A message whose handler raises before it sent a statement costs only itself. Otherwise the whole transaction is poisoned
(errors.py), unless the message ran between savepoints. Limitations: effects outside PostgreSQL are not undone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

from consumer.core.dead_letters import blocks_key
from consumer.core.delivery import Delivery
from consumer.core.errors import TransactionMisuse, Unreadable
from consumer.core.evidence import Evidence
from consumer.core.handler import Handler
from consumer.core.outcome import RetryLater
from consumer.outbox.record import Outgoing
from consumer.transaction.arguments import argument_of
from consumer.transaction.batch_store import BatchStore
from consumer.transaction.chains import in_chains
from consumer.transaction.errors import facts_of, raise_for_transaction, statements_of_messages
from consumer.transaction.identify import decoded
from consumer.transaction.invoke import finish_call, start_call
from consumer.transaction.isolate import TransactionPoisoned, decide
from consumer.transaction.limits import CallTracker, HandlerTimeout
from consumer.transaction.publishing import in_message_order
from consumer.transaction.result import BEHIND_DEAD_LETTER, BEHIND_RETRY, NEXT_BATCH, BatchResult, FailedAttempt
from consumer.transaction.scope import Scope, savepoint_name
from consumer.transaction.tx import Tx

_CALLS_AT_A_TIME = 100
_handler_of = attrgetter("handler")


class HandlerRunner:
    """Calls the handlers of the messages of one transaction.

    use_savepoints: around every message, so that one failure costs one message. calls: ends those that take too long.
    evidence: how other messages of a handler fare, to distinguish a message's fault from a systemic one.
    """

    def __init__(
        self,
        session: BatchStore,
        result: BatchResult,
        use_savepoints: bool,
        random: Callable[[], float],
        calls: CallTracker | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self._calls = calls
        self._evidence = evidence
        self._session = session
        self._scope = Scope(session.handler_connection, session.bulk_writer, session.connection, session.preparer)
        self._result = result
        self._use_savepoints = use_savepoints
        self._random = random
        self._blocked: set[Hashable] = set()  # ordering keys whose message failed: later ones wait behind it
        self._held: set[Hashable] = set()  # ordering keys with a new dead letter: later ones become dead letters too
        self._went_through: set[str] = set()  # handlers of messages that ran between savepoints and did not fail
        self._started = False
        self._now = time.monotonic()
        self._until = self._now + session.batch_seconds_max

    async def run(self, won: Sequence[Delivery]) -> None:
        """Run the messages in batch order, and send their deferred writes.

        Batch handlers and concurrent ones run by themselves. Raises TransactionPoisoned, Conflict or Outage.
        """
        with statements_of_messages(self._session):
            by_handler: dict[Handler | None, list[Delivery]] = {}
            outcomes = self._result.outcomes
            for delivery in won:
                if delivery.outcome is None and delivery not in outcomes:
                    by_handler.setdefault(self._runs_apart(delivery.handler), []).append(delivery)
            for handler, deliveries in by_handler.items():
                if handler is None:
                    await self._run_in_order(deliveries)
                elif handler.batch is None:
                    await in_chains(deliveries, handler.concurrency, self._run_one)
                else:
                    await self._run_chunks(handler, handler.batch, deliveries)
            await self._scope.flush()

    def outgoing(self, applied: Sequence[Delivery]) -> list[Outgoing]:
        """Return what the handlers of applied messages have published, in order."""
        publishers = self._scope.publishers
        return in_message_order(publishers.values(), applied) if publishers else []

    def _runs_apart(self, handler: Handler) -> Handler | None:
        """Return the handler if its messages run apart; None for batch order."""
        return None if handler.batch is None and (handler.concurrency == 1 or self._use_savepoints) else handler

    async def _run_in_order(self, deliveries: Sequence[Delivery]) -> None:
        task = asyncio.current_task()
        is_timed = self._calls is not None and self._calls.is_timed
        for first in range(0, len(deliveries), _CALLS_AT_A_TIME):
            await asyncio.sleep(0)  # handlers that only defer never wait: let the other lanes' answers in
            some = deliveries[first : first + _CALLS_AT_A_TIME]
            if is_timed:
                await self._run_timed(some, task)
                continue
            for delivery in some:
                if (rest := self._start(delivery, task)) is not None:
                    await rest

    async def _run_timed(self, deliveries: Sequence[Delivery], task: asyncio.Task[Any] | None) -> None:
        """Run messages in order, and record the times of their calls.

        Calls that never wait are timed together: the clock costs as much as a short call. CallTracker times the others.
        """
        seconds, since = 0.0, time.monotonic()
        outcomes, waited = self._result.outcomes, set[Delivery]()
        before = len(outcomes)
        for delivery in deliveries:
            if (rest := self._start(delivery, task)) is not None:
                seconds += self._now - since
                waited.add(delivery)
                await rest
                since = time.monotonic()
        seconds += time.monotonic() - since
        if waited or len(outcomes) > before:
            deliveries = [one for one in deliveries if one not in outcomes and one not in waited]
        self._record_times(deliveries, seconds)

    def _record_times(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Record calls that never waited. seconds: of all of them."""
        if self._calls is None or not deliveries:
            return
        handlers = set(map(_handler_of, deliveries))
        if len(handlers) == 1:  # fast path
            self._calls.ran(handlers.pop(), seconds, len(deliveries))
            return
        mean = seconds / len(deliveries)
        for handler, calls in Counter(map(_handler_of, deliveries)).items():
            self._calls.ran(handler, mean * calls, calls)

    async def _run_one(self, delivery: Delivery, task: asyncio.Task[Any] | None) -> None:
        if (rest := self._start(delivery, task)) is not None:
            await rest
        elif self._calls is not None and self._calls.is_timed and delivery not in self._result.outcomes:
            self._calls.ran(delivery.handler, time.monotonic() - self._now)

    def _start_timed(self, handler: Handler, argument: Any, tx: Tx) -> Awaitable[object] | None:
        """Start a call; record its time if it never waits."""
        since = time.monotonic()
        call = start_call(handler, argument, tx, self._calls)
        if call is None and self._calls is not None:
            self._calls.ran(handler, time.monotonic() - since)
        return call

    # -- one message ------------------------------------------------------------------------------------------------

    def _start(self, delivery: Delivery, task: asyncio.Task[Any] | None) -> Awaitable[None] | None:
        """Start a message. Returns what is left to await, if anything."""
        if self._is_late():
            self._result.outcomes[delivery] = NEXT_BATCH
            return None
        if self._blocked and delivery.ordering_key() in self._blocked:
            self._result.outcomes[delivery] = BEHIND_RETRY
            return None
        if self._held and delivery.ordering_key() in self._held:
            self._result.outcomes[delivery] = BEHIND_DEAD_LETTER
            return None
        tx = Tx(self._scope, delivery, task)
        if self._use_savepoints:
            return self.run_between_savepoints(delivery, tx)
        try:
            argument = argument_of(delivery, delivery.handler)
        except Exception as error:
            return self._failed(delivery, tx, error)
        call = start_call(delivery.handler, argument, tx, self._calls)
        if call is None and tx.error is None and tx.close():
            return None  # fast path: nothing was sent, so nothing but its deferred writes is left of it
        return self._finish(delivery, tx, call, self._now)

    async def run_between_savepoints(self, delivery: Delivery, tx: Tx) -> None:
        """Run a message so that its failure undoes only its own writes."""
        try:
            argument = argument_of(delivery, delivery.handler)
            await self._call(
                delivery.handler, lambda: self._start_timed(delivery.handler, argument, tx), tx, [delivery]
            )
            self._went_through.add(delivery.handler.name)
        except Exception as error:
            await self._failed(delivery, tx, error)

    async def _finish(self, delivery: Delivery, tx: Tx, call: Awaitable[object] | None, since: float) -> None:
        """Await a call that has started."""
        try:
            await self._call(delivery.handler, lambda: call, tx, [delivery], since)
        except Exception as error:
            await self._failed(delivery, tx, error)

    def _is_late(self) -> bool:
        """Return whether the batch's time is over; never before its first call.

        Slow handlers keep the transaction open and the connection idle: what is done must be committed before
        PostgreSQL ends both, or the same batch would run again for ever.
        """
        self._now = time.monotonic()
        if not self._started or self._now < self._until:
            self._started = True
            return False
        return True

    # -- one call for many messages -----------------------------------------------------------------------------------

    async def _run_chunks(self, handler: Handler, size: int, deliveries: Sequence[Delivery]) -> None:
        readable = [delivery for delivery in deliveries if self._readable(delivery)]
        for chunk in _chunks(readable, size):
            if self._is_late():
                self._result.outcomes.update(dict.fromkeys(chunk, NEXT_BATCH))
            else:
                await self._call_batch(handler, chunk)

    async def _call_batch(self, handler: Handler, deliveries: list[Delivery]) -> None:
        """Call a handler once for many messages.

        A call that fails is repeated with halves, down to the message at fault.
        """
        deliveries = self._not_waiting(deliveries)
        if not deliveries:
            return
        tx = Tx(self._scope, deliveries, asyncio.current_task())
        try:
            arguments = tx.arguments = [argument_of(delivery, delivery.handler) for delivery in deliveries]
            await self._call(handler, lambda: self._start_timed(handler, arguments, tx), tx, deliveries)
        except Exception as error:
            if len(deliveries) == 1:
                await self._failed(deliveries[0], tx, error)
                return
            self._check_transaction(tx, error)
            if isinstance(error, HandlerTimeout):
                for delivery in deliveries:
                    await self._call_batch(handler, [delivery])
                return
            middle = len(deliveries) // 2
            await self._call_batch(handler, deliveries[:middle])
            await self._call_batch(handler, deliveries[middle:])

    def _not_waiting(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Return the messages that no failure of their key holds back."""
        outcomes = self._result.outcomes
        for keys, outcome in ((self._blocked, BEHIND_RETRY), (self._held, BEHIND_DEAD_LETTER)):
            if keys:
                outcomes.update((message, outcome) for message in deliveries if message.ordering_key() in keys)
                deliveries = [message for message in deliveries if message not in outcomes]
        return deliveries

    def _readable(self, delivery: Delivery) -> bool:
        try:
            decoded(delivery)
        except Unreadable as error:
            self._record_failure(delivery, error)
            return False
        return True

    # -- calls and failures -------------------------------------------------------------------------------------------

    async def _call(
        self,
        handler: Handler,
        start: Callable[[], Awaitable[object] | None],
        tx: Tx,
        deliveries: Sequence[Delivery],
        since: float | None = None,
    ) -> None:
        """Call the handler, and raise if what it did cannot be stored.

        start: starts the call, and returns what is left to await of it. since: when it started, if it was before.
        """
        connection = self._session.connection
        name = None
        if self._use_savepoints:
            await self._scope.flush()
            name = savepoint_name()
            await connection.execute(f"savepoint {name}")
        try:
            try:
                await finish_call(handler, start(), tx, deliveries, self._calls, since)
            except BaseException:
                if not tx.close():
                    with suppress(TransactionMisuse):
                        await tx.end(failed=True)
                raise
            if not tx.close():
                await tx.end()
            if tx.error is not None:
                raise tx.error  # swallowed by the handler: PostgreSQL would store nothing of it
            if not connection.is_in_transaction():
                raise TransactionMisuse(
                    "the transaction: the handler's statements ended it; leave COMMIT and ROLLBACK to the framework"
                )
            if name is not None:
                await self._scope.flush()
        except Exception:
            tx.discard()
            if name is not None and self._session.is_usable:
                await connection.execute(f"rollback to savepoint {name}")
                self._scope.undone()
                self._scope.flush_error, tx.touched = None, False
            raise
        if name is not None:
            await connection.execute(f"release savepoint {name}")

    def _check_transaction(self, tx: Tx, error: BaseException) -> None:
        """Raise when the transaction, and not only this message, has failed."""
        scope, session = self._scope, self._session
        if isinstance(error, HandlerTimeout):
            if tx.touched or scope.flush_error is not None or not session.is_usable:
                raise TransactionPoisoned from error
            return
        spoiled = scope.flush_error is not None or tx.touched or not session.connection.is_in_transaction()
        for cause in (scope.flush_error, tx.error, error):
            if cause is not None:
                raise_for_transaction(session, cause, spoiled=spoiled)
        if spoiled:
            raise TransactionPoisoned from error

    async def _failed(self, delivery: Delivery, tx: Tx, error: Exception) -> None:
        self._check_transaction(tx, error)
        self._record_failure(delivery, error)

    def _record_failure(self, delivery: Delivery, error: Exception) -> None:
        """Set the outcome of a message that failed by itself."""
        facts = facts_of(error, delivery.handler.place)
        succeeded = delivery.handler.name in self._went_through
        outcome, attempts = decide(delivery, facts, self._random, self._evidence, succeeded)
        self._result.outcomes[delivery] = outcome
        self._result.failures[delivery] = FailedAttempt(attempts, error)
        if isinstance(outcome, RetryLater):
            self._blocked.add(delivery.ordering_key())
        elif blocks_key(outcome) and delivery.ordering_key_hash() is not None:
            self._held.add(delivery.ordering_key())


def _chunks(deliveries: Sequence[Delivery], size: int) -> Iterator[list[Delivery]]:
    """Yield the messages of the calls of a batch handler, in order."""
    chunk: list[Delivery] = []
    for delivery in deliveries:
        if chunk and (len(chunk) == size or delivery.call_alone or chunk[-1].call_alone):
            yield chunk
            chunk = []
        chunk.append(delivery)
    if chunk:
        yield chunk
