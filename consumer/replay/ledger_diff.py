"""Compare the ledger's rows with the log: does each name a message?

replay/chunk_check.py checks the other direction. While the range was read, every delivery was counted whose ledger row
its very record had made. So the rows that PostgreSQL counts in a block of 4,096 offsets must be as many as those
deliveries: no set of ids is kept, however long the range is. Where the numbers differ, the block is read again and
compared row by row: workers and `--apply` add rows meanwhile, and compaction drops records, so the numbers alone prove
nothing.
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
from consumer.replay.samples import sample_place
from consumer.transaction.identify import identify

Block = tuple[str, Partition, int]  # handler, partition, number of the block

FAULTY_MAX = 256  # blocks with a fault, after which the others that differ are not compared


async def compare(
    connection: Connection,
    source: KafkaConsumer,
    findings: Findings,
    handlers: Sequence[Handler],
    topics: Mapping[str, int],
    matched: Mapping[Block, int],
    missing: Collection[tuple[str, bytes]],
    is_compacted: Callable[[str], Awaitable[bool]],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]] | None,
    logs: Mapping[Partition, Position],
) -> None:
    """Fill `findings.history`, and count rows that were deleted meanwhile.

    Args:
        source: is read again, from other offsets.
        matched: how many deliveries of each block had a ledger row of their own record. Fewer rows now means that some
            were deleted since.
        missing: ids, with their handlers, that the ledger lacked when they were read.
        is_compacted: asked about a topic where records are gone. Rows of such records are no problem, since a compacted
            log drops records by design.
        read_ends: reads where every partition of the topics ends now, to find rows beyond. None when the range is
            narrower.

    Raises KafkaError, LogTruncated, and what the database raises.
    """
    by_number = {handler.number: handler for handler in handlers}
    by_name = {handler.name: handler for handler in handlers}
    spans = {span.partition: span for span in findings.spans if span.length}
    rows = await _row_counts(connection, by_number, topics, spans)
    history = {handler.name: {"rows": 0, "with_message": 0, "without_message": 0} for handler in handlers}
    for (name, _, _), count in rows.items():
        history[name]["rows"] += count
    expected = {block: count for block, count in matched.items() if block[0] in by_name and block[1] in spans}
    differing = sorted(block for block in rows.keys() | expected if rows.get(block, 0) != expected.get(block, 0))
    absent = {name: {id for handler, id in missing if handler == name} for name in (by_name if differing else ())}
    faulty = 0
    for compared, block in enumerate(differing):
        if faulty == FAULTY_MAX:
            findings.notes.append(
                f"ledger and log differ in {len(differing) - compared:,} more blocks of {1 << BLOCK_BITS:,} offsets, which were "
                "not compared row by row"
            )
            break
        name, partition, number = block
        rereading = _BlockComparison(
            connection, source, by_name[name], topics[partition.topic], spans[partition], number, absent[name]
        )
        orphans, gone = await rereading.compare(findings, expected.get(block, 0), is_compacted, logs)
        faulty += bool(orphans or gone)
        history[name]["without_message"] += orphans
        for offset, id in gone:
            findings.count_gone(name, partition, offset, id)
    if read_ends is not None:
        await _count_nowhere(connection, findings, history, by_number, topics, read_ends)
    for counts in history.values():
        counts["with_message"] = counts["rows"] - counts["without_message"]
    findings.history = history


async def _row_counts(
    connection: Connection,
    handlers: Mapping[int, Handler],
    topics: Mapping[str, int],
    spans: Mapping[Partition, Span],
) -> dict[Block, int]:
    """Return how many ledger rows each block has."""
    names = {number: name for name, number in topics.items()}
    ranges = ledger_queries.NumberedRanges(
        [topics[partition.topic] for partition in spans],
        [partition.partition for partition in spans],
        [span.first for span in spans.values()],
        [span.end for span in spans.values()],
    )
    rows = await ledger_queries.block_counts(connection, list(handlers), ranges, BLOCK_BITS)
    return {(handlers[row[0]].name, Partition(names[row[1]], row[2]), row[3]): row[4] for row in rows}


async def _count_nowhere(
    connection: Connection,
    findings: Findings,
    history: Mapping[str, dict[str, int]],
    handlers: Mapping[int, Handler],
    topics: Mapping[str, int],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]],
) -> None:
    """Count rows beyond the ends of the logs."""
    names = {number: name for name, number in topics.items()}
    for number, topic, partition, id, offset in await rows_nowhere(connection, handlers, topics, read_ends):
        name = handlers[number].name
        history[name]["rows"] += 1
        history[name]["without_message"] += 1
        _sample(findings, name, Partition(names[topic], partition), offset, id.bytes, "the log has no such offset")


async def rows_nowhere(
    connection: Connection,
    handlers: Mapping[int, Handler],
    topics: Mapping[str, int],
    read_ends: Callable[[], Awaitable[Mapping[Partition, int]]],
) -> list[Any]:
    """Return rows beyond the ends of the logs.

    Race: a worker may settle a message that was produced after the ends were read. So the ends are read again after the
    rows, and only rows that are still beyond count.
    """
    ends = await read_ends()
    rows = await ledger_queries.rows_nowhere(
        connection,
        list(handlers),
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
class _BlockComparison:
    """Compares the records of one block with the rows that name them.

    topic, number: of the topic and of the block. missing: ids that were not in the ledger.
    """

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
        expected: int,
        is_compacted: Callable[[str], Awaitable[bool]],
        logs: Mapping[Partition, Position],
    ) -> tuple[int, list[tuple[int, bytes]]]:
        """Return rows without a message, and records whose row is gone.

        expected: rows that were there when their records were read. Rows that workers have added meanwhile have their
        message.
        """
        partition = self.span.partition
        first = max(self.span.first, self.number << BLOCK_BITS)
        past = min(self.span.end, (self.number + 1) << BLOCK_BITS)
        ids = await self._read_ids(first, past, logs)
        rows = await ledger_queries.rows_between(
            self.connection, self.handler.number, self.topic, partition.partition, first, past
        )
        orphans, still_there = 0, set()
        for id, offset in rows:
            recorded = ids.get(offset)
            if recorded == id.bytes:
                if recorded not in self.missing:
                    still_there.add(offset)
                continue
            if recorded is None and await is_compacted(partition.topic):
                findings.gone += 1
                continue
            orphans += 1
            detail = (
                "the log holds no record at that offset"
                if recorded is None
                else f"the record at that offset is {UUID(bytes=recorded)}"
            )
            _sample(findings, self.handler.name, partition, offset, id.bytes, detail)
        if len(still_there) >= expected:
            return orphans, []
        candidates = {offset: id for offset, id in ids.items() if offset not in still_there and id not in self.missing}
        absent = await ledger_queries.absent_ids(self.connection, self.handler.number, list(candidates.values()))
        gone = [(offset, id) for offset, id in sorted(candidates.items()) if id in absent]
        return orphans, gone[: expected - len(still_there)]

    async def _read_ids(self, first: int, past: int, logs: Mapping[Partition, Position]) -> dict[int, bytes]:
        """Read the block again, and return its ids by offset."""
        ids: dict[int, bytes] = {}
        async for chunk in read(self.source, [Span(self.span.partition, first, past)]):
            deliveries = [Delivery(self.handler, record) for record in chunk.records]
            identify(deliveries, logs)
            ids |= {delivery.record.offset: delivery.id for delivery in deliveries}
        return ids


def _sample(findings: Findings, handler: str, partition: Partition, offset: int, id: bytes, detail: str) -> None:
    findings.sample("rows_without_message", **sample_place(handler, partition, offset, id), detail=detail)
