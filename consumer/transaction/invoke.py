"""Starts, awaits and ends calls of handlers.

A handler may raise anything, also a cancellation of its own; here all of it becomes an Exception, except the
cancellation of this task. Limitations: it does not know what a call has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator, Sequence
from types import CoroutineType, coroutine
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.transaction.limits import CallTracker
from consumer.transaction.tx import Tx


class HandlerEnded(Exception):
    """The handler ended by its own cancellation, sys.exit or a panic."""


def start_call(handler: Handler, argument: Any, tx: Tx | None, calls: CallTracker | None) -> Awaitable[object] | None:
    """Run a handler up to its first wait.

    Returns the rest to await; None when it has ended.

    fast path: most handlers only defer, and never wait. They need no limit, since nothing ends code that does not yield
    to the event loop, and no task of their own. A coroutine runs in the task that awaits it, up to its first wait, so
    the handler sees no difference. An exception is raised by what is returned.
    """
    assert handler.call is not None
    if calls is not None:
        calls.running_inline = handler
    try:
        running = handler.call(argument, argument, tx)
        if type(running) is not CoroutineType:
            return running
        try:
            waits_for = running.send(None)
        except StopIteration:
            return None
    except BaseException as error:
        return _raising(error)
    finally:
        if calls is not None:
            calls.running_inline = None
    return _going_on(running, waits_for)


async def _raising(error: BaseException) -> None:
    raise error


@coroutine
def _going_on(running: CoroutineType[Any, Any, object], waits_for: Any) -> Generator[Any, Any, object]:
    """Await a coroutine that waits already. Its task sends None, or throws."""
    while True:
        thrown: BaseException | None = None
        try:
            yield waits_for
        except BaseException as error:
            thrown = error
        try:
            waits_for = running.send(None) if thrown is None else running.throw(thrown)
        except StopIteration as end:
            return end.value


async def finish_call(
    handler: Handler,
    call: Awaitable[object] | None,
    tx: Tx | None,
    deliveries: Sequence[Delivery],
    calls: CallTracker | None,
    since: float | None = None,
) -> None:
    """Await the rest of a handler's call, within its limit.

    since: when it started, monotonic; None: now.
    """
    if call is None:
        return
    if calls is None:
        await await_call(call, tx)
        return
    entry = calls.enter(handler, deliveries, tx, since)
    try:
        await await_call(call, tx)
    except BaseException as error:
        calls.leave(entry, error)
        raise
    calls.leave(entry)


async def await_call(call: Awaitable[object], tx: Tx | None) -> None:
    """Await a call, and raise any failure as an Exception.

    Only the cancellation of this task stays what it is.
    """
    try:
        await call
    except (Exception, KeyboardInterrupt):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # we are being stopped
        raise HandlerEnded("the handler was cancelled from within") from error
    except SystemExit as error:
        raise HandlerEnded(f"the handler called sys.exit({error.code!r})") from error
    except BaseException as error:  # a panic of an extension, for example
        raise HandlerEnded(_text(error)) from error


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return type(error).__name__
