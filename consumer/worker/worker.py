"""One worker process: starts the parts, runs them, and drains.

Records go through fetcher.py to the lanes, lane.py settles them, and offset_commits.py copies positions to Kafka. Beside
them are assignment.py, log_monitor.py, health.py and upkeep.py; assembly.py connects all of them. A worker waits for any
service that is away, for as long as it takes. Limitations: does not know whether it still owns its partitions; the
claims and the positions in PostgreSQL do.
"""

from __future__ import annotations

import asyncio
import logging
import random as random_numbers
from collections.abc import Callable

from consumer.app import App
from consumer.logs import event
from consumer.settings import Settings
from consumer.worker.assembly import Parts
from consumer.worker.assignment import Report
from consumer.worker.connections import BACKOFF_SECONDS
from consumer.worker.loop_monitor import LoopMonitor
from consumer.worker.outbox_topics import check_topics
from consumer.worker.registration import register_all, start_prechecks
from consumer.worker.telemetry import tracing

_CANCELLED_SECONDS = 3.0  # a task that ignores its cancellation for so long is left behind


class Worker:
    """A member of the App's consumer group.

    `run` returns when `stop` was called and everything in flight is settled. report: called with small dictionaries
    about the worker's health, for its supervisor. on_step: called with the name of each step of the flow as it is
    passed, for tests that end the process there. path: how commands name the App.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        report: Report = lambda _: None,
        on_step: Callable[[str], None] = lambda _: None,
        random: Callable[[], float] = random_numbers.random,
        path: str = "APP",
    ) -> None:
        self._app = app
        self._settings = settings
        self._on_step = on_step
        self._parts = Parts(app, settings, report, on_step, random, path)
        self.source = self._parts.source
        self.shards = self._parts.shards
        self.lanes = self._parts.lanes
        self.partitions = self._parts.partitions

    @property
    def outgrown(self) -> bool:
        """Whether it stopped because of the memory that it used."""
        return self._parts.health.is_outgrown

    @property
    def batches(self) -> int:
        """How many transactions it has settled."""
        return self._parts.health.batches

    @property
    def waits(self) -> bool:
        """Whether some part of it waits for PostgreSQL."""
        return self._parts.connections.waiting > 0

    @property
    def stops(self) -> bool:
        """Whether it drains, or has ended."""
        return self._parts.lifetime.is_stopping

    def stop(self) -> None:
        """Drain, copy positions to Kafka, and leave the group.

        May be called again, or before `run`.
        """
        self._parts.lifetime.stop()
        self.partitions.wake()

    async def run(self) -> None:
        """Work until `stop` is called.

        Raises Misconfigured, Stalled, HandlerUncancellable, or whatever ended a part of the worker. After
        HandlerUncancellable, a handler's task still runs: nothing but the end of the process ends it.
        """
        await self._app.open_registry(self._settings)
        async with self._app.running(), tracing(self._app, self._settings, self._parts.relays.values()):
            watch = LoopMonitor(lane.calls for lane in self.lanes)
            watch.start()
            try:
                if await self._start():
                    await self._work()
            finally:
                await self._end()
                watch.stop()

    async def _start(self) -> bool:
        """Connect to every service; False if `stop` was called."""
        parts, lifetime = self._parts, self._parts.lifetime
        while not await register_all(self._app, parts.router, self.shards, parts.connections):
            if lifetime.is_stopping:
                return False
            await lifetime.pause(BACKOFF_SECONDS[0])
        await start_prechecks(self._app, self._settings, self.shards, self._on_step, parts.recorder)
        starting = asyncio.create_task(self.source.start(float("inf")))
        stopping = asyncio.create_task(lifetime.stopped())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return False
        starting.result()
        if parts.relays:
            await check_topics(self._app, self._settings, lifetime, self.source.log)
        subscription = parts.subscription
        self.source.subscribe(
            self._app.topics,
            parts.assignment.on_revoked,
            parts.assignment.on_assigned,
            subscription.takes if subscription.has_patterns else None,
        )
        event(
            logging.INFO,
            "worker started",
            app=self._app.name,
            topics=",".join(self._app.topics),
            lanes_max=len(self.lanes),
        )
        return True

    async def _work(self) -> None:
        """Run every loop until one fails or `stop` is called; then drain."""
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(loop) for loop in self._parts.loops()]
        stopping = asyncio.create_task(self._parts.lifetime.stopped())
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # a loop that ended on its own has failed: raise why
            await self._parts.assignment.drain(self._settings.grace_seconds * 0.8)
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            # Not gather: a handler that swallows its cancellation would block the worker for ever.
            ended, _ = await asyncio.wait([stopping, *tasks], timeout=_CANCELLED_SECONDS)
            await asyncio.gather(*ended, return_exceptions=True)

    async def _end(self) -> None:
        """Leave the group and close every connection."""
        await self.source.stop(5)
        for session in [*(shard.control for shard in self.shards), *(lane.session for lane in self.lanes)]:
            if session is not None:
                session.close()
        for shard in self.shards:
            if shard.precheck is not None:
                await shard.precheck.stop()
        self._parts.message_log.flush(is_last=True)
        if self._parts.metrics_report is not None:
            self._parts.metrics_report.last()
        event(logging.INFO, "worker stopped", batches=self._parts.health.batches)
