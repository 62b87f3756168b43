"""Reads the gauges of one worker: lag, what waits and what stopped.

Reads the worker's memory; asks no service.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from consumer.core.delivery import Delivery
from consumer.core.message import Partition, Record
from consumer.core.retention import is_time
from consumer.kafka.consumer import KafkaConsumer
from consumer.metrics.catalog import (
    LAG_MESSAGES,
    LAG_SECONDS,
    PARTITION_STOPPED,
    PAUSED,
    SERVICE_WAITING,
    WAITING,
)
from consumer.metrics.recorder import Gauge
from consumer.worker.connections import Connections
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.outbox_relay import OutboxRelay
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard


@dataclass(slots=True)
class WorkerState:
    """The parts of a worker that have something to measure.

    ends: of the logs of partitions that are not fetched, as Kafka
    answered last.
    """

    source: KafkaConsumer
    shards: Sequence[Shard]
    partitions: Partitions
    connections: Connections
    kafka: KafkaState
    relays: Mapping[str, OutboxRelay]
    ends: dict[Partition, int] = field(default_factory=dict)
    _behind_since: dict[Partition, float] = field(default_factory=dict)

    def gauges(self) -> list[Gauge]:
        """Return all gauges as of now."""
        return [*self._services(), *self._lags(), *self._stops(), *self._waiting(), *self._paused()]

    def _services(self) -> Iterator[Gauge]:
        is_off = any(shard.precheck is not None and shard.precheck.is_off for shard in self.shards)
        yield SERVICE_WAITING, ("kafka",), float(self.kafka.is_unavailable)
        yield SERVICE_WAITING, ("postgresql",), float(self.connections.waiting > 0)
        yield SERVICE_WAITING, ("redis",), float(is_off)

    def _lags(self) -> Iterator[Gauge]:
        oldest = self._oldest_records()
        lags = dict(self._lag_messages())
        now, wall_ms = time.monotonic(), time.time() * 1000
        self._behind_since = {
            partition: self._behind_since.get(partition, now) for partition, lag in lags.items() if lag
        }
        for partition, lag in lags.items():
            labels = (partition.topic, str(partition.partition))
            yield LAG_MESSAGES, labels, float(lag)
            record = oldest.get(partition)
            if not lag:
                yield LAG_SECONDS, labels, 0.0
            elif record is not None and is_time(record.timestamp):
                yield LAG_SECONDS, labels, max(0.0, (wall_ms - record.timestamp) / 1000)
            else:
                yield LAG_SECONDS, labels, now - self._behind_since[partition]

    def _lag_messages(self) -> Iterator[tuple[Partition, int]]:
        positions: dict[Partition, int] = {}
        for shard in self.shards:
            for partition in shard.scheduler.partitions:
                position = shard.scheduler.position(partition)
                positions[partition] = min(position, positions.get(partition, position))
        for partition, position in positions.items():
            seen, asked = self.source.end_seen(partition), self.ends.get(partition)
            if seen is not None or asked is not None:
                yield partition, max(0, max(seen or 0, asked or 0) - position)

    def _oldest_records(self) -> dict[Partition, Record]:
        """Return the first unsettled record of each partition, as far as read."""
        oldest: dict[Partition, Record] = {}
        for shard in self.shards:
            in_flight = (
                record
                for lane in shard.lanes
                if lane.part is not None and not lane.idle.is_set()
                for record in _firsts(lane.part.deliveries)
            )
            for record in (*shard.scheduler.oldest().values(), *in_flight):
                partition = Partition(record.topic, record.partition)
                if partition not in oldest or record.offset < oldest[partition].offset:
                    oldest[partition] = record
        return oldest

    def _stops(self) -> Iterator[Gauge]:
        table = self.partitions.table
        for shard in self.shards:
            for partition, halt in table.halts(shard.name).items():
                labels = (partition.topic, str(partition.partition), halt.stop.reason.value)
                yield PARTITION_STOPPED, labels, 1.0

    def _waiting(self) -> Iterator[Gauge]:
        counts: Counter[tuple[str, str, str]] = Counter()
        for shard in self.shards:
            for head, count, _ in shard.scheduler.waiting():
                cause = head.failure_cause
                reason = "systemic" if cause is not None and cause.systemic else "retry"
                counts[head.handler.name, head.record.topic, reason] += 1
                counts[head.handler.name, head.record.topic, "behind"] += count - 1
        for labels, count in counts.items():
            yield WAITING, labels, float(count)

    def _paused(self) -> Iterator[Gauge]:
        """Yield how many partitions of each topic are paused."""
        counts = Counter(partition.topic for partition in self.partitions.paused)
        for topic in sorted({topic for shard in self.shards for topic in shard.by_topic}):
            yield PAUSED, (topic,), float(counts[topic])


def _firsts(deliveries: Sequence[Delivery]) -> Iterator[Record]:
    """Yield the first record of each run of one partition.

    fast path: a batch has a run of each partition, in offset order.
    """
    topic, partition = "", -1
    for delivery in deliveries:
        record = delivery.record
        if record.partition != partition or record.topic != topic:
            topic, partition = record.topic, record.partition
            yield record
