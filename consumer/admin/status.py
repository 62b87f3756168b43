"""The status of an App in one database.

Reads counters and positions, and no row of the ledger unless asked to. Reads only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from consumer.admin.counts import handler_counts, miscounts, open_dead_letters
from consumer.admin.ledger_access import with_ledger
from consumer.admin.outbox import summary
from consumer.admin.partitions import PartitionHealth, partition_health, partition_lags
from consumer.admin.pauses import pause_as_dict
from consumer.app import App
from consumer.core.message import Partition
from consumer.core.pauses import PauseOrder, pause_of
from consumer.handler_records import notices
from consumer.handler_records.notices import Notice
from consumer.handler_records.settled_ranges import Gap
from consumer.kafka import group
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres import pauses, positions, stopped_partitions, waiting_messages
from consumer.postgres.protocol import Connection
from consumer.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What `consumer status` reports.

    miscounts: None unless the ledger's rows were counted.
    """

    app: str
    handlers: Mapping[str, dict[str, Any]]
    open_dead_letters: Mapping[str, dict[str, int]]
    partitions: Sequence[dict[str, Any]]
    missing_topics: Sequence[str]
    waiting: Sequence[dict[str, Any]]
    notices: Sequence[Notice]
    gaps: Sequence[Gap]
    outbox: Mapping[str, Any]
    miscounts: Mapping[str, dict[str, int]] | None = None

    @property
    def is_good(self) -> bool:
        """Whether no operator has to act."""
        return not (
            any(partition["stopped"] for partition in self.partitions)
            or any(waiting["systemic"] for waiting in self.waiting)
            or any(notice.is_problem for notice in self.notices)
            or self.outbox["stopped"]
            or self.miscounts
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the answer of `consumer status --json`."""
        answer = {
            "app": self.app,
            "handlers": self.handlers,
            "open_letters": self.open_dead_letters,
            "partitions": self.partitions,
            "missing_topics": self.missing_topics,
            "waiting": self.waiting,
            "notices": [notice.as_dict() for notice in self.notices],
            "gaps": [gap_as_dict(gap) for gap in self.gaps],
            "outbox": self.outbox,
        }
        return answer if self.miscounts is None else answer | {"miscounts": self.miscounts}


async def read_status(app: App, path: str, settings: Settings, exact: bool = False) -> Status:
    """Read the status of an App in one database.

    path: how commands name the App. exact: also count the ledger's rows. Raises KafkaError, Misconfigured,
    ServiceUnavailable.
    """
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        return await with_ledger(
            settings, lambda connection: read_through(connection, source, app, path, settings, exact)
        )
    finally:
        await source.stop(5)


async def read_through(
    connection: Connection, source: KafkaConsumer, app: App, path: str, settings: Settings, exact: bool = False
) -> Status:
    """Read the status through connections that are open. Raises KafkaError."""
    lags, missing = await partition_lags(connection, source, app)
    partitions = [Partition(lag["topic"], lag["partition"]) for lag in lags]
    members = await group.describe_group(settings, app.name)
    handlers = await handler_counts(connection, app)
    dead_letters = await open_dead_letters(connection, app)
    health = await partition_health(connection, source, app, partitions, members.commits)
    waiting, _ = await waiting_messages.read(connection, app.name)
    unpublished = await summary(connection, app.name)
    paused = await pauses.read(connection, app.name)
    wrong_counts = await miscounts(connection, app) if exact else None
    all_notices, coverage = await notices.gather(connection, app, path, members, missing)
    return Status(
        app=app.name,
        handlers=handlers,
        open_dead_letters=dead_letters,
        partitions=[
            lag | health_as_dict(health[partition], path) | {"paused": _paused(paused, partition)}
            for lag, partition in zip(lags, partitions, strict=True)
        ],
        missing_topics=missing,
        waiting=waiting,
        notices=all_notices,
        gaps=coverage.gaps,
        outbox=unpublished,
        miscounts=wrong_counts,
    )


async def read_without_kafka(connection: Connection, app: App, path: str) -> Status:
    """Read what PostgreSQL knows of the status, while Kafka is away.

    Ends and lags are None. Partitions are those with a position, and stops those that a worker has recorded.
    """
    offsets = await positions.next_offsets(connection, app.name)
    stops = await stopped_partitions.read(connection, app.name)
    waiting, totals = await waiting_messages.read(connection, app.name)
    paused = await pauses.read(connection, app.name)
    rows: list[dict[str, Any]] = []
    for partition, position in sorted(offsets.items()):
        stop, first = stops.get(partition, (None, 0))
        health = PartitionHealth(None, stop if position <= first else None, None)
        lag = {"topic": partition.topic, "partition": partition.partition, "position": position}
        lag |= {"end": None, "lag": None, "waiting": totals.get(partition, (0, 0))[0], "unread": None}
        rows.append(lag | health_as_dict(health, path) | {"paused": _paused(paused, partition)})
    return Status(
        app=app.name,
        handlers=await handler_counts(connection, app),
        open_dead_letters=await open_dead_letters(connection, app),
        partitions=rows,
        missing_topics=(),
        waiting=waiting,
        notices=(),
        gaps=(),
        outbox=await summary(connection, app.name),
    )


async def probe(settings: Settings) -> None:
    """Check that Kafka and PostgreSQL answer and the ledger exists.

    Raises KafkaError, Misconfigured, ServiceUnavailable.
    """

    async def nothing(_: Connection) -> None:
        return None

    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        await with_ledger(settings, nothing)
    finally:
        await source.stop(5)


def _paused(paused: Sequence[PauseOrder], partition: Partition) -> dict[str, Any] | None:
    pause = pause_of(paused, partition)
    return None if pause is None else pause_as_dict(pause)


def gap_as_dict(gap: Gap) -> dict[str, Any]:
    """Return a gap as `--json` prints it."""
    return {"handler": gap.handler, **gap.partition._asdict(), "first": gap.first, "past": gap.past}


def health_as_dict(health: PartitionHealth, path: str) -> dict[str, Any]:
    """Return what `status --json` prints of a partition's health.

    path: how commands name the App.
    """
    stop, transaction = health.stop, health.open_transaction
    return {
        "topic_id": None if health.topic_id is None else str(health.topic_id),
        "stopped": stop
        and {
            "reason": stop.reason.value,
            "why": stop.text,
            "missing": stop.missing and {"first": stop.missing[0], "last": stop.missing[1]},
            "do": stop.command(path),
        },
        "open_transaction": transaction
        and {
            "offset": transaction.offset,
            "since": datetime.fromtimestamp(transaction.since_ms / 1000, UTC).isoformat(timespec="seconds"),
        },
    }
