"""Reads messages from Kafka, in the order of their effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.log_identity import Position
from consumer.core.message import Partition, Record
from consumer.decoders.preparation import fetch_schemas
from consumer.kafka import log_reader
from consumer.kafka.bounds import Span
from consumer.rebuild.applied_order import LOOKAHEAD, AppliedOrder, Backlog, OrderEntry, transactions
from consumer.rebuild.ledger_history import LedgerHistory
from consumer.rebuild.state import RebuildState, kafka_errors
from consumer.rebuild.variations import Variation
from consumer.transaction.identify import identify

_TRANSACTION_MAX = 100_000  # deliveries that are kept together as one transaction of a worker


class EntryReader:
    """Reads all spans of one pass, once.

    messages: records read so far. contradicted: see AppliedOrder. topics_without_ids: topics of messages whose offset is
    their id.
    """

    def __init__(
        self, state: RebuildState, history: LedgerHistory, variation: Variation, by_topic: Mapping[str, list[Handler]]
    ) -> None:
        self.messages = 0
        self.contradicted: Counter[str] = Counter()
        self.topics_without_ids: set[str] = set()
        self._state = state
        self._history = history
        self._variation = variation
        self._by_topic = by_topic
        handlers = state.handlers
        # Handlers that are called for many messages at once run apart from the others.
        self._keeps_transactions = len(handlers) > 1 and any(
            handler.batch is not None or handler.concurrency > 1 for handler in handlers
        )

    async def slices(
        self,
        spans: Sequence[Span],
        positions: Mapping[Partition, Position],
        advanced: Callable[[Partition, int], None],
    ) -> AsyncGenerator[list[OrderEntry], None]:
        """Yield the deliveries of the spans, a batch at a time.

        positions: with the ids of their logs. advanced: called with the offset that follows the records read.
        """
        settings, source = self._state.settings, self._state.source
        batch_max = settings.batch_messages_max
        ends = {span.partition: span.end for span in spans if span.length}
        order = await self._new_order(ends)
        ready: list[OrderEntry] = []
        paused: set[Partition] = set()
        backlog = Backlog()

        def is_short(partition: Partition) -> bool:
            return not backlog.holds(partition) and order.is_low(partition)

        with kafka_errors(settings):
            async for partition, records, following in log_reader.read(source, spans):
                self.messages += len(records)
                backlog.add(partition, records, complete=following >= ends[partition])
                advanced(partition, following)
                while waiting := [other for other in ends if backlog.holds(other) and order.is_low(other)]:
                    for other in waiting:
                        block, complete = backlog.take(other, LOOKAHEAD)
                        order.add(other, await self._entries(other, block, positions), complete=complete)
                    while more := order.take(batch_max):
                        slices, ready = self._cut([*ready, *more])
                        for entries in slices:
                            yield entries
                # A partition that is ahead is paused: the records in memory stay bounded.
                if following < ends[partition] and not is_short(partition):
                    source.pause(partition)
                    paused.add(partition)
                for other in [other for other in paused if is_short(other)]:
                    source.resume(other)
                    paused.discard(other)
        slices, ready = self._cut([*ready, *order.take(order.held)])
        for entries in [*slices, ready] if ready else slices:
            yield entries

    async def _new_order(self, ends: Mapping[Partition, int]) -> AppliedOrder:
        """Return an order with the dead letters that were edited."""
        order = AppliedOrder(
            ends,
            bytes_max=max(1 << 16, self._state.settings.buffer_bytes_max // max(1, len(ends))),
            shift=self._variation.shift,
            by_records=self._variation.by_records,
        )
        self.contradicted = order.contradicted
        edits = self._history.edits(self._state.handlers)
        await fetch_schemas([entry.delivery for entry in edits], self._state.settings)
        for entry in edits:
            order.add_late(entry)
        return order

    def _cut(self, entries: list[OrderEntry]) -> tuple[list[list[OrderEntry]], list[OrderEntry]]:
        """Return what may be settled together, and what waits for more.

        Beside other handlers, a handler of many messages gets what one transaction of a worker gave it.
        """
        batch_max = self._state.settings.batch_messages_max
        if not self._keeps_transactions:
            whole = len(entries) - len(entries) % batch_max
            return [entries[first : first + batch_max] for first in range(0, whole, batch_max)], entries[whole:]
        groups = transactions(entries)
        last = groups[-1] if groups else []
        if len(last) > (_TRANSACTION_MAX if last and last[0].applied_at is not None else batch_max):
            return groups, []
        return groups[:-1], last

    async def _entries(
        self, partition: Partition, records: Sequence[Record], positions: Mapping[Partition, Position]
    ) -> list[OrderEntry]:
        deliveries = [
            Delivery(handler, record) for record in records for handler in self._by_topic.get(partition.topic, ())
        ]
        if not deliveries:
            return []
        await fetch_schemas(deliveries, self._state.settings)
        self.topics_without_ids |= identify(deliveries, positions)
        return await self._history.entries(deliveries)
