"""Fetches records and gives each to the scheduler of its shard.

It fetches only what some shard has room for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from consumer.core.message import Partition, Record
from consumer.core.shard_route import Router
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.logs import event
from consumer.worker.connections import BACKOFF_SECONDS
from consumer.worker.halts import Halts
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.lifetime import Lifetime
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard

POLL_SECONDS = 0.5
_POLL_PAUSED_SECONDS = 0.02  # while a partition waits for room, and may have it soon


class Fetcher:
    """The loop that polls the Kafka client of one worker."""

    def __init__(
        self,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        partitions: Partitions,
        halts: Halts,
        router: Router,
        kafka: KafkaState,
        lifetime: Lifetime,
        on_step: Callable[[str], None],
    ) -> None:
        self._source = source
        self._shards = shards
        self._partitions = partitions
        self._table = partitions.table
        self._halts = halts
        self._router = router
        self._kafka = kafka
        self._lifetime = lifetime
        self._on_step = on_step

    async def run(self) -> None:
        """Poll until the worker stops.

        Waits for Kafka as long as it takes. Raises RouteFault.
        """
        pause = BACKOFF_SECONDS[0]
        while not self._lifetime.is_stopping:
            if not self._partitions.share_room():
                self._partitions.room.clear()
                await self._partitions.room.wait()
                continue
            seconds = _POLL_PAUSED_SECONDS if self._table.waits_for_room else POLL_SECONDS
            try:
                fetched = await self._source.poll(seconds, self._table.offset)
            except LogTruncated as error:
                self._halts.refused(error.partition, out_of_range=True)
                continue
            except KafkaError as error:
                self._kafka.unavailable(error)
                await self._lifetime.pause(pause)
                pause = min(BACKOFF_SECONDS[1], pause * 2)
                continue
            pause = BACKOFF_SECONDS[0]
            for partition, records in fetched.items():
                self._queue(partition, records)
            if fetched:
                self._on_step("fetched")

    def _queue(self, partition: Partition, records: Sequence[Record]) -> None:
        """Give each record to its shard.

        The other shards get only the end offset: the poll held nothing for them.
        """
        if not records:
            return
        start = self._table.advance(partition, records[-1].offset + 1)
        if start is None:
            return  # not positioned yet: these records are fetched again
        end = max(start, records[-1].offset + 1)
        self._halts.went_on(partition, end)
        for shard, of_shard in zip(self._shards, self._router.split(records), strict=True):
            # Records that a shard has no room for are fetched again later, from where that shard is.
            wanted = self._partitions.has_room(shard, partition) and not shard.scheduler.is_full(partition)
            kept, _ = shard.scheduler.add(partition, of_shard, start, end) if wanted else (0, 0)
            if kept:
                event(
                    logging.DEBUG,
                    "fetched",
                    topic=partition.topic,
                    partition=partition.partition,
                    first=of_shard[0].offset,
                    last=of_shard[-1].offset,
                    count=kept,
                )
                shard.starts.wake()
