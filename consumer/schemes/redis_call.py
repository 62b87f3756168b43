"""One question to Redis, within a budget. Whatever the library raises becomes `RedisAway`.

Knows redis-py's exceptions; knows no command. What it does not know when it raises: whether Redis did what it was told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import RedisError

from consumer.core.errors import RunAgain

T = TypeVar("T")


class RedisAway(RunAgain):
    """Redis did not answer in time, or cannot do it now (full, read-only, loading). It may have done it all the same."""


async def answer(question: Awaitable[T], budget_seconds: float) -> T:
    """What Redis answers. budget_seconds: for all of it, the library's own retries included. Raises RedisAway."""
    told_before = _told_to_end()
    try:
        async with asyncio.timeout(budget_seconds):
            found = await question
    except (RedisError, OSError, TimeoutError) as error:
        _go_on(told_before)
        raise RedisAway(f"Redis did not answer as it should: {type(error).__name__}") from error
    _go_on(told_before)
    return found


def text(found: object) -> str:
    """An answer as text, whether or not the client decodes."""
    return found.decode("utf-8") if isinstance(found, bytes) else str(found)


def _told_to_end() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _go_on(told_before: int) -> None:
    """Raise CancelledError when this task was told to end meanwhile: the library was seen to swallow that (redis 8.1)."""
    if _told_to_end() > told_before:
        raise asyncio.CancelledError
