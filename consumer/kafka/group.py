"""Looks at an App's consumer group in Kafka without joining it: members that are no workers, and committed offsets.

A member that is no worker of ours is given partitions, whose messages are then not applied. Workers are recognised by a mark
in what they send when they join (kafka/source.py); those of earlier versions by their client id. Limitations: of a group that uses the newer rebalance
protocol (KIP-848), which one foreign member is enough for, the members are not named.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from consumer.core.log_identity import Committed
from consumer.core.message import Partition
from consumer.kafka.source import MEMBER_MARK, connection_options, started
from consumer.settings import Settings

_REQUEST_SECONDS = 10
_AGAIN_SECONDS = 0.2
_EARLIER_CLIENT_ID = "idempotent-consumer"
NEWER_PROTOCOL = "a client with group.protocol=consumer"


class Group(NamedTuple):
    """strangers: client id and host of members that are no workers. settled: whether members can be told now."""

    strangers: tuple[str, ...]
    commits: dict[Partition, Committed]
    settled: bool


async def look(settings: Settings, group: str) -> Group:
    """Members and offsets of a group, as its coordinator knows them now. Raises KafkaError or Misconfigured."""
    admin = await started(lambda: AIOKafkaAdminClient(**connection_options(settings)), settings, settings.wait_seconds)
    try:
        return await asyncio.wait_for(_ask(admin, group), _REQUEST_SECONDS)
    finally:
        await admin.close()


async def _ask(admin: Any, group: str) -> Group:
    """A cluster that no group has used before creates the topic of the offsets first: that is waited for."""
    while True:
        try:
            offsets = await admin.list_consumer_group_offsets(group)
            [answer] = await admin.describe_consumer_groups([group])
            break
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)
    commits = {Partition(*each): Committed(int(at.offset), at.metadata or "") for each, at in offsets.items()}
    commits = {each: at for each, at in commits.items() if at.offset >= 0}
    _, _, state, _, _, members, *_ = answer.groups[0]
    if state == "Dead" and commits:  # it exists, and the classic protocol cannot tell its members
        return Group((NEWER_PROTOCOL,), commits, True)
    strangers = tuple(
        sorted(f"{client} at {host}" for _, client, host, sent, *_ in members if not _is_ours(client, sent))
    )
    return Group(strangers if state == "Stable" else (), commits, state in ("Stable", "Empty", "Dead"))


def _is_ours(client_id: str, sent: bytes | None) -> bool:
    return (sent or b"").endswith(MEMBER_MARK) or client_id == _EARLIER_CLIENT_ID
