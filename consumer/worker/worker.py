"""One worker process: assembles the parts, runs them, and drains.

What goes through: fetcher.py hands records to the lanes, lane.py settles them, offset_commits.py copies positions to
Kafka. Beside it: assignment.py, log_monitor.py, health.py and upkeep.py. A worker waits for any service that is away,
for as long as it takes. Limitations: does not know whether it still owns its partitions; the claims and the positions
in PostgreSQL do.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

from consumer.app import App
from consumer.core.evidence import Evidence
from consumer.core.ordering import Scheduler
from consumer.core.shard_route import Router
from consumer.dead_letters.publisher import publish_loop
from consumer.kafka.consumer import KafkaConsumer
from consumer.logs import event
from consumer.retention.task import Keeper, Timestamps
from consumer.settings import Settings
from consumer.sharding import shards as shard_registry
from consumer.transaction.dead_letter_rate import DeadLetterRateLimit
from consumer.transaction.limits import CallTracker, limits
from consumer.transaction.result import LedgerIds
from consumer.worker.assignment import Assignment, Report
from consumer.worker.batch_results import BatchResults
from consumer.worker.conflict_turns import Turns, turn_of
from consumer.worker.connections import BACKOFF_SECONDS, Connections
from consumer.worker.fetcher import Fetcher
from consumer.worker.group_check import GroupCheck
from consumer.worker.halts import Halts
from consumer.worker.health import HealthMonitor
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.lane import LaneRunner, LaneServices
from consumer.worker.lifetime import Lifetime
from consumer.worker.log_monitor import LogMonitor
from consumer.worker.loop_monitor import LoopMonitor
from consumer.worker.message_log import MessageLog
from consumer.worker.offset_commits import OffsetCommits
from consumer.worker.partition_table import PartitionTable
from consumer.worker.partitions import Partitions
from consumer.worker.registration import register_all, start_prechecks
from consumer.worker.shard import LaneState, Shard
from consumer.worker.shard_check import ShardCheck
from consumer.worker.upkeep import Upkeep
from consumer.worker.wait_reports import Reporter

_CANCELLED_SECONDS = 3.0  # what does not end when it is cancelled is left behind


def _shards_of(app: App, settings: Settings, table: PartitionTable) -> list[Shard]:
    return [
        Shard(name, own, LedgerIds(app.name, {}, table.positions(name)))
        for name, own in shard_registry.settings_of(app, settings).items()
    ]


def _lanes_of(app: App, settings: Settings, shards: list[Shard]) -> list[LaneState]:
    # Where a lane only learns how far the log was read, a transaction for each poll would be too many.
    idle_batch_seconds = settings.kafka_commit_interval_seconds if len(shards) > 1 else 0.0
    seconds_max = limits(app.handlers.values(), settings)
    lanes: list[LaneState] = []
    for shard in shards:
        for _ in range(settings.lanes):
            scheduler = Scheduler(
                shard.by_topic,
                settings.parked_messages_max,
                settings.buffer_bytes_max // settings.lanes,
                idle_batch_interval=idle_batch_seconds,
            )
            lanes.append(LaneState(len(lanes), shard, scheduler, CallTracker(seconds_max), Turns()))
    return lanes


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
        step: Callable[[str], None] = lambda _: None,
        draw: Callable[[], float] = random.random,
        path: str = "APP",
    ) -> None:
        self._app = app
        self._settings = settings
        self._on_step = step
        self._random = draw
        self._lifetime = Lifetime()
        self._kafka = KafkaState()
        self._router = Router(tuple(app.shards) or ("",), app.route)
        self._message_log = MessageLog()
        self._evidence = Evidence()
        self.source = KafkaConsumer(settings, app.name, os.environ.get("CONSUMER_WORKER", "0"))
        table = PartitionTable(app.shards or [""])
        self.shards = _shards_of(app, settings, table)
        self.lanes = _lanes_of(app, settings, self.shards)
        self._reporters = {
            shard.name: Reporter(
                self._evidence, self._message_log, [lane for lane in self.lanes if lane.shard is shard]
            )
            for shard in self.shards
        }
        self.partitions = Partitions(table, self.source, self.shards, self.lanes, self._reporters, settings)
        self._connections = Connections(
            self.partitions, self._lifetime, self._message_log, draw, is_pooled=settings.postgres_pooler
        )
        self._shard_check = ShardCheck(app, self._router, self.shards, table, self._connections, self._lifetime)
        self._add_ways_of_partitions(report, path)
        self._add_lanes()
        self._health = HealthMonitor(
            settings,
            self.source,
            self.shards,
            self._runners,
            self.partitions,
            self._connections,
            self._kafka,
            self._lifetime,
            report,
        )

    def _add_ways_of_partitions(self, report: Report, path: str) -> None:
        """What brings records in, and takes partitions and positions in and out."""
        app, settings = self._app, self._settings
        halts = Halts(self.partitions, self.shards, path)
        self.source.on_refused = halts.refused
        self.source.on_unreadable = halts.cannot_be_read
        self.source.on_end_reached = halts.nothing_new
        self._fetcher = Fetcher(
            self.source, self.partitions, halts, self._router, self._kafka, self._lifetime, self._on_step
        )
        self._commits = OffsetCommits(
            app.name,
            self.source,
            self.shards,
            self.partitions,
            halts,
            self._connections,
            self._shard_check,
            self._on_step,
            settings.kafka_commit_interval_seconds,
        )
        group_check = GroupCheck(app.name, settings)
        self._assignment = Assignment(
            app,
            settings,
            self.source,
            self.shards,
            self.lanes,
            self.partitions,
            halts,
            self._connections,
            self._commits,
            self._reporters,
            group_check,
            self._lifetime,
            report,
            self._on_step,
            path,
        )
        self._log_monitor = LogMonitor(
            app.topics,
            self.source,
            self.lanes,
            self.partitions,
            halts,
            group_check,
            self._kafka,
            self._lifetime,
            settings.kafka_transaction_warning_seconds,
        )

    def _add_lanes(self) -> None:
        dead_letter_rate = DeadLetterRateLimit(self._settings.dead_letter_limit)
        self._results = BatchResults(
            self.partitions.table, self.source, self._router, dead_letter_rate, self._evidence, self._message_log
        )
        services = LaneServices(
            self._settings,
            self.partitions,
            self._connections,
            self._shard_check,
            self._results,
            self._reporters,
            self._message_log,
            self._evidence,
            dead_letter_rate,
            Timestamps(self._settings),
            self._lifetime,
            turn_of(self._app.name),
            self._random,
            self._on_step,
        )
        self._runners = [LaneRunner(lane, services) for lane in self.lanes]

    @property
    def outgrown(self) -> bool:
        """Whether it stopped because of the memory that it used."""
        return self._health.is_outgrown

    def stop(self) -> None:
        """Drain, copy positions to Kafka, and leave the group.

        May be called again, or before `run`.
        """
        self._lifetime.stop()
        self.partitions.wake()

    async def run(self) -> None:
        """Work until `stop` is called.

        Raises Misconfigured, Stalled, HandlerUncancellable, or whatever ended a part of the worker. After
        HandlerUncancellable, a handler's task still runs: nothing but the end of the process ends it.
        """
        async with self._app.running():
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
        while not await register_all(self._app, self._router, self.shards, self._connections):
            if self._lifetime.is_stopping:
                return False
            await self._lifetime.pause(BACKOFF_SECONDS[0])
        await start_prechecks(self._app, self._settings, self.shards, self._on_step)
        starting = asyncio.create_task(self.source.start(float("inf")))
        stopping = asyncio.create_task(self._lifetime.stopped())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return False
        starting.result()
        self.source.subscribe(self._app.topics, self._assignment.on_revoked, self._assignment.on_assigned)
        event(
            logging.INFO,
            "worker started",
            app=self._app.name,
            topics=",".join(self._app.topics),
            lanes=len(self.lanes),
        )
        return True

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        """Return the worker's loops; each runs until cancelled or failed."""
        app, settings, health = self._app, self._settings, self._health
        parts = [self._fetcher.run(), self._commits.run(), self._log_monitor.run()]
        parts += [health.watch_progress(), health.send_heartbeats(), health.enforce_limits()]
        for shard in self.shards:
            reporter = self._reporters[shard.name]
            upkeep = Upkeep(app, shard, self.partitions.table, reporter, self._connections, self._message_log)
            parts += [upkeep.run(), self._assignment.position_partitions(shard)]
            parts.append(Keeper(shard.settings, app.name, self.source, self._random).run())
            if (topic := settings.dead_letter_topic) is not None:
                open_session = functools.partial(self._connections.open, shard)
                parts.append(
                    publish_loop(app.name, topic, shard.settings, open_session, self._results.dead_letters_added)
                )
        return parts + [runner.run() for runner in self._runners]

    async def _work(self) -> None:
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(part) for part in self._parts()]
        stopping = asyncio.create_task(self._lifetime.stopped())
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # a part that ended on its own has failed: raise why
            await self._assignment.drain(self._settings.grace_seconds * 0.8)
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            # Not gather: a handler that swallows its cancellation would keep the worker for ever.
            ended, _ = await asyncio.wait([stopping, *tasks], timeout=_CANCELLED_SECONDS)
            await asyncio.gather(*ended, return_exceptions=True)

    async def _end(self) -> None:
        await self.source.stop(5)
        for session in [*(shard.control for shard in self.shards), *(lane.session for lane in self.lanes)]:
            if session is not None:
                session.close()
        for shard in self.shards:
            if shard.precheck is not None:
                await shard.precheck.stop()
        self._message_log.flush(is_last=True)
        event(logging.INFO, "worker stopped", batches=self._health.batches)
