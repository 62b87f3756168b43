"""Topics and groups, through Kafka's admin API; nothing joins a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.protocol.group import LeaveGroupRequest

from consumer.core.message import Partition
from consumer.kafka.client import connection_options, start_client
from consumer.settings import Settings

_REQUEST_SECONDS = 10
_RETRY_SECONDS = 0.2


@asynccontextmanager
async def open_admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Yield a connected admin client. Raises ServiceUnavailable or Misconfigured."""
    admin = await start_client(
        lambda: AIOKafkaAdminClient(**connection_options(settings)), settings, settings.wait_seconds
    )
    try:
        yield admin
    finally:
        await admin.close()


async def group_offsets(settings: Settings, group: str) -> dict[Partition, int]:
    """Return the offsets that a group has committed. Raises KafkaError or Misconfigured.

    On a cluster that no group has used before, Kafka creates the topic of the offsets first: that is waited for.
    """
    clock = asyncio.get_running_loop().time
    async with open_admin_client(settings) as admin:
        deadline = clock() + settings.wait_seconds
        while True:
            try:
                offsets = await asyncio.wait_for(admin.list_consumer_group_offsets(group), _REQUEST_SECONDS)
                break
            except KafkaError as error:
                if not error.retriable or clock() > deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
    return {Partition(*key): int(committed.offset) for key, committed in offsets.items() if committed.offset >= 0}


async def topic_configs(settings: Settings, topics: Sequence[str]) -> dict[str, dict[str, str | None] | None]:
    """Return the configuration of the topics that exist. Raises KafkaError.

    None stands for a configuration that may not be read.
    """
    async with open_admin_client(settings) as admin:
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
        answers = await asyncio.wait_for(admin.describe_configs(resources), _REQUEST_SECONDS) if resources else []
    by_topic: dict[str, dict[str, str | None] | None] = {}
    for code, _, _, topic, entries in (resource for answer in answers for resource in answer.resources):
        if code != UnknownTopicOrPartitionError.errno:
            by_topic[topic] = None if code else {entry[0]: entry[1] for entry in entries}
    return by_topic


async def is_compacted(settings: Settings, topic: str) -> bool:
    """Whether Kafka keeps only the newest record of each key. Raises KafkaError."""
    configs = (await topic_configs(settings, [topic])).get(topic) or {}
    return "compact" in (configs.get("cleanup.policy") or "")


async def create_topic(settings: Settings, topic: str, partitions: int) -> None:
    """Create a topic with one replica. Raises KafkaError."""
    async with open_admin_client(settings) as admin:
        await admin.create_topics([NewTopic(topic, partitions, 1)])


async def leave_group(settings: Settings, group: str, member_id: str) -> None:
    """Remove a dead process from its group.

    Its partitions move at once. Raises KafkaError or OSError when that fails: then the session timeout does it.
    """
    client = AIOKafkaClient(**connection_options(settings))
    try:
        await client.bootstrap()
        node = await client.coordinator_lookup(CoordinationType.GROUP, group)
        await client.send(node, LeaveGroupRequest(group, member_id), group=ConnectionGroup.COORDINATION)
    finally:
        await client.close()
