"""Reads at which offsets Kafka has the messages of taps.

A header names the tap. Limitations: knows no order and charges nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from uuid import UUID

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from handlers.shop.view import Place

TAP = "tap"  # the header: what distinguishes two messages of one message id
_KEPT = 10_000
_AGAIN_SECONDS = 0.5


class LogWatch:
    """A reader of topics, without a group.

    places: partition and offset of the newest taps.
    """

    def __init__(self, bootstrap_servers: str, topics: tuple[str, ...]) -> None:
        self.places: OrderedDict[UUID, Place] = OrderedDict()
        self._servers = bootstrap_servers
        self._topics = topics

    async def run(self) -> None:
        """Read until cancelled. A broker that is away is waited for."""
        while True:
            reader = AIOKafkaConsumer(
                *self._topics, bootstrap_servers=self._servers, group_id=None, auto_offset_reset="earliest"
            )
            try:
                await reader.start()
                async for record in reader:
                    self._note(record.partition, record.offset, record.headers)
            except (KafkaError, OSError) as error:
                logging.getLogger("shop").warning("kafka cannot be read: %s", type(error).__name__)
            finally:
                await asyncio.wait_for(reader.stop(), 5)
            await asyncio.sleep(_AGAIN_SECONDS)

    def _note(self, partition: int, offset: int, headers: tuple[tuple[str, bytes], ...]) -> None:
        for name, value in headers:
            if name == TAP:  # of several copies the first one: the relay may send again
                self.places.setdefault(UUID(bytes=value), (partition, offset))
        while len(self.places) > _KEPT:
            self.places.popitem(last=False)
