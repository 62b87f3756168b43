"""Handlers behave the same when they are started before they are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from contextvars import ContextVar
from typing import Any

import pytest

from consumer import App
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.transaction.invoke import HandlerEnded, finish_call, start_call
from consumer.transaction.limits import CallTracker

inside: ContextVar[str] = ContextVar("inside", default="outside")


def handler_of(function: Any) -> Any:
    app = App("calling")
    app.handler("t", name="it")(function)
    handler = app.handlers["it"]
    handler.bind({})
    return handler


async def run(function: Any, calls: CallTracker | None = None) -> Awaitable[object] | None:
    """Begin and await, as transaction/handler_runner.py does. Returns what was left to await."""
    handler = handler_of(function)
    delivery = Delivery(handler, LogRecord("t", 0, 0, 0, None, b"", ()))
    left = start_call(handler, b"value", None, calls)
    await finish_call(handler, left, None, [delivery], calls)
    return left


async def test_handler_that_waits_for_nothing_ends_when_started() -> None:
    seen = []

    async def handle(value: bytes) -> None:
        seen.append((value, asyncio.current_task()))

    assert await run(handle) is None
    assert seen == [(b"value", asyncio.current_task())]


async def test_handler_that_waits_continues_in_the_same_task_and_context() -> None:
    seen: list[Any] = []

    async def handle(value: bytes) -> None:
        token = inside.set("inside")
        for n in range(3):
            await asyncio.sleep(0)
            seen.append((n, inside.get(), asyncio.current_task()))
        inside.reset(token)

    calls = CallTracker({"it": 0.0})
    assert await run(handle, calls) is not None
    assert seen == [(n, "inside", asyncio.current_task()) for n in range(3)]
    assert inside.get() == "outside" and not calls.running and calls.running_inline is None


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("raised", "comes_as"),
    [
        (ValueError, ValueError),
        (StopAsyncIteration, StopAsyncIteration),
        (asyncio.CancelledError, HandlerEnded),
        (SystemExit, HandlerEnded),
        (GeneratorExit, HandlerEnded),
    ],
)
async def test_exception_of_a_handler_comes_out_before_and_after_a_wait(
    waits: bool, raised: type[BaseException], comes_as: type[Exception]
) -> None:
    async def handle(value: bytes) -> None:
        if waits:
            await asyncio.sleep(0)
        raise raised

    with pytest.raises(comes_as):
        await run(handle)


async def test_cancellation_reaches_a_waiting_handler_which_may_clean_up() -> None:
    seen: list[str] = []
    reached = asyncio.Event()

    async def handle(value: bytes) -> None:
        try:
            reached.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    task = asyncio.create_task(run(handle))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


async def test_cancellation_reaches_a_handler_that_only_yields() -> None:
    """There is nothing there that was cancelled itself: it must be thrown."""
    seen: list[str] = []

    async def handle(value: bytes) -> None:
        asyncio.get_running_loop().call_soon(task.cancel)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    task = asyncio.create_task(run(handle))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]


async def test_handler_may_catch_an_exception_of_what_it_waits_for() -> None:
    seen: list[str] = []

    async def handle(value: bytes) -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("late")

    await run(handle)
    assert seen == ["late"]


async def test_a_wrapper_may_return_any_awaitable() -> None:
    seen: list[str] = []

    class Waiting:
        def __await__(self) -> Generator[Any, Any, None]:
            yield from asyncio.sleep(0).__await__()
            seen.append("awaited")

    handler = handler_of(_plain)
    handler.call = lambda *_: Waiting()
    left = start_call(handler, b"", None, None)
    assert isinstance(left, Waiting) and not seen
    await finish_call(handler, left, None, [], None)
    assert seen == ["awaited"]


async def _plain(value: bytes) -> None: ...
