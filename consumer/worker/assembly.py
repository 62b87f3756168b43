"""Builds the parts of one worker and connects them.

Nothing runs here: worker.py starts and ends the parts. Limitations: connects to no service.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any

from consumer.app import App
from consumer.core.evidence import Evidence
from consumer.core.handler import Handler
from consumer.core.ordering import Scheduler
from consumer.core.shard_route import Router
from consumer.kafka.consumer import KafkaConsumer
from consumer.metrics.recorder import Recorder
from consumer.retention.task import Keeper, Timestamps
from consumer.settings import Settings
from consumer.sharding import shards as shard_registry
from consumer.transaction.dead_letter_rate import DeadLetterRateLimit
from consumer.transaction.limits import CallTracker, limits
from consumer.transaction.result import LedgerIds
from consumer.worker.assignment import Assignment, Report
from consumer.worker.batch_results import BatchResults
from consumer.worker.conflict_turns import Turns, turn_of
from consumer.worker.connections import Connections
from consumer.worker.fetcher import Fetcher
from consumer.worker.group_check import GroupCheck
from consumer.worker.halts import Halts
from consumer.worker.health import HealthMonitor
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.lane import LaneRunner, LaneServices
from consumer.worker.lifetime import Lifetime
from consumer.worker.log_monitor import LogMonitor
from consumer.worker.message_log import MessageLog
from consumer.worker.metrics_report import MetricsReport
from consumer.worker.offset_commits import OffsetCommits
from consumer.worker.outbox_intake import OutboxIntake
from consumer.worker.outbox_relay import OutboxRelay
from consumer.worker.partition_table import PartitionTable
from consumer.worker.partitions import Partitions
from consumer.worker.shard import LaneState, Shard
from consumer.worker.shard_check import ShardCheck
from consumer.worker.subscription import Subscription
from consumer.worker.telemetry import counts_metrics
from consumer.worker.upkeep import Upkeep
from consumer.worker.wait_reports import Reporter
from consumer.worker.worker_gauges import WorkerState


def _shards_of(app: App, settings: Settings, table: PartitionTable) -> list[Shard]:
    settings_by_name = shard_registry.settings_of(app, settings)
    # With several shards a poll may hold nothing for a shard but the end offset: not worth a transaction each time.
    idle_batch_seconds = settings.kafka_commit_interval_seconds if len(settings_by_name) > 1 else 0.0
    shards: list[Shard] = []
    for name, own in settings_by_name.items():
        by_topic: dict[str, list[Handler]] = {}
        scheduler = Scheduler(
            by_topic, settings.parked_messages_max, settings.buffer_bytes_max, idle_batch_interval=idle_batch_seconds
        )
        ids = LedgerIds(app.name, {}, table.positions(name))
        shards.append(Shard(name, own, ids, scheduler, app.connection_init, by_topic))
    return shards


def _add_lanes(app: App, settings: Settings, shards: list[Shard], recorder: Recorder | None) -> None:
    seconds_max = limits(app.handlers.values(), settings)
    for shard in shards:
        shard.lanes += [
            LaneState(number, shard, CallTracker(seconds_max, recorder), Turns())
            for number in range(settings.lanes_max)
        ]
        shard.starts.connect(shard.lanes)


class Parts:
    """The parts of one worker; the arguments are those of `Worker`."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        report: Report,
        on_step: Callable[[str], None],
        random: Callable[[], float],
        path: str,
    ) -> None:
        self._app = app
        self._settings = settings
        self._on_step = on_step
        self._random = random
        self.lifetime = Lifetime()
        self.router = Router(tuple(app.shards) or ("",), app.route)
        self.message_log = MessageLog()
        self._kafka = KafkaState()
        self._evidence = Evidence()
        self.source = KafkaConsumer(settings, app.name, os.environ.get("CONSUMER_WORKER", "0"))
        table = PartitionTable(app.shards or [""])
        self.shards = _shards_of(app, settings, table)
        self.subscription = Subscription(app, self.shards, self._begin_metrics)
        self.recorder = Recorder() if counts_metrics(settings) else None
        _add_lanes(app, settings, self.shards, self.recorder)
        self.lanes = [lane for shard in self.shards for lane in shard.lanes]
        self._reporters = {
            shard.name: Reporter(self._evidence, self.message_log, shard.scheduler) for shard in self.shards
        }
        self.partitions = Partitions(table, self.source, self.shards, self._reporters, settings)
        self.connections = Connections(
            self.partitions, self.lifetime, self.message_log, random, is_pooled=settings.postgres_pooler
        )
        self.relays = self._outbox_relays()
        self._shard_check = ShardCheck(app, self.router, self.shards, table, self.connections, self.lifetime)
        self._add_record_flow(report, path)
        self.metrics_report = self._metrics_report(report)
        self._add_lane_runners()
        self.health = HealthMonitor(
            settings,
            self.source,
            self.shards,
            self._runners,
            self.partitions,
            self.connections,
            self._kafka,
            self.lifetime,
            report,
        )

    def _metrics_report(self, report: Report) -> MetricsReport | None:
        if self.recorder is None:
            return None
        worker = WorkerState(self.source, self.shards, self.partitions, self.connections, self._kafka, self.relays)
        return MetricsReport(self.recorder, self._app.handlers.values(), worker, report)

    def _begin_metrics(self) -> None:
        if self.metrics_report is not None:
            self.metrics_report.batches.begin()

    @property
    def _publishes(self) -> bool:
        return bool(self._app.publishes) or self._settings.dead_letter_topic is not None

    def _outbox_relays(self) -> dict[str, OutboxRelay]:
        """Return the relay of each database; none where nothing is published."""
        app, settings = self._app, self._settings
        if not self._publishes or settings.outbox_relay == "off":
            return {}
        return {
            shard.name: OutboxRelay(
                app.name,
                self.subscription.home,
                settings,
                shard,
                self.partitions.table,
                self.connections,
                self.lifetime,
                app.publishes,
                self._on_step,
            )
            for shard in self.shards
        }

    def _outbox_intake(self, shard: Shard) -> OutboxIntake:
        relay = self.relays.get(shard.name)
        return OutboxIntake(
            self._app.name,
            self.subscription.home,
            shard,
            self.partitions.table,
            self.connections,
            self.lifetime,
            relay.committed if relay is not None else lambda epoch, stored: None,
            self._settings.dead_letter_topic,
        )

    def _add_record_flow(self, report: Report, path: str) -> None:
        """Create what fetches records, and what opens, watches and gives up partitions."""
        app, settings = self._app, self._settings
        halts = Halts(self.partitions, self.shards, path)
        self.source.on_refused = halts.refused
        self.source.on_unreadable = halts.cannot_be_read
        self.source.on_end_reached = halts.nothing_new
        self._fetcher = Fetcher(
            self.source, self.shards, self.partitions, halts, self.router, self._kafka, self.lifetime, self._on_step
        )
        self._commits = OffsetCommits(
            app.name,
            self.source,
            self.shards,
            self.partitions,
            halts,
            self.connections,
            self._shard_check,
            self._on_step,
            settings.kafka_commit_interval_seconds,
        )
        group_check = GroupCheck(app.name, settings)
        self.assignment = Assignment(
            app,
            settings,
            self.source,
            self.shards,
            self.lanes,
            self.subscription,
            self.partitions,
            halts,
            self.connections,
            self._commits,
            self._reporters,
            group_check,
            self.lifetime,
            report,
            self._on_step,
            path,
            list(self.relays.values()),
        )
        self._log_monitor = LogMonitor(
            self.subscription,
            self.source,
            self.shards,
            self.partitions,
            halts,
            group_check,
            self._kafka,
            self.lifetime,
            settings.kafka_transaction_warning_seconds,
        )

    def _add_lane_runners(self) -> None:
        dead_letter_rate = DeadLetterRateLimit(self._settings.dead_letter_limit)
        self._results = BatchResults(
            self.partitions.table,
            self.source,
            self.router,
            dead_letter_rate,
            self._evidence,
            self.message_log,
            self.relays,
            None if self.metrics_report is None else self.metrics_report.batches,
        )
        services = LaneServices(
            self._settings,
            self.partitions,
            self.connections,
            self._shard_check,
            self._results,
            self._reporters,
            self.message_log,
            self._evidence,
            dead_letter_rate,
            Timestamps(self._settings),
            self.lifetime,
            turn_of(self._app.name),
            self._random,
            self._on_step,
            any(handler.effect is not None for handler in self._app.handlers.values()),
            any(handler.schema_needed is not None for handler in self._app.handlers.values()),
        )
        self._runners = [LaneRunner(lane, services) for lane in self.lanes]

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return the worker's loops; each runs until cancelled or failed."""
        app, health = self._app, self.health
        loops = [self._fetcher.run(), self._commits.run(), self._log_monitor.run()]
        if self.metrics_report is not None:
            loops.append(self.metrics_report.run())
        loops += [health.watch_progress(), health.send_heartbeats(), health.enforce_limits()]
        for shard in self.shards:
            reporter = self._reporters[shard.name]
            upkeep = Upkeep(app, shard, self.partitions, reporter, self.connections, self.message_log)
            loops += [upkeep.run(), self.assignment.position_partitions(shard)]
            loops.append(Keeper(shard.settings, app.name, self.source, self._random).run())
            if self._publishes:
                loops.append(self._outbox_intake(shard).run())
        loops += [relay.run() for relay in self.relays.values()]
        return loops + [runner.run() for runner in self._runners]
