"""Reads a range of topics in order, without a consumer group.

Reads through kafka/consumer.py; knows no ledger. Commits nothing and joins no group, so workers are not affected.
Limitations: the log may drop records of a range before they are read (LogTruncated then).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.message import Partition, Record
from consumer.kafka.bounds import AtPosition, Bound, Earliest, Latest, LogRange, Offset, Span, Time, span
from consumer.kafka.consumer import KafkaConsumer

_POLL_SECONDS = 0.2
_AGO = re.compile(r"([0-9]{1,9})(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Chunk(NamedTuple):
    """Records of one partition, in offset order.

    Holds also the offset up to which the partition has now been read.
    """

    partition: Partition
    records: Sequence[Record]
    next: int


def parse(text: str, option: str, now_ms: int, names: str = "earliest, latest, position") -> Bound:
    """Parse a bound.

    Accepts earliest, latest, position, an offset, an ISO 8601 time (UTC without a zone), or an age such as 90m. Raises
    Misconfigured for anything else, and for a time in the future.
    """
    given = text.strip()
    match given.lower():
        case "earliest" | "beginning":
            return Earliest()
        case "latest" | "end":
            return Latest()
        case "position":
            return AtPosition()
        case _:
            pass
    if re.fullmatch("[0-9]{1,18}", given):
        return Offset(int(given))
    if ago := _AGO.fullmatch(given.lower()):
        return Time(max(0, now_ms - int(ago[1]) * _SECONDS[ago[2]] * 1000))
    try:
        at = datetime.fromisoformat(given)
        milliseconds = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise Misconfigured(
            f"{option} {given!r}: not understood; write {names}, an offset, a time such as 2026-11-25T10:00:00Z, "
            "or how long ago, such as 90m, 24h or 7d"
        ) from None
    if milliseconds > now_ms:
        raise Misconfigured(
            f"{option} {given}: a time in the future; give an earlier one (times without a zone are UTC)"
        )
    if milliseconds < 0:
        raise Misconfigured(f"{option} {given}: a time before 1970; give a later one")
    return Time(milliseconds)


async def find_partitions(
    source: KafkaConsumer, topics: Sequence[str], numbers: Sequence[int] | None
) -> list[Partition]:
    """Return the requested partitions.

    Raises Misconfigured for a topic or a partition that does not exist.
    """
    existing = await source.log.partitions(topics)
    wanted: list[Partition] = []
    for topic in topics:
        if not existing[topic]:
            raise Misconfigured(f"topic {topic!r}: does not exist; check its name and the Kafka cluster")
        for number in sorted(set(numbers or ())):
            if Partition(topic, number) not in existing[topic]:
                raise Misconfigured(f"topic {topic!r}: no partition {number}; it has 0 to {len(existing[topic]) - 1}")
        wanted += [partition for partition in existing[topic] if not numbers or partition.partition in numbers]
    return wanted


async def resolve(
    source: KafkaConsumer, partitions: Sequence[Partition], start: Bound, end: Bound, positions: Mapping[Partition, int]
) -> list[Span]:
    """Return the offsets to read of each partition.

    Raises Misconfigured if the log holds none of them, or has dropped some.
    """
    spans = await spans_between(source, partitions, start, end, positions)
    if not any(part.length for part in spans):
        begins, ends = await source.log.beginnings(partitions), await source.log.ends(partitions)
        held = ", ".join(
            f"{partition.topic}:{partition.partition} {begins[partition]} to {ends[partition]}"
            for partition in partitions[:8]
        )
        raise Misconfigured(f"--from and --until: the range is empty; the log holds {held}")
    return spans


async def spans_between(
    source: KafkaConsumer, partitions: Sequence[Partition], start: Bound, end: Bound, positions: Mapping[Partition, int]
) -> list[Span]:
    """Return the offsets to read of each partition; there may be none.

    Raises Misconfigured if the log has dropped some.
    """
    begins, ends = await source.log.beginnings(partitions), await source.log.ends(partitions)
    times: list[dict[Partition, int | None]] = []
    for bound in (start, end):
        times.append(await source.log.offsets_at(partitions, bound.milliseconds) if isinstance(bound, Time) else {})
    if isinstance(start, Time) and isinstance(end, Time) and start.milliseconds >= end.milliseconds:
        raise Misconfigured("--from: not before --until; give an earlier time")
    if isinstance(start, Offset) and isinstance(end, Offset) and start.number >= end.number:
        raise Misconfigured(f"--from {start.number} --until {end.number}: the range is empty; give a lower --from")
    for bound, option in ((start, "--from"), (end, "--until")):
        if isinstance(bound, Offset) and all(bound.number > ends[partition] for partition in partitions):
            last = ", ".join(
                f"{partition.topic}:{partition.partition} at {ends[partition]}" for partition in partitions[:8]
            )
            raise Misconfigured(f"{option} {bound.number}: beyond the end of the log; give an offset up to it ({last})")
    spans = [
        span(
            partition,
            LogRange(
                begins[partition],
                ends[partition],
                positions.get(partition),
                times[0].get(partition),
                times[1].get(partition),
            ),
            start,
            end,
        )
        for partition in partitions
    ]
    if isinstance(end, Time):
        spans = await _with_older_records(source, spans, ends, end.milliseconds)
    return spans


async def _with_older_records(
    source: KafkaConsumer, spans: Sequence[Span], ends: Mapping[Partition, int], milliseconds: int
) -> list[Span]:
    """Extend spans up to their last record from before a time.

    Kafka gives the first record that is not older than the time. A producer whose clock is ahead makes that a record
    long before the last older one, and everything between would be left out without a word. So the rest is read.
    """
    past: dict[Partition, int] = {}
    async for chunk in read(source, [Span(part.partition, part.end, ends[part.partition]) for part in spans]):
        for record in chunk.records:
            if record.timestamp < milliseconds:
                past[chunk.partition] = record.offset + 1
    return [part._replace(end=max(part.end, past.get(part.partition, 0))) for part in spans]


async def read(source: KafkaConsumer, spans: Sequence[Span]) -> AsyncIterator[Chunk]:
    """Yield the records of the spans, in order within each partition.

    Partitions come as they are fetched. The source must be started. Ends when every span was read to its end. Raises
    KafkaError, and LogTruncated when records were removed meanwhile.
    """
    ends = {part.partition: part.end for part in spans if part.length}
    received = {part.partition: part.first for part in spans if part.length}
    source.assign(ends)
    for partition, offset in received.items():
        source.seek_and_resume(partition, offset)
    while ends:
        polled = await source.poll(_POLL_SECONDS, lambda partition: received.get(Partition(*partition)))
        for partition in list(ends):
            end, offset = ends[partition], received[partition]
            records = polled.get(partition, ())
            if records and records[0].offset < offset:
                records = [record for record in records if record.offset >= offset]
            if records:
                offset = records[-1].offset + 1
                if offset > end:
                    records = [record for record in records if record.offset < end]
            else:
                # Markers, aborted and compacted records are never handed out: only the client's position passes them.
                offset = max(offset, await source.position(partition) or 0)
            received[partition] = offset
            if offset >= end:
                source.pause(partition)
                del ends[partition]
            if records or offset >= end:
                yield Chunk(partition, records, min(offset, end))


async def read_last(source: KafkaConsumer, ends: Mapping[Partition, int], count: int) -> list[Record]:
    """Return the last records of partitions before these offsets.

    In order within each partition. As many as `count` of each, or all that it has: where a log has offsets without a record (markers, aborted and
    compacted ones), it is read from further back. The source must be started. Raises KafkaError and LogTruncated.
    """
    begins = await source.log.beginnings(list(ends))
    read_from = dict(ends)
    last: dict[Partition, list[Record]] = {partition: [] for partition in ends}
    width = count
    while True:
        spans = [
            Span(partition, max(begins[partition], offset - width), offset)
            for partition, offset in read_from.items()
            if offset > begins[partition] and len(last[partition]) < count
        ]
        if not spans:
            return [record for records in last.values() for record in records]
        older: dict[Partition, list[Record]] = {span.partition: [] for span in spans}
        async for chunk in read(source, spans):
            older[chunk.partition] = [*older[chunk.partition], *chunk.records][-count:]
        for partition, first, _ in spans:
            last[partition] = (older[partition] + last[partition])[-count:]
            read_from[partition] = first
        width *= 4
