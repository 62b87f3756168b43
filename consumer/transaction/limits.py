"""What each lane is doing: which handlers are running, since when, and what becomes of those that take too long.

Knows handlers, tasks and times; knows no SQL. A call that outlasts its limit is cancelled, which handlers may clean up
after; one that goes on in spite of that loses its connection (PostgreSQL undoes what it wrote) and its Tx, and when
that does not end it either, the worker has to end: a task that swallows every exception cannot be stopped from outside.
What is not known: whether a call that takes long would have ended by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.handler import Handler
from consumer.core.ordering import Delivery
from consumer.logs import event
from consumer.settings import Settings
from consumer.transaction.tx import Tx

GRACE_SECONDS = 5.0  # after the cancellation, before the connection is ended
LAST_SECONDS = 2.0  # after that, before the worker is
BLOCKED_SECONDS = 2.0  # an event loop that does not turn for so long is told of while it does not
_LOOK_SECONDS = 0.5
_OF_IDLE = 0.6  # of the idle timeout: a third may pass before the last call of a batch (see postgres/session.py), and some is left


def limits(handlers: Iterable[Handler], settings: Settings) -> dict[str, float]:
    """Seconds that one call of each handler may take, 0 for no limit.

    Raises Misconfigured for a limit beyond which PostgreSQL would end the handler's idle transaction first, which cannot
    be told from an outage.
    """
    idle = settings.postgres_idle_in_transaction_timeout_seconds
    found: dict[str, float] = {}
    for each in handlers:
        seconds, name = each.timeout, f"timeout= of handler {each.name!r}"
        if seconds is None:
            seconds, name = settings.handler_timeout_seconds, "CONSUMER_HANDLER_TIMEOUT_SECONDS"
        if seconds is None:
            seconds = idle / 2
        if each.idempotent and seconds > idle * _OF_IDLE:
            raise Misconfigured(
                f"{name} is {seconds:g} s, and PostgreSQL ends a transaction that is idle for {idle:g} s, with up to a third "
                f"of that gone before the call: set CONSUMER_POSTGRES_IDLE_IN_TRANSACTION_TIMEOUT_SECONDS to at least "
                f"{seconds / _OF_IDLE:.0f}, or the limit to at most {idle * _OF_IDLE:g} (or 0 for none)"
            )
        found[each.name] = seconds
    return found


class HandlerTimeout(ConsumerError):
    """A call of a handler was ended by its limit. in_statement: it was waiting for PostgreSQL, which is nobody's fault."""

    def __init__(self, deliveries: Sequence[Delivery], seconds: float, in_statement: bool) -> None:
        where = "a statement of the handler" if in_statement else "the handler"
        super().__init__(f"{where} had not ended after {seconds:g} s")
        self.deliveries = deliveries
        self.in_statement = in_statement


class HandlerUncancellable(ConsumerError):
    """A handler goes on after its cancellation and without its connection. Only the end of the process ends it."""

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
    """One lane's. `running` are its calls; without any, it waits for PostgreSQL, since `changed_at`.

    running_inline: the handler that runs at this moment and has not waited for anything yet.
    """

    __slots__ = ("_asking", "_limits", "changed_at", "running", "running_inline")

    def __init__(self, limits: Mapping[str, float]) -> None:
        self._limits = limits
        self.running: dict[asyncio.Task[Any], Call] = {}
        self._asking = False
        self.changed_at = 0.0
        self.running_inline: Handler | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """In it, outside of handlers, there is nothing to wait for but PostgreSQL."""
        self._asking = True
        self.step()
        try:
            yield
        finally:
            self._asking = False

    def step(self) -> None:
        """Something was answered."""
        self.changed_at = time.monotonic()

    def wrap_step(self, tell: Callable[[str], None]) -> Callable[[str], None]:
        """A function that is told the steps of the transaction, and passes them on."""

        def told(step: str) -> None:
            self.changed_at = time.monotonic()
            tell(step)

        return told

    def waiting_seconds(self, now: float) -> float:
        """How long PostgreSQL has not answered. Statements that handlers wait for are theirs to wait for."""
        return now - self.changed_at if self._asking and not self.running else 0.0

    def enter(
        self, handler: Handler, deliveries: Sequence[Delivery], tx: Tx | None, since: float | None = None
    ) -> Call:
        """A handler was called by this task, and is waited for. since: when, monotonic; None: now."""
        task = asyncio.current_task()
        assert task is not None
        call = Call(handler, deliveries, tx, task, time.monotonic() if since is None else since)
        self.running[task] = call
        return call

    def leave(self, call: Call, error: BaseException | None = None) -> None:
        """It has ended, by an exception perhaps. Raises HandlerTimeout if it was its limit that ended it.

        The order to this task to stop comes first, and is passed on even if the handler has swallowed it: a lane that went
        on after its worker has ended would be nobody's.
        """
        del self.running[call.task]
        self.step()
        ended_by_limit = call.state is not _State.RUNNING
        if call.task.uncancel() if ended_by_limit else call.task.cancelling():
            if isinstance(error, asyncio.CancelledError):
                return
            raise asyncio.CancelledError from error
        if not ended_by_limit:
            return
        raise HandlerTimeout(call.deliveries, self._limits[call.handler.name], call.in_statement) from error

    def enforce_limits(self, now: float) -> None:
        """End what takes too long. Raises HandlerUncancellable for what cannot be ended."""
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


def memory_mb() -> int | None:
    """Memory of this process that is in RAM, as Linux counts it; None where that cannot be asked."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


class LoopWatch:
    """A thread that says which handler blocks the event loop, while it does: the loop itself can only tell afterwards.

    It names the handler and the innermost line of code, and no values.
    """

    def __init__(self, trackers: Iterable[CallTracker]) -> None:
        self._trackers = list(trackers)
        self._loop = asyncio.get_running_loop()
        self._thread_of_loop = threading.get_ident()
        self._turned_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="consumer-loop-watch", daemon=True)

    def start(self) -> None:
        """Begin, in the event loop's own thread."""
        self._turn()
        self._thread.start()

    def stop(self) -> None:
        """End; returns when the thread has."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        if not self._over.is_set():
            self._loop.call_later(_LOOK_SECONDS, self._turn)

    def _watch(self) -> None:
        told = 0.0
        before = time.monotonic()
        while not self._over.wait(_LOOK_SECONDS):
            now, slept_from = time.monotonic(), before
            before = now
            if now - slept_from > 2 * _LOOK_SECONDS:
                continue  # this thread did not run either: the whole process was stopped
            blocked = now - self._turned_at - _LOOK_SECONDS
            if blocked < BLOCKED_SECONDS:
                told = 0.0
            elif blocked > 2 * told:
                told = blocked
                self._tell(blocked)

    def _tell(self, seconds: float) -> None:
        task = asyncio.current_task(self._loop)
        names = [each.running_inline.name for each in self._trackers if each.running_inline is not None]
        names += [call.handler.name for each in self._trackers for call in [each.running.get(task)] if call]  # type: ignore[arg-type]
        frame = sys._current_frames().get(self._thread_of_loop)
        place = None
        if frame is not None:
            code = frame.f_code
            place = f"{code.co_filename.rsplit('/', 2)[-1]}:{frame.f_lineno} in {code.co_name}"
        event(
            logging.WARNING,
            "the event loop is blocked: a handler does not await",
            handler=names[0] if names else None,
            at=place,
            seconds=round(seconds, 1),
        )
