"""A producer that has every record acknowledged by all replicas in sync."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiokafka import AIOKafkaProducer

from consumer.kafka.client import connection_options, start_client
from consumer.settings import Settings

STOP_SECONDS = 5
_RECORD_BYTES_MAX = 1 << 30  # topics may take more than this client's own limit of 1 MiB; the broker decides


@asynccontextmanager
async def open_producer(settings: Settings, *, idempotent: bool = False) -> AsyncIterator[AIOKafkaProducer]:
    """Yield a producer, and flush it on leaving.

    On leaving, all replicas in sync have acknowledged every record, or an error is raised; what is under way when the block
    raises gets a few seconds. idempotent: retries neither repeat nor reorder records; they never end, so the caller decides
    how long it waits. Raises ServiceUnavailable and Misconfigured.
    """
    producer = await start_client(
        lambda: AIOKafkaProducer(
            **connection_options(settings),
            acks="all",
            linger_ms=5,
            enable_idempotence=idempotent,
            max_request_size=_RECORD_BYTES_MAX,
        ),
        settings,
        settings.wait_seconds,
    )
    try:
        yield producer
        await producer.flush()
    finally:
        with suppress(TimeoutError):
            await asyncio.wait_for(producer.stop(), STOP_SECONDS)
