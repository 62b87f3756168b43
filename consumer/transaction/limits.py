"""Tracks running calls of handlers, and ends those that take too long.

A call that outlasts its limit is cancelled, so that the handler can clean up. If it goes on, it loses its connection
(PostgreSQL undoes what it wrote) and its Tx. If that does not end it either, the worker ends: nothing stops a task from
outside that swallows every exception. Limitations: whether a slow call would have ended by itself is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.handler import Handler
from consumer.logs import event
from consumer.metrics.catalog import BATCH_DURATION, HANDLER_DURATION
from consumer.metrics.recorder import Recorder
from consumer.settings import Settings
from consumer.transaction.tx import Tx

GRACE_SECONDS = 5.0  # after the cancellation, before the connection is ended
LAST_SECONDS = 2.0  # after that, before the worker is
_OF_IDLE = 0.6  # of the idle timeout: a third may pass before the last call of a batch (see postgres/session.py), and some is left


# Names of the steps of a transaction in metrics, by the event at their end.
_STEPS = {"claimed": "claim", "handled": "handlers", "before_commit": "store", "committed": "commit"}


def limits(handlers: Iterable[Handler], settings: Settings) -> dict[str, float]:
    """Return the seconds that a call may take, by handler.

    0 for no limit. Calls of effects are listed by their own names, and no transaction limits them. Raises Misconfigured
    for a limit beyond which PostgreSQL would end the handler's idle transaction first: that looks like an outage.
    """
    idle = settings.postgres_idle_in_transaction_timeout_seconds
    limits: dict[str, float] = {}
    for handler in handlers:
        seconds, name = handler.timeout, f"timeout= of handler {handler.name!r}"
        if seconds is None:
            seconds, name = settings.handler_timeout_seconds, "CONSUMER_HANDLER_TIMEOUT_SECONDS"
        if seconds is None:
            seconds = idle / 2
        if handler.idempotent and seconds > idle * _OF_IDLE:
            raise Misconfigured(
                f"{name}: it is {seconds:g} s, and PostgreSQL ends a transaction that is idle for {idle:g} s, with up to a third "
                f"of that gone before the call; set CONSUMER_POSTGRES_IDLE_IN_TRANSACTION_TIMEOUT_SECONDS to at least "
                f"{seconds / _OF_IDLE:.0f}, or the limit to at most {idle * _OF_IDLE:g} (or 0 for none)"
            )
        limits[handler.name] = seconds
        if (effect := handler.effect) is not None:
            own = effect.call.timeout
            limits[effect.call.name] = seconds if own is None else own
            if effect.unsure is not None:
                limits[effect.unsure.name] = limits[effect.call.name]
    return limits


class HandlerTimeout(ConsumerError):
    """The limit of a handler's call has ended it.

    in_statement: it was waiting for PostgreSQL, so it may not be the handler's fault.
    """

    def __init__(self, deliveries: Sequence[Delivery], seconds: float, in_statement: bool) -> None:
        where = "a statement of the handler" if in_statement else "the handler"
        super().__init__(f"{where} had not ended after {seconds:g} s")
        self.deliveries = deliveries
        self.in_statement = in_statement


class HandlerUncancellable(ConsumerError):
    """A handler goes on after its cancellation and without its connection.

    Only the end of the process ends it.
    """

    def __init__(self, handler: str, cause: HandlerTimeout) -> None:
        super().__init__(f"handler {handler!r} cannot be stopped: it swallows its cancellation")
        self.cause = cause


class _State(Enum):
    RUNNING = "running"
    CANCELLED = "cancelled"
    CUT = "cut"  # its connection was ended


class Call:
    """One call of a handler that has not ended yet."""

    __slots__ = ("deliveries", "handler", "in_statement", "since", "state", "task", "tx")

    def __init__(
        self, handler: Handler, deliveries: Sequence[Delivery], tx: Tx | None, task: asyncio.Task[Any], since: float
    ) -> None:
        self.handler = handler
        self.deliveries = deliveries
        self.tx = tx
        self.task = task
        self.since = since
        self.state = _State.RUNNING
        self.in_statement = False


class CallTracker:
    """The running calls of one lane.

    Without any, it waits for PostgreSQL, since `changed_at`. running_inline: the handler that runs at this moment and
    has not waited for anything yet. recorder: takes durations.
    """

    __slots__ = ("_asking", "_limits", "_recorder", "_step_at", "changed_at", "running", "running_inline")

    def __init__(self, limits: Mapping[str, float], recorder: Recorder | None = None) -> None:
        self._limits = limits
        self._recorder = recorder
        self._step_at = 0.0
        self.running: dict[asyncio.Task[Any], Call] = {}
        self._asking = False
        self.changed_at = 0.0
        self.running_inline: Handler | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Mark a block in which only handlers and PostgreSQL are waited for."""
        self._asking = True
        self.step()
        try:
            yield
        finally:
            self._asking = False

    def step(self) -> None:
        """Note that PostgreSQL or a handler has answered."""
        self.changed_at = time.monotonic()

    def wrap_step(self, on_step: Callable[[str], None]) -> Callable[[str], None]:
        """Return a function that notes a step and calls `on_step`."""

        def noted(step: str) -> None:
            self.changed_at = time.monotonic()
            if self._recorder is not None:
                self._record_step(self._recorder, step)
            on_step(step)

        return noted

    def _record_step(self, recorder: Recorder, step: str) -> None:
        if (name := _STEPS.get(step)) is not None:
            recorder.observe(BATCH_DURATION, (name,), self.changed_at - self._step_at)
        self._step_at = self.changed_at

    @property
    def is_timed(self) -> bool:
        """Whether durations of calls are recorded."""
        return self._recorder is not None

    def ran(self, handler: Handler, seconds: float, calls: int = 1) -> None:
        """Record calls that never waited. seconds: of all of them."""
        if self._recorder is not None and calls:
            self._recorder.observe(HANDLER_DURATION, (handler.name,), seconds / calls, calls)

    def waiting_seconds(self, now: float) -> float:
        """Return how long PostgreSQL has not answered, outside of handlers."""
        return now - self.changed_at if self._asking and not self.running else 0.0

    def enter(
        self, handler: Handler, deliveries: Sequence[Delivery], tx: Tx | None, since: float | None = None
    ) -> Call:
        """Track a call that this task awaits. since: monotonic; None: now."""
        task = asyncio.current_task()
        assert task is not None
        call = Call(handler, deliveries, tx, task, time.monotonic() if since is None else since)
        self.running[task] = call
        return call

    def leave(self, call: Call, error: BaseException | None = None) -> None:
        """Stop tracking a call. Raises HandlerTimeout if its limit ended it.

        The cancellation of this task comes first, and is raised even if the handler has swallowed it: a lane must not
        go on after its worker has ended.
        """
        del self.running[call.task]
        self.step()
        if self._recorder is not None:
            waited = 0.0 if call.tx is None else call.tx.turn_seconds(self.changed_at)
            self._recorder.observe(HANDLER_DURATION, (call.handler.name,), self.changed_at - call.since - waited)
        ended_by_limit = call.state is not _State.RUNNING
        if call.task.uncancel() if ended_by_limit else call.task.cancelling():
            if isinstance(error, asyncio.CancelledError):
                return
            raise asyncio.CancelledError from error
        if not ended_by_limit:
            return
        raise HandlerTimeout(call.deliveries, self._limits[call.handler.name], call.in_statement) from error

    def enforce_limits(self, now: float) -> None:
        """End calls that take too long. Raises HandlerUncancellable for one that stays."""
        for call in list(self.running.values()):
            limit = self._limits.get(call.handler.name)
            if not limit:
                continue
            # Waiting for its turn, behind other messages of a concurrent handler, is not the call's own time.
            over = now - call.since - limit - (0.0 if call.tx is None else call.tx.turn_seconds(now))
            match call.state:
                case _State.RUNNING if over > 0:
                    call.state = _State.CANCELLED
                    call.in_statement = call.tx is not None and call.tx.in_statement
                    _tell("a handler takes too long: cancelled", call, now)
                    call.task.cancel()
                case _State.CANCELLED if over > GRACE_SECONDS:
                    call.state = _State.CUT
                    _tell("a handler goes on after its cancellation: its connection is ended", call, now)
                    if call.tx is not None:
                        call.tx.abandon()
                case _State.CUT if over > GRACE_SECONDS + LAST_SECONDS:
                    raise HandlerUncancellable(
                        call.handler.name, HandlerTimeout(call.deliveries, limit, in_statement=False)
                    )
                case _:
                    pass


def _tell(text: str, call: Call, now: float) -> None:
    record = call.deliveries[0].record
    event(
        logging.WARNING,
        text,
        handler=call.handler.name,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        messages=len(call.deliveries),
        seconds=round(now - call.since, 1),
        in_statement=call.in_statement,
    )
