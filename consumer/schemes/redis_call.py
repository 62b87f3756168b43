"""Runs one Redis command within a time budget.

Whatever the library raises becomes `RedisAway`. Knows redis-py's exceptions; knows no command. Limitations: when it
raises, the command may or may not have been executed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import RedisError

from consumer.core.errors import RunAgain

T = TypeVar("T")


class RedisAway(RunAgain):
    """Redis did not answer in time, or refuses (full, read-only, loading).

    It may have executed the command all the same.
    """


async def answer(question: Awaitable[T], budget_seconds: float) -> T:
    """Return what Redis answers.

    budget_seconds: for all of it, the library's own retries included. Raises RedisAway.
    """
    cancelled_before = _cancellations()
    try:
        async with asyncio.timeout(budget_seconds):
            value = await question
    except (RedisError, OSError, TimeoutError) as error:
        _go_on(cancelled_before)
        raise RedisAway(f"Redis did not answer as it should: {type(error).__name__}") from error
    _go_on(cancelled_before)
    return value


def text(value: object) -> str:
    """An answer as text, whether or not the client decodes."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _go_on(cancelled_before: int) -> None:
    """Raise CancelledError if this task was cancelled meanwhile.

    The library was seen to swallow the cancellation (redis 8.1).
    """
    if _cancellations() > cancelled_before:
        raise asyncio.CancelledError
