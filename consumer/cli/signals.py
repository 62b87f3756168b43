"""Cancel a running command on SIGINT and SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from consumer.core.errors import ConsumerError


class Interrupted(ConsumerError):
    """A signal ended the command early; the text gives the progress."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.code = 128 + number


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM after the block."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


async def until_signal(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a command that SIGINT and SIGTERM cancel.

    Raises Interrupted in place of what the cancelled command raises. A command that handles signals itself replaces these
    handlers.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await coroutine
    except (Interrupted, typer.Exit):
        raise
    except (asyncio.CancelledError, Exception) as error:
        if not received:
            raise
        word = "interrupted" if received[0] == signal.SIGINT else "terminated"
        text = str(error) if isinstance(error, ConsumerError) else ""
        raise Interrupted(
            text if text.startswith(("interrupted", "terminated")) else f"{word}{f': {text}' if text else ''}",
            received[0],
        ) from None
