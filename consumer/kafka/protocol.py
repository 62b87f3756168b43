"""Requests by topic id, which aiokafka 0.14 does not have.

Knows the wire format (Metadata 10, Fetch 13) and the client's classes for it; decides nothing. Why: a recreated topic has the same name and the same offsets, and the client's own requests (Metadata 5, Fetch 11) name
it only. A fetch by id is refused by the broker itself when the topic is another, so no record of another topic is
ever taken for one of this. Brokers know ids since 2.8 and fetch by them since 3.1; older ones, and imitations, raise
`Unsupported` and are asked by name. Sources: Kafka's message definitions (FetchRequest.json, MetadataRequest.json), KIP-516.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any, NamedTuple
from uuid import UUID

from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

Unsupported = (IncompatibleBrokerVersion, NotImplementedError)  # the broker does not know the request
_NOT_ALLOWED = 29
_NOT_SAID, _WRITE = -(2**31), 1 << 4  # of the bits of what is allowed: KIP-430


class _Uuid(AbstractType[UUID]):  # type: ignore[misc]
    @classmethod
    def encode(cls, value: UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> UUID:
        return UUID(bytes=data.read(16))


_TAGS = ("tags", TaggedFields)


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(("node", Int32), ("host", CompactString()), ("port", Int32), ("rack", CompactString()), _TAGS),
        ),
        ("cluster_id", CompactString()),
        ("controller", Int32),
        (
            "topics",
            CompactArray(
                ("error", Int16),
                ("name", CompactString()),
                ("topic_id", _Uuid),
                ("internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("in_sync", CompactArray(Int32)),
                        ("offline", CompactArray(Int32)),
                        _TAGS,
                    ),
                ),
                ("operations", Int32),
                _TAGS,
            ),
        ),
        ("cluster_operations", Int32),
        _TAGS,
    )


class _MetadataStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 10
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString()), _TAGS)),
        ("create", Boolean),
        ("cluster_operations", Boolean),
        ("topic_operations", Boolean),
        _TAGS,
    )


class TopicIds(Request[_MetadataStruct]):  # type: ignore[misc]
    """Asks for the ids of topics; creates none.

    operations: asks also what this Kafka user may do with them.
    """

    API_KEY = 3

    def __init__(self, topics: list[str], *, operations: bool = False) -> None:
        self._topics = topics
        self._operations = operations

    def build(self, request_struct_class: type[_MetadataStruct]) -> _MetadataStruct:
        wanted: list[Any] = [(UUID(int=0), topic, {}) for topic in self._topics]
        return request_struct_class(wanted, False, False, self._operations, {})


def not_writable(answer: Any) -> frozenset[str]:
    """Return the topics that may not be written to.

    answer: of TopicIds with operations. Those that do not exist are not among them. Write includes the right to see a topic.
    """
    return frozenset(
        topic[1]
        for topic in answer.topics
        if topic[0] == _NOT_ALLOWED or (topic[0] == 0 and topic[5] != _NOT_SAID and not topic[5] & _WRITE)
    )


class Identity(NamedTuple):
    """Ids of the cluster and of topics.

    A topic that does not exist is absent. refused: topics that the Kafka user may not see.
    """

    cluster_id: str | None
    topics: Mapping[str, UUID]
    refused: frozenset[str] = frozenset()

    @classmethod
    def read(cls, answer: Any) -> Identity:
        topics = {topic[1]: topic[2] for topic in answer.topics if topic[0] == 0 and topic[2].int}
        refused = frozenset(topic[1] for topic in answer.topics if topic[0] == _NOT_ALLOWED)
        return cls(answer.cluster_id, topics, refused)


class _FetchResponse(Response):  # type: ignore[misc]
    API_KEY = 1
    API_VERSION = 13
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error", Int16),
        ("session_id", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", _Uuid),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error", Int16),
                        ("high_watermark", Int64),
                        ("last_stable_offset", Int64),
                        ("log_start_offset", Int64),
                        ("aborted", CompactArray(("producer_id", Int64), ("first_offset", Int64), _TAGS)),
                        ("preferred_read_replica", Int32),
                        ("records", CompactBytes),
                        _TAGS,
                    ),
                ),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class _FetchStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 1
    API_VERSION = 13
    RESPONSE_TYPE = _FetchResponse
    SCHEMA = Schema(
        ("replica_id", Int32),
        ("max_wait_ms", Int32),
        ("min_bytes", Int32),
        ("max_bytes", Int32),
        ("isolation_level", Int8),
        ("session_id", Int32),
        ("session_epoch", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", _Uuid),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("leader_epoch", Int32),
                        ("offset", Int64),
                        ("last_fetched_epoch", Int32),
                        ("log_start_offset", Int64),
                        ("max_bytes", Int32),
                        _TAGS,
                    ),
                ),
                _TAGS,
            ),
        ),
        ("forgotten", CompactArray(("topic_id", _Uuid), ("partitions", CompactArray(Int32)), _TAGS)),
        ("rack_id", CompactString()),
        _TAGS,
    )


class FetchById(Request[_FetchStruct]):  # type: ignore[misc]
    """A fetch of the client, with ids in the place of names."""

    API_KEY = 1

    def __init__(self, by_name: FetchRequest, topics: Mapping[UUID, list[tuple[int, int, int]]]) -> None:
        self._by_name = by_name
        self._topics = topics

    def build(self, request_struct_class: type[_FetchStruct]) -> _FetchStruct:
        wanted: list[Any] = [
            (id, [(partition, -1, offset, -1, -1, most, {}) for partition, offset, most in partitions], {})
            for id, partitions in self._topics.items()
        ]
        plain = self._by_name
        return request_struct_class(
            -1,
            plain._max_wait_ms,
            plain._min_bytes,
            plain._max_bytes,
            plain._isolation_level,
            0,  # without a session, as the client's own
            -1,
            wanted,
            [],
            plain._rack_id,
            {},
        )
