"""Positions, lag and health of the partitions of an App. Reads only.

Positions come from PostgreSQL, the ends of the log from Kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from consumer.app import App
from consumer.core.log_identity import (
    CommittedOffset,
    HaltReason,
    ObservedLog,
    PartitionHalt,
    Position,
    check_log,
    decide_start,
)
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.kafka.log_inspection import LogInspection, OpenTransaction
from consumer.kafka.protocol import Identity
from consumer.postgres import positions, waiting_messages
from consumer.postgres.positions import read_positions
from consumer.postgres.protocol import Connection
from consumer.postgres.server import installed_at
from consumer.postgres.stopped_partitions import read as read_stops
from consumer.postgres.stopped_partitions import refused_stop


async def partition_lags(
    connection: Connection, source: KafkaConsumer, app: App
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return positions and lags by partition, and missing topics.

    `lag` counts the offsets from the position to the end of the log. `waiting` messages hold the position back, so
    `lag` includes everything behind them; `unread` counts only what lies beyond what the worker has read. A partition
    without a position counts from the beginning of the log. `end` is the last stable offset: an open transaction of a
    producer holds it back. `end`, `lag` and `unread` are None if no leader answers. Raises KafkaError.
    """
    offsets = await positions.next_offsets(connection, app.name)
    if app.has_patterns:  # also deleted topics that the App has consumed
        app.discover([*await source.log.topics(), *(partition.topic for partition in offsets)])
    by_topic = await source.log.partitions(app.topics)
    partitions = [partition for of_topic in by_topic.values() for partition in of_topic]
    _, waits = await waiting_messages.read(connection, app.name)
    ends = await source.log.ends(partitions, partial=True) if partitions else {}
    absent = [topic for topic, of_topic in by_topic.items() if not of_topic]
    refused = (await source.log.identity(absent)).refused if absent else frozenset()
    unknown = [partition for partition in partitions if partition not in offsets]
    for topic in sorted(refused):  # Kafka does not list their partitions; every topic has a partition 0
        partitions += sorted(partition for partition in offsets if partition.topic == topic) or [Partition(topic, 0)]
    beginnings = await source.log.beginnings(unknown, partial=True) if unknown else {}
    lags = []
    for partition in partitions:
        position, end = offsets.get(partition), ends.get(partition)
        settled = position if position is not None else beginnings.get(partition)
        count, read_up_to = waits.get(partition, (0, 0))
        lags.append(
            {
                "topic": partition.topic,
                "partition": partition.partition,
                "position": position,
                "end": end,
                "lag": max(0, end - settled) if end is not None and settled is not None else None,
                "waiting": count,
                "unread": max(0, end - max(settled, read_up_to)) if end is not None and settled is not None else None,
            }
        )
    return lags, [topic for topic in absent if topic not in refused]


class PartitionHealth(NamedTuple):
    """What prevents a partition from being settled.

    An operator must act on a stop, a producer must end its transaction.
    """

    topic_id: UUID | None
    stop: PartitionHalt | None
    open_transaction: OpenTransaction | None


async def partition_health(
    connection: Connection,
    source: KafkaConsumer,
    app: App,
    partitions: Sequence[Partition],
    commits: Mapping[Partition, CommittedOffset] = {},
) -> dict[Partition, PartitionHealth]:
    """Judge partitions as a worker would, whether one runs or not.

    Of a partition whose leader does not answer, only the ids are compared. If records that a running worker has read
    but not yet settled are gone from the log, they are reported as removed until they are settled. commits: of the group;
    with shards, only a worker can tell whether they belong to another database. Raises KafkaError.
    """
    own = await installed_at(connection)
    stored = _Stored(
        await read_positions(connection, app.name, partitions), await read_stops(connection, app.name), commits, own
    )
    identity = await source.log.identity(app.topics)
    readable = [partition for partition in partitions if partition.topic not in identity.refused]
    bounds = _Bounds(
        await source.log.beginnings(readable, partial=True) if readable else {},
        await source.log.ends(readable, partial=True) if readable else {},
        await source.log.ends(readable, partial=True, uncommitted=True) if readable else {},
    )
    health = await asyncio.gather(
        *(_health(source.log, app, partition, stored, identity, bounds) for partition in partitions)
    )
    return dict(zip(partitions, health, strict=True))


class _Bounds(NamedTuple):
    """Offsets of the logs.

    stable: up to the first open transaction. highs: with open transactions."""

    firsts: Mapping[Partition, int]
    stable: Mapping[Partition, int]
    highs: Mapping[Partition, int]


@dataclass(frozen=True, slots=True)
class _Stored:
    """What PostgreSQL and the group hold of the partitions."""

    positions: Mapping[Partition, Position]
    stops: Mapping[Partition, tuple[PartitionHalt, int]]
    commits: Mapping[Partition, CommittedOffset]
    installed_at: str

    def stop_of(self, partition: Partition) -> PartitionHalt | None:
        """Return why a worker could not read a partition.

        None if its position has moved since."""
        stop, first = self.stops.get(partition, (None, 0))
        at = self.positions.get(partition)
        return stop if at is None or at.offset <= first else None


async def _health(
    inspection: LogInspection, app: App, partition: Partition, stored: _Stored, identity: Identity, bounds: _Bounds
) -> PartitionHealth:
    """Judge one partition; ask its leader only what is still open."""
    at, end = stored.positions.get(partition), bounds.highs.get(partition)
    unreadable = stored.stop_of(partition)
    if partition.topic in identity.refused:
        return PartitionHealth(None, unreadable or refused_stop(partition, at.offset if at else 0), None)
    first = bounds.firsts.get(partition)
    log = ObservedLog(identity.cluster_id, identity.topics.get(partition.topic), first, end)
    log = log._replace(out_of_range=at is not None and end is not None and at.offset > end)
    stop = check_log(partition, at, log) if at is not None else None
    if at is None and not app.shards:
        start = decide_start(partition, stored.commits.get(partition), first or 0, stored.installed_at)
        stop = start if isinstance(start, PartitionHalt) else None
    if end is None:  # no leader at the moment
        return PartitionHealth(log.topic_id, stop or unreadable, None)
    transaction = None
    try:
        if at is not None and at.seen is not None and stop is None:
            log = log._replace(at_seen=await inspection.fingerprint_at(partition, at.seen.offset))
            stop = check_log(partition, at, log)
        if bounds.stable.get(partition, end) < end:
            transaction = await inspection.open_transaction(partition)
    except (KafkaError, TimeoutError):
        pass  # no leader at the moment; `end` and `lag` say nothing about it either
    if stop is None or stop.reason is HaltReason.OTHER_RECORD:  # damage can look like another record
        stop = unreadable or stop
    return PartitionHealth(log.topic_id, stop, transaction)
