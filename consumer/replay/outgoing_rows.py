"""Collects what the handlers publish and what Kafka has, in temporary tables.

A rebuild gives it what one pass after the other publishes (rebuild/state.py, OutgoingSink). The ends of the output topics are
read before the rebuild sees the database: a record below them was committed by then, so it is extra if no handler publishes
it. What is missing is looked for after the first pass, beyond these ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from consumer.core.message import Partition
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions, read
from consumer.outbox.digest import digests, digests_of, published_id
from consumer.outbox.record import Outgoing
from consumer.postgres import outgoing_comparison as tables
from consumer.postgres.connection import connect, translated_errors
from consumer.settings import Settings

_ROWS_AT_ONCE = 2000


class OutgoingRows:
    """The temporary tables of one comparison.

    is_compared: the first pass came to its end.
    """

    def __init__(
        self, connection: Any, source: KafkaConsumer, outputs: Sequence[str], advance: Callable[[str, int, int], None]
    ) -> None:
        self.connection = connection
        self.is_compared = False
        self._source = source
        self._outputs = outputs
        self._advance = advance
        self._earlier: dict[Partition, int] = {}  # ends of the output topics, before the rebuild
        self._cut: list[str] = []  # topics that lack their first records
        self._pass = 0
        self._rows: list[tuple[Any, ...]] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        source: KafkaConsumer,
        outputs: Sequence[str],
        advance: Callable[[str, int, int], None],
    ) -> AsyncIterator[OutgoingRows]:
        """Connect, create the tables, and read the topics' ends."""
        connection = await connect(settings)
        try:
            with translated_errors(settings):
                await tables.begin(connection)
                rows = cls(connection, source, outputs, advance)
                rows._earlier = await source.log.ends(await find_partitions(source, outputs, None))
                yield rows
        finally:
            connection.terminate()  # the server rolls back

    # -- what the rebuild calls ---------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Begin a pass, or begin it again."""
        self._rows = []
        await tables.forget(self.connection, self._pass)

    async def add(self, outgoing: Sequence[Outgoing]) -> None:
        """Take what a batch publishes."""
        self._rows += [
            (self._pass, record.topic, tables.UUID(record.id), *digests_of(record), handler, *source, offset)
            for record, source, handler, offset in outgoing
        ]
        if len(self._rows) >= _ROWS_AT_ONCE:
            await self._flush()

    async def end(self) -> None:
        """End a pass."""
        await self._flush()
        self._pass += 1

    async def differs(self) -> bool:
        """Compare the first pass with Kafka."""
        await self._read_outputs()
        self.is_compared = True
        return await tables.compare(self.connection) > 0

    async def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            await tables.add_expected(self.connection, rows)

    # -- what Kafka has -----------------------------------------------------------------------------------------------

    async def _read_outputs(self) -> None:
        await tables.note_watermarks(self.connection, self._outputs)  # what lies below is in Kafka by now
        partitions = await find_partitions(self._source, self._outputs, None)
        firsts = await self._source.log.beginnings(partitions)
        ends = await self._source.log.ends(partitions)
        self._cut = sorted({partition.topic for partition, first in firsts.items() if first > 0})
        spans = [Span(partition, firsts[partition], ends[partition]) for partition in partitions]
        total, done = sum(span.length for span in spans), 0
        async for partition, records, _ in read(self._source, spans):
            earlier = self._earlier.get(partition, 0)
            rows = [
                (
                    partition.topic,
                    tables.UUID(published_id(record.headers, *partition, record.offset)),
                    *digests(record.key, record.value, record.headers),
                    partition.partition,
                    record.offset,
                    record.offset < earlier,
                )
                for record in records
            ]
            if rows:
                await tables.add_in_kafka(self.connection, rows)
            done += len(rows)
            self._advance("output topics", min(done, total), total)

    # -- what proves nothing ------------------------------------------------------------------------------------------

    async def excuse(self) -> None:
        """Note which differences prove nothing."""
        await tables.read_reasons(self.connection)
        for number in range(1, self._pass):
            await tables.excuse_unstable(self.connection, number)
        await tables.excuse_truncated(self.connection, self._cut)
