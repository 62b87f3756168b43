"""Copies records into another topic with their message ids.

A copy keeps its message id, so nothing is applied twice. Uses records and the id rules of handlers, and no ledger.
Bytes, key, headers, timestamp and, within a partition, the order stay. A message without an id of its own is identified
by its offset. Its copy has another offset, so it gets that id as its `message-id` header. After an interruption a
record may be copied twice, which is harmless for the same reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from consumer.core.cloudevents import from_event
from consumer.core.errors import Misconfigured, Unreadable
from consumer.core.handler import Handler
from consumer.core.identity import DefaultId, OffsetId, from_headers, offset_id
from consumer.core.log_identity import Position
from consumer.core.message import Partition, Record
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import read
from consumer.kafka.producer import open_producer
from consumer.settings import Settings


class CopiedPart(NamedTuple):
    """How far one partition is copied.

    next: the next offset. refused: records that this client cannot send, because a header key is not UTF-8, or because
    they have neither key nor value.
    """

    partition: Partition
    next: int
    copied: int
    refused: int


def check(handlers: Sequence[Handler], topics: Sequence[str], target: str) -> None:
    """Raise Misconfigured where a copy would be applied or copied again."""
    if target in topics:
        raise Misconfigured(f"--to {target}: this topic is read; name another one")
    for handler in handlers:
        if isinstance(handler.rule, OffsetId):
            raise Misconfigured(
                f"handler {handler.name!r}: it identifies messages by their offset, so a copy would be applied again; choose a topic that it does not take"
            )


async def republish(
    settings: Settings,
    source: KafkaConsumer,
    spans: Sequence[Span],
    target: str,
    *,
    wanted: Callable[[Record], bool],
    fallback: bool,
    logs: Mapping[Partition, Position],
) -> AsyncIterator[CopiedPart]:
    """Copy the wanted records of the spans; yields after each acknowledged part.

    fallback: give a message without an id the id of its offset, with the salts of `logs`. Raises Misconfigured for a
    target that does not exist, KafkaError and LogTruncated.
    """
    partitions = (await source.log.partitions([target]))[target]
    if not partitions:
        raise Misconfigured(
            f"topic {target!r}: does not exist; first make it, with as many partitions as the one that is read"
        )
    has_all_partitions = len(partitions) > max(span.partition.partition for span in spans)
    async with open_producer(settings, idempotent=True) as producer:
        async for chunk in read(source, spans):
            sending: list[asyncio.Future[object]] = []
            refused = 0
            for record in chunk.records:
                if not wanted(record):
                    continue
                headers = _headers(record, fallback, logs)
                if headers is None or (record.key is None and record.value is None):
                    refused += 1
                    continue
                partition = (
                    record.partition
                    if has_all_partitions
                    else record.partition % len(partitions)
                    if record.key is None
                    else None
                )
                sending.append(
                    await producer.send(
                        target,
                        record.value,
                        key=record.key,
                        partition=partition,
                        headers=headers,
                        timestamp_ms=record.timestamp if record.timestamp >= 0 else None,
                    )
                )
            await asyncio.gather(*sending)
            yield CopiedPart(chunk.partition, chunk.next, len(sending), refused)


def needs_fallback(handlers: Sequence[Handler]) -> bool:
    """Return whether a handler identifies messages without an id by offset."""
    return any(isinstance(handler.rule, DefaultId) for handler in handlers)


def _headers(
    record: Record, fallback: bool, logs: Mapping[Partition, Position]
) -> list[tuple[str, bytes | None]] | None:
    """Return the headers of the copy; None where they cannot be sent."""
    headers = list(record.headers)
    try:
        for key, _ in headers:
            key.encode("utf-8")
    except UnicodeEncodeError:
        return None
    try:
        has_id = from_headers(record, "message-id") or from_event(record)
    except Unreadable:
        return headers  # an id that cannot be read: a dead letter in both topics
    if fallback and not has_id:
        position = logs.get(Partition(record.topic, record.partition))
        id = UUID(
            bytes=offset_id(record, position.salt if position is not None else None)
        )  # as a UUID it keeps its 16 bytes
        headers.append(("message-id", str(id).encode()))
    return headers
