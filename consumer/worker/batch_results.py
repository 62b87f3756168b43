"""Publishes the result of a committed batch.

It updates the queue, the counts, the log and the pre-check's marks. Nothing here is needed for the guarantee: the
transaction holds what was done, and its positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from consumer.core.delivery import Batch, Delivery
from consumer.core.evidence import Evidence
from consumer.core.shard_route import Router
from consumer.kafka.consumer import KafkaConsumer
from consumer.logs import event
from consumer.postgres.session import Session
from consumer.transaction import id_conflicts
from consumer.transaction.dead_letter_rate import DeadLetterRateLimit
from consumer.transaction.result import CONFLICT, BatchResult, complete, ended_by_handler
from consumer.worker import message_log
from consumer.worker.batch_metrics import BatchMetrics
from consumer.worker.message_log import OFFSET_IDS, MessageLog
from consumer.worker.outbox_relay import OutboxRelay
from consumer.worker.partition_table import PartitionTable
from consumer.worker.shard import LaneState


class BatchResults:
    """Records what the lanes of one worker have settled."""

    def __init__(
        self,
        table: PartitionTable,
        source: KafkaConsumer,
        router: Router,
        dead_letter_rate: DeadLetterRateLimit,
        evidence: Evidence,
        message_log: MessageLog,
        relays: Mapping[str, OutboxRelay],
        metrics: BatchMetrics | None,
    ) -> None:
        self._metrics = metrics
        self._relays = relays  # by the name of their shard
        self._table = table
        self._source = source
        self._router = router
        self._dead_letter_rate = dead_letter_rate
        self._evidence = evidence
        self._message_log = message_log
        self._warned_topics: set[str] = set()

    def warn_of_offset_ids(self, topics: set[str]) -> None:
        """Warn once per topic that message ids are offsets."""
        for topic in topics - self._warned_topics:
            self._warned_topics.add(topic)
            event(logging.WARNING, OFFSET_IDS, topic=topic)

    async def publish(self, lane: LaneState, session: Session, part: Batch, result: BatchResult) -> None:
        """Record what a part of a batch has settled."""
        if result.published and (relay := self._relays.get(lane.shard.name)) is not None:
            relay.committed(session.epoch, result.published)
        complete(lane.shard.scheduler, part, result, time.monotonic())
        if self._metrics is not None:
            self._metrics.settled(lane.shard.name, part, result, time.time())
        self._count(result)
        self._message_log.log_failures(result)
        message_log.log_duplicates(result)
        if lane.shard.name:
            self._router.applied(lane.shard.name, (delivery.record for delivery in result.applied))
        lane.batches += 1
        for update in result.position_updates:
            self._table.settled(lane.shard.name, update.partition, update.next)
        if lane.shard.precheck is not None:
            lane.shard.precheck.mark(result.applied, session.epoch, time.time())
        if any([outcome is CONFLICT for outcome in result.outcomes.values()]):
            await id_conflicts.explain(session.connection, self._source.log, result.outcomes)

    def transaction_failed(self, error: Exception) -> None:
        """Count a transaction that was undone."""
        if self._metrics is not None:
            self._metrics.transaction_failed(error)

    def attempts_failed(self, deliveries: Iterable[Delivery], error: BaseException) -> None:
        """Count failed attempts that are in no result."""
        if self._metrics is not None:
            self._metrics.attempts_failed(deliveries, error)

    def _count(self, result: BatchResult) -> None:
        for handler, (messages, reasons) in ended_by_handler(result.applied, result.outcomes).items():
            self._dead_letter_rate.settled(handler, messages, reasons)
        if self._evidence.is_needed:
            for handler in {delivery.handler.name for delivery in result.applied}:
                self._evidence.succeeded(handler)
