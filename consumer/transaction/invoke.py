"""Calls of handlers: begun, awaited, and ended by their limit.

Knows handlers, tasks and what is raised; knows no SQL. A handler may raise anything, a cancellation of its own making too: here
all of it becomes an Exception, but for the order to this task to stop. What it does not know: what a call has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator, Sequence
from types import CoroutineType, coroutine
from typing import Any

from consumer.core.handler import Handler
from consumer.core.ordering import Delivery
from consumer.transaction.limits import CallTracker
from consumer.transaction.tx import Tx


class HandlerEnded(Exception):
    """The handler ended itself by something that is no Exception: a cancellation, sys.exit, a panic."""


def start_call(handler: Handler, argument: Any, tx: Tx | None, calls: CallTracker | None) -> Awaitable[object] | None:
    """Run a handler up to where it waits for something. Returns what is left to await in this task; None when it has ended.

    Most handlers only defer, and never wait. For those nothing more is needed: no limit can end what does not let go of the
    event loop, and nothing that happens in it can come from elsewhere. To the handler it makes no difference: a coroutine runs
    in the task that awaits it, up to where it waits. An exception is raised by what is returned.
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
    """Await what is left of a handler's call, within its limit. since: when it was begun, monotonic; None: now."""
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
    """Await a call. Whatever it raises comes as an Exception, but for the order to this task to stop."""
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
