"""Where reading goes on: what a database knows of partitions, and what Kafka's logs say against going on from there.

Knows the positions of one database and what a log looks like now; core/log_identity.py judges. A position in PostgreSQL counts;
where there is none, the group's commit in Kafka; where that has none, the beginning of the log. Limitations: does not know
whether the partitions are still this worker's when it answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from consumer.core.log_identity import NOWHERE, Beginning, Committed, Log, Position, Stop, begin, judge
from consumer.core.message import Partition
from consumer.handler_records import coverage
from consumer.handler_records.settled_ranges import Changes, as_text
from consumer.kafka.source import CorruptRecordException, Identity, KafkaError, Source
from consumer.logs import event
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.postgres.stopped_partitions import Stops


async def positions(
    source: Source,
    session: Session,
    app: str,
    wanted: list[Partition],
    label: Mapping[str, str],
    handlers: Mapping[str, Collection[int]],
    others: Collection[str] = (),
) -> tuple[dict[Partition, tuple[Position, Stop | None]], Changes]:
    """Positions, each with what speaks against going on from it, or None; and which handlers begin and end there.

    label: names the database in the log. handlers: topic -> numbers of those that keep ledger rows. others: the
    installations of the App's other shards. Where there was no position, one is written. A partition whose log cannot be
    looked at now is left out. Raises Outage, KafkaError, TimeoutError.
    """
    changes = Changes()
    try:
        identity = await source.identity(sorted({each.topic for each in wanted}))
        known = await session.positions(app, wanted)
        committed = {each: Committed(*copy) for each, copy in (await source.copies(wanted)).items()}
        stopped: dict[Partition, Stop] = {}
        if missing := [each for each in wanted if each not in known]:
            firsts = await source.beginnings(missing, partial=True)
            starts = {
                each: begin(each, committed.get(each), first, session.installation, others)
                for each, first in firsts.items()
            }
            stopped = {each: start for each, start in starts.items() if isinstance(start, Stop)}
            begun = {each: start for each, start in starts.items() if isinstance(start, Beginning)}
            await _begin(session, app, identity, begun)
            for each, start in begun.items():
                _tell_beginning(each, start, firsts[each], label)
            known |= await session.positions(app, list(begun))
        nameless = {
            each: (identity.cluster_id, identity.topics[each.topic])
            for each, at in known.items()
            if at.topic_id is None and each.topic in identity.topics
        }
        if nameless:  # written by a version that did not look, or on a broker that did not tell
            await session.name_logs(app, nameless)
            known |= await session.positions(app, list(nameless))
        settling = {each: as_text(handlers.get(each.topic, ())) for each in known}
        if other := [each for each, at in known.items() if at.handlers != settling[each]]:
            changes = await coverage.switch(session.connection, app, {each: settling[each] for each in other})
            known |= await session.positions(app, other)
    except (KafkaError, TimeoutError):
        raise
    except Exception as error:
        session.close()
        raise Outage(str(error)) from error
    for partition, at in known.items():
        _tell_difference(partition, committed[partition].offset if partition in committed else None, at.offset)
    logs = [Log(identity.cluster_id, identity.topics.get(each.topic)) for each in known]
    judged = await asyncio.gather(*(_judge(source, *each) for each in zip(known, known.values(), logs, strict=True)))
    found: dict[Partition, tuple[Position, Stop | None]] = {each: (NOWHERE, stop) for each, stop in stopped.items()}
    for (partition, at), (is_known, stop) in zip(known.items(), judged, strict=True):
        if is_known:
            found[partition] = (at, stop)
    return found, changes


async def _begin(session: Session, app: str, identity: Identity, begun: Mapping[Partition, Beginning]) -> None:
    positions = {
        each: Position(start.offset, identity.cluster_id, identity.topics.get(each.topic))
        for each, start in begun.items()
    }
    await session.begin_positions(app, positions, [each for each, start in begun.items() if start.why == "group"])


async def recall(
    session: Session, numbers: Collection[int], found: Mapping[Partition, tuple[Position, Stop | None]]
) -> Any:
    """What a database remembers of partitions: chains that dead letters hold, and attempts. Raises Outage.

    numbers: of the handlers in its ledger.
    """
    open_ones = {each: at.offset for each, (at, _) in found.items() if at is not NOWHERE}
    if not open_ones:
        return {}, {}
    try:
        return await session.restore(sorted(numbers), open_ones)
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


def _tell_beginning(partition: Partition, start: Beginning, log_first: int, label: Mapping[str, str]) -> None:
    where = {"topic": partition.topic, "partition": partition.partition, "offset": start.offset, **label}
    if start.why == "lost":
        event(
            logging.WARNING, "postgresql has lost its position: reading again from where the application began", **where
        )
    elif start.why == "group" and start.offset > log_first:
        event(
            logging.WARNING,
            "beginning at the commit of another client of this group: what is before it is not applied",
            skipped=start.offset - log_first,
            do=f"consumer positions APP --topic {partition.topic} --partition {partition.partition} --to earliest",
            **where,
        )


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
        except KafkaError as error:
            # What does not heal is reported by the fetch, which stops this partition alone.
            return not error.retriable or isinstance(error, CorruptRecordException), None
        except (TimeoutError, OSError):
            return False, None
        stop = judge(partition, at, log)
    return True, stop
