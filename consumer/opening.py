"""Where reading goes on: what a database knows of partitions, and what Kafka's logs say against going on from there.

Knows the positions of one database and what a log looks like now; core/incarnation.py judges. A position in PostgreSQL counts;
where there is none, the group's commit in Kafka; where that has none, the beginning of the log. What it does not know: whether
the partitions are still this worker's when it answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from consumer.core.incarnation import Log, Position, Stop, judge, noted_beginning
from consumer.core.message import Partition
from consumer.kafka import KafkaError, Source
from consumer.ledger import Outage, Session
from consumer.logs import event
from consumer.stops import Stops


async def positions(
    source: Source, session: Session, app: str, wanted: list[Partition], label: Mapping[str, str]
) -> dict[Partition, tuple[Position, Stop | None]]:
    """Positions, each with what speaks against going on from it, or None. label: names the database in the log.

    Where there was none, one is written. A partition whose log cannot be looked at now is left out. Raises Outage, KafkaError,
    TimeoutError.
    """
    try:
        identity = await source.identity(sorted({each.topic for each in wanted}))
        known = await session.positions(app, wanted)
        copies = await source.copies(wanted)
        committed = {each: copies[each][0] if each in copies else None for each in wanted}
        if missing := [each for each in wanted if each not in known]:
            beginnings = await source.beginnings(missing, partial=True)
            missing = [each for each in missing if each in beginnings]
            starts = {
                each: _start_of(session.installation, each, copies.get(each), beginnings[each], label)
                for each in missing
            }
            await session.begin_positions(
                app,
                {
                    each: Position(start, identity.cluster_id, identity.topics.get(each.topic))
                    for each, start in starts.items()
                },
            )
            known |= await session.positions(app, missing)
        nameless = {
            each: (identity.cluster_id, identity.topics[each.topic])
            for each, at in known.items()
            if at.topic_id is None and each.topic in identity.topics
        }
        if nameless:  # written by a version that did not look, or on a broker that did not tell
            await session.name_logs(app, nameless)
            known |= await session.positions(app, list(nameless))
    except (KafkaError, TimeoutError):
        raise
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error
    for partition, at in known.items():
        _tell_difference(partition, committed[partition], at.offset)
    logs = [Log(identity.cluster_id, identity.topics.get(each.topic)) for each in known]
    judged = await asyncio.gather(*(_judge(source, *each) for each in zip(known, known.values(), logs, strict=True)))
    return {
        partition: (at, stop)
        for (partition, at), (is_known, stop) in zip(known.items(), judged, strict=True)
        if is_known
    }


async def recall(
    session: Session, numbers: Collection[int], found: Mapping[Partition, tuple[Position, Stop | None]]
) -> Any:
    """What a database remembers of partitions: chains that dead letters hold, and attempts. Raises Outage.

    numbers: of the handlers in its ledger.
    """
    if not found:
        return {}, {}
    try:
        return await session.recall(sorted(numbers), {each: at.offset for each, (at, _) in found.items()})
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error


async def recall_stops(session: Session, stops: Stops, app: str, partitions: Collection[Partition]) -> None:
    """Take over what other workers wrote of partitions that could not be read. Raises Outage."""
    try:
        await stops.recall(session.connection, app, partitions, time.monotonic())
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error


def _start_of(
    installation: str, partition: Partition, copy: tuple[int, str] | None, beginning: int, label: Mapping[str, str]
) -> int:
    """Where to begin without a position: at the group's offset, unless that is our own copy of one that was lost."""
    if copy is None:
        return beginning
    group, note = copy
    began = noted_beginning(note, installation)
    if began is None:
        return group
    event(
        logging.WARNING,
        "postgresql has lost its position: reading again from where the application began",
        topic=partition.topic,
        partition=partition.partition,
        kafka=group,
        began=began,
        **label,
    )
    return max(began, beginning)


def _tell_difference(partition: Partition, group: int | None, position: int) -> None:
    """Behind is normal after a crash: Kafka's commit is a copy, made now and then. Ahead is not."""
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


async def _judge(source: Source, partition: Partition, at: Position, log: Log) -> tuple[bool, Stop | None]:
    """What speaks against going on from a position; False where that cannot be told now."""
    if log.topic_id is None and at.topic_id is not None and log.cluster_id is not None:
        return False, None  # the topic is being deleted, or this broker does not know it yet
    stop = judge(partition, at, log)
    if stop is None and at.seen is not None:
        try:
            log = log._replace(at_print=await source.print_at(partition, at.seen.offset))
        except (KafkaError, TimeoutError, OSError):
            return False, None
        stop = judge(partition, at, log)
    return True, stop
