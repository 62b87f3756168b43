"""Whether a worker stops, and waits that end when it does."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Lifetime:
    """Set once, by `stop`; every part of a worker may ask."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask every part of the worker to end."""
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    async def stopped(self) -> None:
        """Wait for `stop`."""
        await self._stopping.wait()

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond `stop`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
