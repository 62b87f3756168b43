"""Sends whole record batches, each of one output partition.

Kafka takes or refuses a record batch as a whole. This is not Kafka's idempotent producer: in aiokafka it stays broken after
some errors (aiokafka#1017), and a refused batch leaves a gap in its sequence. It is not needed either: only one batch of a
partition is in flight, so a lost answer can only repeat that batch, and readers recognize its ids. Limitations: after an
error, abandon the producer and open another one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    BrokerResponseError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import murmur2

from consumer.core.message import Partition, RecordContent
from consumer.kafka.client import connection_options, start_client
from consumer.settings import Settings

BATCH_BYTES = 256 << 10
_STOP_SECONDS = 10.0
_FOR_SIZE = (MessageSizeTooLargeError, RecordListTooLargeError)
_cached_murmur2 = lru_cache(maxsize=20_000)(murmur2)


class Refused(Exception):
    """Kafka does not take these records, now or later.

    for_size: smaller record batches may do.
    """

    def __init__(self, reason: str, *, for_size: bool = False) -> None:
        super().__init__(reason)
        self.for_size = for_size


class BatchProducer:
    """A producer that waits until all in-sync replicas have a batch."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer: Any = producer

    @classmethod
    async def open(cls, settings: Settings, wait_seconds: float) -> Self:
        """Connect. Raises ServiceUnavailable or Misconfigured."""
        return cls(
            await start_client(
                lambda: AIOKafkaProducer(**connection_options(settings), acks="all", max_batch_size=BATCH_BYTES),
                settings,
                wait_seconds,
            )
        )

    def partitioner(self, topic: str) -> Callable[[bytes | None], int] | None:
        """Return what chooses the partition of a key.

        It chooses as Kafka's own clients do. None where the topic's partitions are not known: see `learn`. Records without a
        key go to one random partition.
        """
        partitions = self._producer.client.cluster.partitions_for_topic(topic)
        if not partitions:
            return None
        size = len(partitions)
        without_key = random.randrange(size)  # noqa: S311

        def partition_of(key: bytes | None) -> int:
            return without_key if key is None else (_cached_murmur2(key) & 0x7FFFFFFF) % size

        return partition_of

    async def learn(self, topic: str) -> None:
        """Ask for the partitions of a topic. Raises Refused or KafkaError."""
        try:
            await self._producer.partitions_for(topic)
        except TopicAuthorizationFailedError as error:
            raise Refused(_reason(error)) from None

    async def send(self, partition: Partition, records: Sequence[RecordContent]) -> None:
        """Send a record batch, and wait until it is acknowledged.

        The caller waits for one batch of a partition before it sends the next. Raises Refused, or what a new producer
        may heal.
        """
        builder = self._producer.create_batch()
        for record in records:
            metadata = builder.append(
                timestamp=record.timestamp, key=record.key, value=record.value, headers=record.headers
            )
            if metadata is None:
                raise AssertionError("a record batch is larger than was computed")
        builder.close()
        try:
            future = await self._producer.send_batch(builder, partition.topic, partition=partition.partition)
            await future
        except BrokerResponseError as error:
            if error.retriable:
                raise
            raise Refused(_reason(error), for_size=isinstance(error, _FOR_SIZE)) from None

    async def abandon(self) -> None:
        """Close at once; what is in flight fails."""
        accumulator = self._producer._message_accumulator
        accumulator.fail_all(KafkaError("the producer was abandoned"))
        with suppress(Exception):
            await asyncio.wait_for(self._producer.stop(), _STOP_SECONDS)


def _reason(error: BrokerResponseError) -> str:
    return f"{type(error).__name__}: {error.description.rstrip('.')}"
