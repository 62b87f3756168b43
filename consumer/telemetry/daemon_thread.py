"""Runs calls in threads that hold up no exit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


async def in_thread(call: Callable[[], object], seconds: float) -> None:
    """Run a call in a thread; leave it if it takes longer.

    What it raises is lost. Not asyncio's own threads: the process would wait for them at its end.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            with suppress(Exception):
                call()
        finally:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="telemetry", daemon=True).start()
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), seconds)
