"""Members of a consumer group, and which of them are no workers.

A member that is no worker of ours is assigned partitions, whose messages are then not applied. Workers send a mark when they
join; a member without it counts as a worker if it has their client id.

Limitations: in a group that uses the newer rebalance protocol (KIP-848), for which one foreign member is enough, members are
not named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from aiokafka.errors import KafkaError

from consumer.core.log_identity import CommittedOffset
from consumer.core.message import Partition
from consumer.kafka.admin import open_admin_client
from consumer.settings import Settings

MEMBER_MARK = b"idempotent-consumer"  # sent when a worker joins its group
_REQUEST_SECONDS = 10
_AGAIN_SECONDS = 0.2
_WORKER_CLIENT_ID = "idempotent-consumer"
NEWER_PROTOCOL = "a client with group.protocol=consumer"


class WorkerAssignor(RoundRobinPartitionAssignor):  # type: ignore[misc]
    """The client's default assignor, which marks this member as a worker."""

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        return ConsumerProtocolMemberMetadata(cls.version, list(topics), MEMBER_MARK)


class Group(NamedTuple):
    """Members and commits of a group.

    foreign_members: client id and host of members that are no workers. settled: whether the members are known now.
    """

    foreign_members: tuple[str, ...]
    commits: dict[Partition, CommittedOffset]
    settled: bool


async def describe_group(settings: Settings, group: str) -> Group:
    """Return members and offsets of a group.

    Raises KafkaError or Misconfigured.
    """
    async with open_admin_client(settings) as admin:
        return await asyncio.wait_for(_ask(admin, group), _REQUEST_SECONDS)


async def _ask(admin: Any, group: str) -> Group:
    """Ask the coordinator; wait while the cluster creates the offsets' topic."""
    while True:
        try:
            offsets = await admin.list_consumer_group_offsets(group)
            [answer] = await admin.describe_consumer_groups([group])
            break
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)
    commits = {
        Partition(*partition): CommittedOffset(int(at.offset), at.metadata or "") for partition, at in offsets.items()
    }
    commits = {partition: at for partition, at in commits.items() if at.offset >= 0}
    _, _, state, _, _, members, *_ = answer.groups[0]
    if state == "Dead" and commits:  # it exists, and the classic protocol cannot tell its members
        return Group((NEWER_PROTOCOL,), commits, True)
    foreign_members = tuple(
        sorted(f"{client} at {host}" for _, client, host, sent, *_ in members if not _is_ours(client, sent))
    )
    return Group(foreign_members if state == "Stable" else (), commits, state in ("Stable", "Empty", "Dead"))


def _is_ours(client_id: str, sent: bytes | None) -> bool:
    return (sent or b"").endswith(MEMBER_MARK) or client_id == _WORKER_CLIENT_ID
