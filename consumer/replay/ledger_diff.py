"""The ledger's rows against the log: whether each names a message that is there. The other direction is replay/check.py's.

Knows the ledger's rows and reads the log again where the numbers differ; decides nothing about a message. While the range
was read, every delivery told whether its row was made by that very record. So the rows made in a block of 4,096 offsets,
counted by PostgreSQL, must be as many as the records that told so: no set of ids is kept, however long the range is.
Where the numbers differ, that block is read again and compared row by row: workers and `--apply` add rows meanwhile, and
compaction drops records, so the numbers alone prove nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.log_identity import Position
from consumer.core.message import Partition
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import read
from consumer.postgres import ledger_queries
from consumer.postgres.protocol import Connection
from consumer.replay.findings import BLOCK_BITS, Findings
from consumer.transaction.identify import identify

Block = tuple[str, Partition, int]  # handler, partition, number of the block

FAULTY_MAX = 256  # blocks with a fault, after which the others that differ are left alone


async def compare(
    connection: Connection,
    source: KafkaConsumer,
    findings: Findings,
    handlers: Sequence[Handler],
    topics: Mapping[str, int],
    told: Mapping[Block, int],
    missing: Collection[tuple[str, bytes]],
    is_compacted: Callable[[str], Awaitable[bool]],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]] | None,
    logs: Mapping[Partition, Position],
) -> None:
    """Fill `findings.history`. told: how many deliveries of a block said that their row was made by them. missing: ids,
    with their handlers, that were not in the ledger when they were read. Where there are fewer rows than were told, some
    were deleted since.

    is_compacted: asked of a topic where records are gone: rows of those are no problem then, since a compacted log drops
    records by design. read_ends: asks where every partition of the topics ends now, to find rows beyond; None when the
    range does not go there. The source is read again, from other offsets. Raises KafkaError, LogTruncated, and what the database says.
    """
    numbers = {each.number: each for each in handlers}
    names = {number: name for name, number in topics.items()}
    spans = {each.partition: each for each in findings.spans if each.length}
    ranges = ledger_queries.Ranges(
        [topics[partition.topic] for partition in spans],
        [partition.partition for partition in spans],
        [span.first for span in spans.values()],
        [span.end for span in spans.values()],
    )
    rows = await ledger_queries.block_counts(connection, list(numbers), ranges, BLOCK_BITS)
    there: dict[Block, int] = {(numbers[row[0]].name, Partition(names[row[1]], row[2]), row[3]): row[4] for row in rows}
    found = {each.name: {"rows": 0, "with_message": 0, "without_message": 0} for each in handlers}
    for (handler, _, _), count in there.items():
        found[handler]["rows"] += count
    by_name = {each.name: each for each in handlers}
    counted = {block: n for block, n in told.items() if block[0] in by_name and block[1] in spans}
    differing = sorted(block for block in there.keys() | counted if there.get(block, 0) != counted.get(block, 0))
    absent = {name: {id for handler, id in missing if handler == name} for name in (by_name if differing else ())}
    faulty = 0
    for done, block in enumerate(differing):
        if faulty == FAULTY_MAX:
            left = len(differing) - done
            findings.notes.append(
                f"ledger and log differ in {left:,} more blocks of {1 << BLOCK_BITS:,} offsets, which were not compared row by row"
            )
            break
        handler, partition, number = block
        look = _Block(
            connection, source, by_name[handler], topics[partition.topic], spans[partition], number, absent[handler]
        )
        orphans, gone = await look.compare(findings, counted.get(block, 0), is_compacted, logs)
        faulty += bool(orphans or gone)
        found[handler]["without_message"] += orphans
        for offset, id in gone:
            findings.count_gone(handler, partition, offset, id)
    if read_ends is not None:
        await _count_nowhere(connection, findings, found, numbers, topics, read_ends)
    for counts in found.values():
        counts["with_message"] = counts["rows"] - counts["without_message"]
    findings.history = found


async def _count_nowhere(
    connection: Connection,
    findings: Findings,
    found: Mapping[str, dict[str, int]],
    numbers: Mapping[int, Handler],
    topics: Mapping[str, int],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]],
) -> None:
    names = {number: name for name, number in topics.items()}
    for number, topic, partition, id, offset in await _rows_nowhere(connection, numbers, topics, read_ends):
        name = numbers[number].name
        found[name]["rows"] += 1
        found[name]["without_message"] += 1
        _tell(findings, name, Partition(names[topic], partition), offset, id.bytes, "the log has no such offset")


async def _rows_nowhere(
    connection: Connection,
    numbers: Mapping[int, Handler],
    topics: Mapping[str, int],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]],
) -> list[Any]:
    """Rows beyond the ends of the logs.

    Race: a worker may settle a message that was produced after the ends were read. So the ends are read again after the
    rows, and only rows that are still beyond count.
    """
    ends = await read_ends()
    rows = await ledger_queries.rows_nowhere(
        connection,
        list(numbers),
        [topics[partition.topic] for partition in ends],
        [partition.partition for partition in ends],
        list(ends.values()),
    )
    if not rows:
        return []
    names = {number: name for name, number in topics.items()}
    ends = await read_ends()
    return [row for row in rows if row[4] >= ends.get(Partition(names[row[1]], row[2]), 0)]


@dataclass(frozen=True, slots=True)
class _Block:
    """The records of one block of a span, and the rows that name them. missing: ids that were not in the ledger."""

    connection: Connection
    source: KafkaConsumer
    handler: Handler
    topic: int
    span: Span
    number: int
    missing: Collection[bytes]

    async def compare(
        self,
        findings: Findings,
        told: int,
        is_compacted: Callable[[str], Awaitable[bool]],
        logs: Mapping[Partition, Position],
    ) -> tuple[int, list[tuple[int, bytes]]]:
        """How many rows have no message in the log, and the records whose row was there when they were read and is gone.

        Rows that workers have added meanwhile have their message.
        """
        partition = self.span.partition
        first = max(self.span.first, self.number << BLOCK_BITS)
        past = min(self.span.end, (self.number + 1) << BLOCK_BITS)
        ids: dict[int, bytes] = {}
        async for chunk in read(self.source, [Span(partition, first, past)]):
            deliveries = [Delivery(self.handler, record) for record in chunk.records]
            identify(deliveries, logs)
            ids |= {each.record.offset: each.id for each in deliveries}
        rows = await ledger_queries.rows_between(
            self.connection, self.handler.number, self.topic, partition.partition, first, past
        )
        orphans, still_there = 0, set()
        for id, offset in rows:
            here = ids.get(offset)
            if here == id.bytes:
                if here not in self.missing:
                    still_there.add(offset)
                continue
            if here is None and await is_compacted(partition.topic):
                findings.gone += 1
                continue
            orphans += 1
            detail = (
                "the log holds no record at that offset"
                if here is None
                else f"the record at that offset is {UUID(bytes=here)}"
            )
            _tell(findings, self.handler.name, partition, offset, id.bytes, detail)
        if len(still_there) >= told:
            return orphans, []
        candidates = {offset: id for offset, id in ids.items() if offset not in still_there and id not in self.missing}
        absent = await ledger_queries.absent_ids(self.connection, self.handler.number, list(candidates.values()))
        gone = [(offset, id) for offset, id in sorted(candidates.items()) if id in absent]
        return orphans, gone[: told - len(still_there)]


def _tell(findings: Findings, handler: str, partition: Partition, offset: int, id: bytes, detail: str) -> None:
    findings.sample(
        "rows_without_message",
        handler=handler,
        topic=partition.topic,
        partition=partition.partition,
        offset=offset,
        id=str(UUID(bytes=id)),
        detail=detail,
    )
