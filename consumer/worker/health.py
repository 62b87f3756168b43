"""Ends handlers, connections and clients that hang; sends heartbeats.

Limitations: a handler that swallows its cancellation ends only with the process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from consumer.core.errors import ConsumerError
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.logs import event
from consumer.settings import Settings
from consumer.transaction.limits import HandlerUncancellable
from consumer.worker.connections import Connections
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.lane import LaneRunner
from consumer.worker.lifetime import Lifetime
from consumer.worker.loop_monitor import memory_mb
from consumer.worker.partition_table import State
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard
from consumer.worker.watchdog import Watchdog

_LIMITS_SECONDS = 0.1  # between two checks of the handlers' limits
_BEAT_SECONDS = 1.0
_LOOP_LAG_SECONDS = 2.0


class Stalled(ConsumerError):
    """Alive but not consuming: the process ends, and its supervisor starts another."""


class HealthMonitor:
    """The loops that watch one worker.

    is_outgrown: the worker was stopped because of the memory that it used.
    """

    def __init__(
        self,
        settings: Settings,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        runners: Sequence[LaneRunner],
        partitions: Partitions,
        connections: Connections,
        kafka: KafkaState,
        lifetime: Lifetime,
        report: Callable[[dict[str, Any]], object],
    ) -> None:
        self.is_outgrown = False
        self._settings = settings
        self._source = source
        self._shards = shards
        self._runners = runners
        self._partitions = partitions
        self._table = partitions.table
        self._connections = connections
        self._kafka = kafka
        self._lifetime = lifetime
        self._report = report

    async def enforce_limits(self) -> None:
        """End handlers that take too long, and connections that do not answer.

        A connection is ended, its statement never cancelled: if it was a COMMIT without an answer, PostgreSQL decides
        its outcome, and the claims of the next run wait until it has. Raises HandlerUncancellable.
        """
        silence = self._settings.postgres_answer_timeout_seconds
        control_free_at = {shard.name: time.monotonic() for shard in self._shards}
        while True:
            await asyncio.sleep(_LIMITS_SECONDS)
            now = time.monotonic()
            for shard in self._shards:
                if not shard.control_lock.locked():
                    control_free_at[shard.name] = now
                elif now - control_free_at[shard.name] > silence and shard.control is not None:
                    control_free_at[shard.name] = now
                    shard.control.close()
            for runner in self._runners:
                await self._enforce_limits_of(runner, now, silence)

    async def _enforce_limits_of(self, runner: LaneRunner, now: float, silence: float) -> None:
        lane = runner.lane
        try:
            lane.calls.enforce_limits(now)
        except HandlerUncancellable as stuck:
            await runner.record_stuck_attempt(stuck)
            raise
        if lane.calls.waiting_seconds(now) > silence and lane.session is not None:
            event(
                logging.WARNING,
                "postgresql does not answer: the connection is ended",
                seconds=round(silence),
                **lane.shard.label,
            )
            lane.calls.step()
            lane.session.close()

    async def watch_progress(self) -> None:
        """End the worker when records exist but none are fetched.

        The client does not report this state. Raises Stalled.
        """
        patience = self._settings.watchdog_seconds
        watchdog = Watchdog()
        while True:
            await asyncio.sleep(min(10.0, patience / 4))
            received = self._offsets_read() if self._table.has_assignment else {}
            try:
                ends = await self._source.log.ends(list(received), partial=True) if received else {}
            except (KafkaError, TimeoutError, OSError) as error:
                self._kafka.unavailable(error)
                watchdog = Watchdog()  # an outage of Kafka is waited for
                continue
            received = {partition: offset for partition, offset in received.items() if partition in ends}
            now = time.monotonic()
            if watchdog.fetching_stalled_seconds(now, received, ends) > patience:
                raise Stalled(f"nothing was fetched for {patience:g} s although there is something")
            is_busy = any(not runner.lane.idle.is_set() for runner in self._runners) and not self._connections.waiting
            stalled = watchdog.settling_stalled_seconds(now, self.batches, has_work=is_busy)
            if stalled > patience:
                event(logging.WARNING, "a batch takes long: does a handler hang?", seconds=round(stalled))

    def _offsets_read(self) -> dict[Partition, int]:
        reading = self._table.in_state(State.READING)
        return {partition: offset for partition in reading if (offset := self._table.offset(partition)) is not None}

    @property
    def batches(self) -> int:
        """How many batches the lanes have settled."""
        return sum(runner.lane.batches for runner in self._runners)

    async def send_heartbeats(self) -> None:
        """Send heartbeats to the supervisor, and log a blocked event loop.

        A heartbeat holds the group member id.
        """
        while True:
            before = time.monotonic()
            self._check_memory()
            self._report({"member": self._source.member_id, "batches": self.batches})
            # Not in the group yet: report the member id as soon as there is one, or the supervisor could not remove us.
            pause = _BEAT_SECONDS if self._source.member_id else _BEAT_SECONDS / 10
            await asyncio.sleep(pause)
            lag = time.monotonic() - before - pause
            if lag > _LOOP_LAG_SECONDS:
                event(logging.WARNING, "the event loop was blocked: a handler does not await", seconds=round(lag, 1))

    def _check_memory(self) -> None:
        """Drain when the process has grown too large; its supervisor starts another."""
        most, used = self._settings.worker_memory_max_mb, memory_mb()
        if most is None or used is None or used <= most or self._lifetime.is_stopping:
            return
        event(logging.WARNING, "the worker uses too much memory: it drains and is replaced", mb=used, mb_max=most)
        self.is_outgrown = True
        self._lifetime.stop()
        self._partitions.wake()
