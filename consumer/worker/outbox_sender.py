"""Sends the outbox's rows to Kafka.

The producer is replaced after every error. Each output partition has one task, so at most one of its record batches is in
flight. Limitations: an outage of Kafka is waited for as long as it takes; only what Kafka refuses for good stops a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from consumer.core.errors import ConsumerError
from consumer.core.message import Partition
from consumer.kafka.admin import topic_configs
from consumer.kafka.batch_producer import BatchProducer, Refused
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.outbox.send_queues import Row, SendQueues
from consumer.outbox.streams import Stream
from consumer.settings import Settings

Sending = Callable[[Partition, Sequence[Row]], AbstractContextManager[None]]

NO_TOPIC = "the topic does not exist"
_OPEN_SECONDS = 10.0
_DOUBT_SECONDS = 10.0  # without an answer: does the topic still exist?
_LEARN_SECONDS = 1.0  # before a topic's partitions are asked for again
_BACKOFF_SECONDS = (0.1, 5.0)


class OutboxSender:
    """Sends what is in the queues.

    on_stopped: called with a stream that Kafka refuses, and why. wake: set when the queues have room again, or a topic's
    partitions are known.
    """

    def __init__(
        self,
        settings: Settings,
        queues: SendQueues,
        on_stopped: Callable[[Stream, str], None],
        on_step: Callable[[str], None],
        wake: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._queues = queues
        self._on_stopped = on_stopped
        self._on_step = on_step
        self._wake = wake
        self._producer: BatchProducer | None = None
        self._opening: asyncio.Task[None] | None = None
        self._sending: dict[Partition, asyncio.Task[None]] = {}
        self._learning: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._pause = _BACKOFF_SECONDS[0]
        self._is_paused = False
        self._failure: Exception | None = None
        self.sending: Sending | None = None  # what runs around each sending, where something does

    def partitioner(self, topic: str) -> Callable[[bytes | None], int] | None:
        """Return what chooses the partition of a key.

        None while that is not known.
        """
        return self._producer.partitioner(topic) if self._producer is not None else None

    def learn(self, topic: str, streams: list[Stream]) -> None:
        """Ask for a topic's partitions in the background.

        Its streams stop if it does not exist.
        """
        if self._producer is not None and topic not in self._learning:
            self._learning.add(topic)
            self._start(self._learn(self._producer, topic, streams))

    async def _learn(self, producer: BatchProducer, topic: str, streams: list[Stream]) -> None:
        try:
            async with asyncio.timeout(_DOUBT_SECONDS):
                await producer.learn(topic)
        except (Refused, KafkaError, OSError) as error:
            reason = str(error) if isinstance(error, Refused) else NO_TOPIC if await self._is_missing(topic) else ""
            if reason:
                for stream in streams:
                    self._on_stopped(stream, reason)
            else:
                event(logging.WARNING, "the outbox waits for kafka", topic=topic, error=describe(error))
                await asyncio.sleep(_LEARN_SECONDS)
        finally:
            self._learning.discard(topic)
            self._wake.set()

    async def _is_missing(self, topic: str) -> bool:
        with suppress(KafkaError, ConsumerError, OSError):
            return topic not in await topic_configs(self._settings, [topic])
        return False

    # -- sending ------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send whatever waits and may be sent.

        Raises what ended the sending of a partition: its rows stay in flight, and only another process reads them again.
        """
        if self._failure is not None:
            raise self._failure
        if self._is_paused:
            return
        if self._producer is None:
            self._open_producer()
            return
        for partition in self._queues.ready():
            if partition not in self._sending:
                self._sending[partition] = asyncio.create_task(self._send_all(partition))

    async def _send_all(self, partition: Partition) -> None:
        """Send the rows of an output partition, batch after batch."""
        try:
            while (producer := self._producer) is not None and not self._is_paused:
                rows = self._queues.take(partition)
                if not rows:
                    return
                await self._send_batch(producer, partition, rows)
        except Exception as error:  # a fault of ours: Kafka's are handled
            self._failure = error
            self._wake.set()
        finally:
            del self._sending[partition]

    async def _send_batch(self, producer: BatchProducer, partition: Partition, rows: list[Row]) -> None:
        self._on_step("outbox_sending")
        try:
            if self.sending is None:
                await self._until_acknowledged(producer, partition, rows)
            else:
                with self.sending(partition, rows):
                    await self._until_acknowledged(producer, partition, rows)
        except Refused as refused:
            self._refused(partition, refused)
            self._pause = _BACKOFF_SECONDS[0]  # Kafka answers
            self._replace(producer)
        except asyncio.CancelledError:
            self._queues.put_back(partition)
            raise
        except Exception as error:
            self._queues.put_back(partition)
            if producer is self._producer:
                event(logging.WARNING, "the outbox waits for kafka", topic=partition.topic, error=describe(error))
            self._replace(producer)
        else:
            self._pause = _BACKOFF_SECONDS[0]
            self._on_step("outbox_sent")
            self._queues.acknowledged(partition)
            self._wake.set()

    def _refused(self, partition: Partition, refused: Refused) -> None:
        if (
            refused.for_size
            and partition.topic == self._settings.dead_letter_topic
            and self._queues.leave_out(partition)
        ):
            # A copy must not stop those of other dead letters; PostgreSQL keeps the dead letter itself.
            event(
                logging.ERROR,
                "a dead letter cannot be published and is left out; it stays in postgresql",
                topic=partition.topic,
                error=str(refused),
            )
            return
        stream = self._queues.refused(partition, for_size=refused.for_size)
        if stream is not None:
            self._on_stopped(stream, str(refused))

    async def _until_acknowledged(self, producer: BatchProducer, partition: Partition, rows: list[Row]) -> None:
        sending = asyncio.ensure_future(producer.send(partition, rows))
        try:
            while not (await asyncio.wait([sending], timeout=_DOUBT_SECONDS))[0]:
                # The client tries again for as long as the leader may come back: a deleted topic has none.
                asking = asyncio.ensure_future(self._is_missing(partition.topic))
                await asyncio.wait([sending, asking], return_when=asyncio.FIRST_COMPLETED)
                if asking.done() and asking.result() and not sending.done():
                    raise Refused(NO_TOPIC)
                asking.cancel()
            sending.result()
        finally:
            sending.cancel()

    # -- the producer -------------------------------------------------------------------------------------------------

    def _replace(self, producer: BatchProducer) -> None:
        """Open another producer after an error of this one."""
        if producer is self._producer:
            self._producer = None
            self._start(producer.abandon())
            self._open_producer()

    def _open_producer(self) -> None:
        if self._opening is None:
            self._opening = self._start(self._open())

    async def _open(self) -> None:
        try:
            await asyncio.sleep(self._pause if self._pause > _BACKOFF_SECONDS[0] else 0)
            self._pause = min(_BACKOFF_SECONDS[1], self._pause * 2)
            self._producer = await BatchProducer.open(self._settings, _OPEN_SECONDS)
        except (ConsumerError, KafkaError, OSError) as error:
            event(logging.WARNING, "the outbox waits for kafka", error=describe(error))
        finally:
            self._opening = None
        self._wake.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # -- the end ------------------------------------------------------------------------------------------------------

    async def pause(self, seconds: float) -> None:
        """Send nothing more until `resume`, and wait for answers.

        seconds: at most.
        """
        self._is_paused = True
        if self._sending:
            await asyncio.wait(self._sending.values(), timeout=seconds)

    def resume(self) -> None:
        """Send again."""
        self._is_paused = False

    async def close(self) -> None:
        """End every task and the producer."""
        self._is_paused = True
        tasks = [*self._sending.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._producer is not None:
            await self._producer.abandon()
            self._producer = None
