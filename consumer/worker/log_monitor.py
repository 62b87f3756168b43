"""Notices recreated topics, removed records, lost leaders and open transactions.

Waits for Kafka as long as it takes. Limitations: a log is checked by its ids and its ends, not by its records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from consumer.core.log_identity import HaltReason, ObservedLog, check_log
from consumer.core.message import Partition
from consumer.core.partition_faults import ReadFailure
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.kafka.protocol import Identity
from consumer.logs import describe, event
from consumer.worker.group_check import GroupCheck
from consumer.worker.halts import Halts
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.lifetime import Lifetime
from consumer.worker.partition_table import State
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard
from consumer.worker.subscription import Subscription
from consumer.worker.watchdog import OpenTransactions

INTERVAL_SECONDS = 5.0  # a refused fetch is checked at once
_REFUSED_INTERVAL_SECONDS = 0.5


class LogMonitor:
    """The loop that checks the logs of one worker.

    patience_seconds: how long a producer's transaction may stay open before it is logged.
    """

    def __init__(
        self,
        subscription: Subscription,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        partitions: Partitions,
        halts: Halts,
        group_check: GroupCheck,
        kafka: KafkaState,
        lifetime: Lifetime,
        patience_seconds: float,
    ) -> None:
        self._subscription = subscription
        self._source = source
        self._shards = shards
        self._partitions = partitions
        self._table = partitions.table
        self._halts = halts
        self._group_check = group_check
        self._kafka = kafka
        self._lifetime = lifetime
        self._patience_seconds = patience_seconds
        self._open_transactions = OpenTransactions()

    async def run(self) -> None:
        """Check at every interval, and at once when a fetch was refused."""
        while True:
            with suppress(TimeoutError):
                seconds = min(INTERVAL_SECONDS, self._patience_seconds / 2)
                await asyncio.wait_for(self._halts.check_due.wait(), seconds)
            self._halts.check_due.clear()
            try:
                topics = self._subscription.topics
                identity = await self._source.log.identity(topics)
                self._kafka.available()
                self._kafka.check_topics(topics, identity)
                self._halts.unreadable.refused(identity.refused)
            except (KafkaError, TimeoutError, OSError) as error:
                self._kafka.unavailable(error)
                continue
            if not self._table.has_assignment:
                continue
            try:
                self._halts.retry_unreadable()
                self._check_leaders()
                await self._check_identities(identity)
                await self._group_check.run()
                await self._check_open_transactions()
            except (KafkaError, TimeoutError, OSError) as error:
                event(logging.DEBUG, "the logs cannot be checked now", error=describe(error))
            if self._table.refusals():
                await self._lifetime.pause(_REFUSED_INTERVAL_SECONDS)
                self._halts.check_due.set()

    def _check_leaders(self) -> None:
        """Halt partitions that have had no leader for long.

        The client does not report them.
        """
        leaderless = {
            partition: offset
            for partition in self._table.partitions()
            if self._table.state(partition) is not State.HALTED
            and (offset := self._table.offset(partition)) is not None
            and self._source.is_leaderless(partition)
        }
        for partition in self._kafka.long_leaderless(leaderless, time.monotonic()):
            failure = ReadFailure(HaltReason.BROKER_ERROR, "the partition has no leader", leaderless[partition])
            self._halts.cannot_be_read(partition, failure)

    async def _check_identities(self, identity: Identity) -> None:
        """Halt partitions whose log was replaced, and explain refused fetches."""
        epochs = self._table.assignment_epochs
        refusals = self._table.refusals()
        firsts = await self._source.log.beginnings(list(refusals), partial=True) if refusals else {}
        ends = await self._source.log.ends(list(refusals), partial=True) if refusals else {}
        if epochs != self._table.assignment_epochs:
            return
        for shard in self._shards:
            for partition in shard.scheduler.partitions:
                log = ObservedLog(identity.cluster_id, identity.topics.get(partition.topic))
                if partition in refusals:
                    first, end = firsts.get(partition), ends.get(partition)
                    log = log._replace(first=first, end=end, out_of_range=refusals[partition])
                self._check_log(shard, partition, log, identity, is_refused=partition in refusals)

    def _check_log(
        self, shard: Shard, partition: Partition, log: ObservedLog, identity: Identity, *, is_refused: bool
    ) -> None:
        received = shard.scheduler.received(partition)
        if received is None or partition in self._table.halts(shard.name):
            return
        position = self._table.positions(shard.name)[partition]._replace(offset=received, seen=None)
        stop = check_log(partition, position, log)
        if stop is not None:
            self._halts.halt(shard, partition, stop, position)
        elif is_refused and partition.topic in identity.refused:
            failure = ReadFailure(HaltReason.NOT_ALLOWED, "its user may not see it", received)
            self._halts.cannot_be_read(partition, failure)
        elif is_refused and (log.topic_id is not None or position.topic_id is None):
            # A broker that knew less, or a leader that has just changed.
            self._partitions.accept(partition)

    async def _check_open_transactions(self) -> None:
        """Log open transactions that hold a partition back, and their end."""
        held = {
            partition: offset
            for partition in self._table.partitions()
            if self._table.state(partition) not in (State.HALTED, State.UNPOSITIONED)
            and (offset := self._source.held_back_at(partition)) is not None
        }
        late, freed = self._open_transactions.changes(time.monotonic(), held, self._patience_seconds)
        for partition in late:
            await self._log_open_transaction(partition)
        for topic, number in freed:
            event(logging.INFO, "the open transaction has ended", topic=topic, partition=number)

    async def _log_open_transaction(self, partition: Partition) -> None:
        transaction = await self._source.log.open_transaction(partition)
        if transaction is not None:
            since = datetime.fromtimestamp(transaction.since_ms / 1000, UTC)
            event(
                logging.WARNING,
                "a producer's open transaction holds the partition back",
                topic=partition.topic,
                partition=partition.partition,
                offset=transaction.offset,
                since=since.isoformat(timespec="seconds"),
                do="end the producer, or abort its transaction with Kafka's `kafka-transactions.sh abort`",
            )
