"""A worker inside another program, for as long as a block runs.

`App.worker` returns it. Limitations: those that `App.worker` lists.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from consumer.admin.readiness import check_ready
from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.worker_health import State, WorkerHealth
from consumer.logs import describe, event
from consumer.settings import Settings, load
from consumer.worker.worker import Worker

_END_SECONDS = 5.0  # beyond the grace


class RunningWorker:
    """A worker in a task of its own, and how it is."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._worker = Worker(app, settings, report=self._note)
        self._is_member = False
        self._error: BaseException | None = None
        self._task = asyncio.create_task(self._run())

    def _note(self, fields: dict[str, Any]) -> None:
        """Note what the worker reports about itself."""
        self._is_member = self._is_member or bool(fields.get("member"))

    async def _run(self) -> None:
        try:
            await self._worker.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = error
            event(logging.ERROR, "embedded worker failed", error=describe(error), do="restart the process")

    @property
    def health(self) -> WorkerHealth:
        """How the worker is now; asks no service."""
        error = describe(self._error) if self._error is not None else None
        return WorkerHealth(self._state(), self._worker.batches, self._worker.waits, error)

    def _state(self) -> State:
        if self._error is not None:
            return "failed"
        if self._task.done():
            return "stopped"
        if self._worker.stops:
            return "stopping"
        return "consuming" if self._is_member else "starting"

    async def stop(self, seconds: float) -> None:
        """Drain and end the worker; cancel it after so many seconds."""
        self._worker.stop()
        _, left = await asyncio.wait([self._task], timeout=seconds)
        if left:
            event(logging.ERROR, "embedded worker failed", error="it does not end", do="restart the process")
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_END_SECONDS)


@asynccontextmanager
async def embedded(app: App, settings: Settings | None) -> AsyncIterator[RunningWorker]:
    """Run a worker for as long as the block runs; see `App.worker`."""
    settings = load() if settings is None else settings
    if not isinstance(settings, Settings):
        raise Misconfigured(
            f"app.worker(): a {type(settings).__name__}; give Settings(…), or nothing to read the environment"
        )
    await check_ready(app, "APP", settings)
    worker = RunningWorker(app, settings)
    try:
        yield worker
    finally:
        await worker.stop(settings.grace_seconds + _END_SECONDS)
