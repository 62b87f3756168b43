"""Decides from which offsets the worker reads its partitions.

A position in PostgreSQL counts. Where there is none, the group's commit in Kafka does, and then the beginning of the
log. core/log_identity.py judges. Limitations: does not know whether the partitions are still this worker's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TypeVar

from consumer.core.delivery import SavedAttempts
from consumer.core.log_identity import (
    NO_POSITION,
    CommittedOffset,
    ObservedLog,
    PartitionHalt,
    Position,
    StartOffset,
    check_log,
    decide_start,
)
from consumer.core.message import Partition
from consumer.core.pauses import PauseOrder
from consumer.handler_records import coverage
from consumer.handler_records.settled_ranges import HandlerChanges, as_text
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import CorruptRecordException, KafkaError
from consumer.kafka.protocol import Identity
from consumer.logs import event
from consumer.postgres import pauses
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.postgres.stopped_partitions import Stops

Chains = Mapping[Partition, set[tuple[int, bytes]]]
Attempts = Mapping[Partition, Mapping[tuple[int, int], SavedAttempts]]

Result = TypeVar("Result")


async def read_positions(
    source: KafkaConsumer,
    session: Session,
    app: str,
    wanted: list[Partition],
    label: Mapping[str, str],
    handlers: Mapping[str, Collection[int]],
    others: Collection[str] = (),
) -> tuple[dict[Partition, tuple[Position, PartitionHalt | None]], HandlerChanges]:
    """Read positions, and write them where there were none.

    Args:
        label: names the database in the log.
        handlers: topic -> numbers of those that keep ledger rows.
        others: the installations of the App's other shards.

    Returns each position with what speaks against going on from it, or None; and which handlers begin and end there. A
    partition whose log cannot be looked at now is left out. Raises Outage, KafkaError, TimeoutError.
    """
    changes = HandlerChanges()
    try:
        identity = await source.log.identity(sorted({partition.topic for partition in wanted}))
        known = await session.positions(app, wanted)
        committed = {
            partition: CommittedOffset(*copy)
            for partition, copy in (await source.committed_with_metadata(wanted)).items()
        }
        stopped: dict[Partition, PartitionHalt] = {}
        if missing := [partition for partition in wanted if partition not in known]:
            begun, stopped = await _begin(source, session, app, missing, committed, identity, label, others)
            known |= await session.positions(app, begun)
        known |= await _name_logs(session, app, known, identity)
        settling = {partition: as_text(handlers.get(partition.topic, ())) for partition in known}
        if changed := [partition for partition, position in known.items() if position.handlers != settling[partition]]:
            changes = await coverage.switch(
                session.connection, app, {partition: settling[partition] for partition in changed}
            )
            known |= await session.positions(app, changed)
    except (KafkaError, TimeoutError):
        raise
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error
    for partition, position in known.items():
        copied = committed.get(partition)
        _log_difference(partition, copied.offset if copied is not None else None, position.offset)
    judged = await _check_all(source, known, identity)
    return {**{partition: (NO_POSITION, stop) for partition, stop in stopped.items()}, **judged}, changes


async def _begin(
    source: KafkaConsumer,
    session: Session,
    app: str,
    missing: Sequence[Partition],
    committed: Mapping[Partition, CommittedOffset],
    identity: Identity,
    label: Mapping[str, str],
    others: Collection[str],
) -> tuple[list[Partition], dict[Partition, PartitionHalt]]:
    """Write positions of partitions that have none.

    Returns those, and others that an operator must decide about.
    """
    firsts = await source.log.beginnings(missing, partial=True)
    stopped: dict[Partition, PartitionHalt] = {}
    begun: dict[Partition, StartOffset] = {}
    for partition, first in firsts.items():
        match decide_start(partition, committed.get(partition), first, session.installation, others):
            case PartitionHalt() as stop:
                stopped[partition] = stop
            case StartOffset() as beginning:
                begun[partition] = beginning
    positions = {
        partition: Position(beginning.offset, identity.cluster_id, identity.topics.get(partition.topic))
        for partition, beginning in begun.items()
    }
    from_group = [partition for partition, beginning in begun.items() if beginning.why == "group"]
    await session.begin_positions(app, positions, from_group)
    for partition, beginning in begun.items():
        _log_beginning(partition, beginning, firsts[partition], label)
    return list(begun), stopped


async def _name_logs(
    session: Session, app: str, known: Mapping[Partition, Position], identity: Identity
) -> dict[Partition, Position]:
    """Add the log's ids to positions without them.

    An earlier version did not record them, or a broker did not report them.
    """
    nameless = {
        partition: (identity.cluster_id, identity.topics[partition.topic])
        for partition, position in known.items()
        if position.topic_id is None and partition.topic in identity.topics
    }
    if not nameless:
        return {}
    await session.name_logs(app, nameless)
    return await session.positions(app, list(nameless))


# -- what a database remembers of partitions --------------------------------------------------------------------------


async def restore_queues(
    session: Session, numbers: Collection[int], positions: Mapping[Partition, tuple[Position, PartitionHalt | None]]
) -> tuple[Chains, Attempts]:
    """Read the keys that dead letters hold, and saved attempts.

    numbers: of the handlers. Raises Outage.
    """
    offsets = {
        partition: position.offset for partition, (position, _) in positions.items() if position is not NO_POSITION
    }
    if not offsets:
        return {}, {}
    return await _or_outage(session, lambda: session.restore(sorted(numbers), offsets))


async def restore_stops(session: Session, stops: Stops, app: str, partitions: Collection[Partition]) -> None:
    """Read which partitions other workers could not read. Raises Outage."""
    await _or_outage(session, lambda: stops.recall(session.connection, app, partitions, time.monotonic()))


async def read_pauses(session: Session, app: str) -> Sequence[PauseOrder]:
    """Read what operators have paused. Raises Outage."""
    return await _or_outage(session, lambda: pauses.read(session.connection, app))


async def _or_outage(session: Session, read: Callable[[], Awaitable[Result]]) -> Result:
    try:
        return await read()
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error


# -- what the log says ------------------------------------------------------------------------------------------------


def _log_beginning(partition: Partition, beginning: StartOffset, log_first: int, label: Mapping[str, str]) -> None:
    fields = {"topic": partition.topic, "partition": partition.partition, "offset": beginning.offset, **label}
    if beginning.why == "lost":
        event(
            logging.WARNING,
            "postgresql has lost its position: reading again from where the application began",
            **fields,
        )
    elif beginning.why == "group" and beginning.offset > log_first:
        event(
            logging.WARNING,
            "beginning at the commit of another client of this group: what is before it is not applied",
            skipped=beginning.offset - log_first,
            do=f"consumer positions APP --topic {partition.topic} --partition {partition.partition} --move-to earliest",
            **fields,
        )


def _log_difference(partition: Partition, group: int | None, position: int) -> None:
    """Log a difference between Kafka's committed offset and the position.

    Kafka behind is normal after a crash: its commit is a copy that lags. Kafka ahead is not.
    """
    if group is not None and group != position:
        event(
            logging.WARNING if group > position else logging.INFO,
            "kafka's committed offset differs from the position in postgresql, which counts",
            topic=partition.topic,
            partition=partition.partition,
            kafka=group,
            postgresql=position,
            do="offsets reset with Kafka's tools have no effect: use `consumer positions`",
        )


# -- what the logs are ------------------------------------------------------------------------------------------------


async def _check_all(
    source: KafkaConsumer, known: Mapping[Partition, Position], identity: Identity
) -> dict[Partition, tuple[Position, PartitionHalt | None]]:
    """Return positions with the reason to halt there, or None.

    Leaves out positions that cannot be checked now.
    """
    checks = await asyncio.gather(
        *(
            _check(source, partition, position, ObservedLog(identity.cluster_id, identity.topics.get(partition.topic)))
            for partition, position in known.items()
        )
    )
    return {
        partition: (position, stop)
        for (partition, position), (is_known, stop) in zip(known.items(), checks, strict=True)
        if is_known
    }


async def _check(
    source: KafkaConsumer, partition: Partition, position: Position, log: ObservedLog
) -> tuple[bool, PartitionHalt | None]:
    """Return whether a position can be checked, and why to halt there."""
    if log.topic_id is None and position.topic_id is not None and log.cluster_id is not None:
        return False, None  # the topic is being deleted, or this broker does not know it yet
    stop = check_log(partition, position, log)
    if stop is None and position.seen is not None:
        try:
            log = log._replace(at_seen=await source.log.fingerprint_at(partition, position.seen.offset))
        except KafkaError as error:
            # What does not heal is reported by the fetch, which stops this partition alone.
            return not error.retriable or isinstance(error, CorruptRecordException), None
        except (TimeoutError, OSError):
            return False, None
        stop = check_log(partition, position, log)
    return True, stop
