"""The services that all cases of a run share.

A broker with one producer and one admin, and a server with a database for each case.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from harness import as_worker, migrated, settings_for, until

from consumer import Settings

_TEMPLATE = "verdicts_template"


class Servers:
    """The services of a run.

    kafka: bootstrap servers. admin: address of a database as its owner.
    """

    def __init__(self, kafka: str, admin: str) -> None:
        self.kafka = kafka
        self._server = admin.rsplit("/", 1)[0]
        self._admin = admin

    async def __aenter__(self) -> Servers:
        self._producer = AIOKafkaProducer(bootstrap_servers=self.kafka, linger_ms=0)
        self._client = AIOKafkaAdminClient(bootstrap_servers=self.kafka)
        self._postgres = await asyncpg.connect(self._admin)
        await self._producer.start()
        await self._client.start()
        await self._postgres.execute(f"drop database if exists {_TEMPLATE} with (force)")
        await self._postgres.execute(f"create database {_TEMPLATE}")
        await migrated(f"{self._server}/{_TEMPLATE}", "")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()
        await self._client.close()
        await self._postgres.close()

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """The owner's address of a database of one case, with the ledger."""
        name = f"verdicts_{uuid4().hex[:12]}"
        await self._postgres.execute(f"create database {name} template {_TEMPLATE}")
        try:
            yield f"{self._server}/{name}"
        finally:
            await self._postgres.execute(f"drop database {name} with (force)")

    def settings(self, dsn: str, **more: Any) -> Settings:
        """Settings of a worker on such a database."""
        return settings_for(
            as_worker(dsn), self.kafka, None, kafka_commit_interval_seconds=1, log_level="error", **more
        )

    async def topics(self, partitions: Sequence[int]) -> list[str]:
        """New topics, whose names sort in their order."""
        unique = uuid4().hex[:10]
        names = [f"verdicts-{unique}-{n}" for n in range(len(partitions))]
        await self._client.create_topics([NewTopic(name, n, 1) for name, n in zip(names, partitions, strict=True)])

        async def led() -> bool:
            descriptions = await self._client.describe_topics(names)
            return [
                len([p for p in description["partitions"] if p["leader"] >= 0]) for description in descriptions
            ] == list(partitions)

        await until("the topics to have leaders", led)
        return names

    async def drop(self, topics: Sequence[str]) -> None:
        """Delete topics."""
        await self._client.delete_topics(list(topics))

    async def send(self, records: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Produce records in order: a topic each, and what the producer takes."""
        await asyncio.gather(*[await self._producer.send(topic, **record) for topic, record in records])

    async def behead(self, topic: str, partition: int, offset: int) -> None:
        """Delete the records below an offset."""
        await self._client.delete_records({TopicPartition(topic, partition): RecordsToDelete(offset)})
