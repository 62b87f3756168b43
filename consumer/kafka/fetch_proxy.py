"""Fetch by topic id, and keep faults of a partition with it.

Stands between aiokafka's fetcher and its client.

Knows the answers to fetches. A partition that the broker refuses, or whose record batches have broken frames, is taken out of
the answer and reported, since the client raises such an error from `getmany` for all partitions, asks again in a busy loop,
or skips the records. What it does not know: what a batch holds; kafka/fetch_faults.py guards its decoding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from aiokafka.errors import for_code
from aiokafka.protocol.fetch import FetchRequest

from consumer.core.log_identity import HaltReason
from consumer.core.message import Partition
from consumer.core.partition_faults import ReadFailure
from consumer.kafka.protocol import FetchById, Unsupported
from consumer.kafka.record_batch import Damage, check

_NONE, _OUT_OF_RANGE, _CORRUPT, _UNKNOWN_TOPIC, _NOT_ALLOWED = 0, 1, 2, 3, 29
_UNSUPPORTED_COMPRESSION = 76
_OTHER_TOPIC = (100, 103)  # unknown topic id, inconsistent topic id
_SHAPE_OF_ANSWER = 11  # the version whose layout the client reads
_METADATA_PAUSE_SECONDS = 0.25
_STABLE_END_AT = 3  # in a partition's part of an answer, from version 4 on


class Listener(Protocol):
    """Receives reports about partitions that a fetch gave nothing of."""

    def refused(self, partition: Partition) -> None:
        """The broker does not have the topic under its id."""

    def failed(self, partition: Partition, failure: ReadFailure) -> None:
        """It cannot be read from this offset on."""

    def delayed(self, partition: Partition, why: str) -> None:
        """The broker cannot give it at the moment."""

    def nothing_new(self, partition: Partition) -> None:
        """It was read to its end."""

    def empty(self, partition: Partition, offset: int) -> None:
        """Nothing of it came from this offset, although there is more."""

    def throttled(self, seconds: float) -> None:
        """The broker gives nothing for so long, because of a quota."""


class Answer(NamedTuple):
    """What the client reads of an answer to a fetch."""

    topics: list[tuple[str, list[tuple[Any, ...]]]]
    API_VERSION: int = _SHAPE_OF_ANSWER
    throttle_time_ms: int = 0


class FetchingById:
    """A client whose fetches name topics by id.

    Everything else goes out unchanged. ids: which topic each partition belongs to, of those that are fetched. A fetch with a partition that has no id goes by
    name.
    """

    def __init__(self, client: Any, ids: Mapping[Partition, UUID], listener: Listener) -> None:
        self._client = client
        self._ids = ids
        self._listener = listener
        self._metadata_asked_at = 0.0
        self._throttled_until: dict[int, float] = {}
        self._is_throttled = False
        self._damaged: dict[Partition, Damage] = {}  # after what was returned last; a broker may refuse to return it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def force_metadata_update(self) -> Any:
        """Update the metadata, but not in a busy loop."""
        now = asyncio.get_running_loop().time()
        if now - self._metadata_asked_at < _METADATA_PAUSE_SECONDS:
            return asyncio.ensure_future(asyncio.sleep(_METADATA_PAUSE_SECONDS))
        self._metadata_asked_at = now
        return self._client.force_metadata_update()

    async def send(self, node: int, request: Any, **options: Any) -> Any:
        """As the client's. Raises KafkaError."""
        if not isinstance(request, FetchRequest):
            return await self._client.send(node, request, **options)
        now = asyncio.get_running_loop().time()
        if (pause := self._throttled_until.get(node, 0.0) - now) > 0:
            await asyncio.sleep(pause)
        answer = await self._fetched(node, request, options)
        if answer.throttle_time_ms > 0:
            seconds = answer.throttle_time_ms / 1000
            self._throttled_until[node] = asyncio.get_running_loop().time() + seconds
            self._listener.throttled(seconds)
        return answer

    async def _fetched(self, node: int, request: FetchRequest, options: Mapping[str, Any]) -> Answer:
        named = self._by_id(request)
        if named is not None:
            topics, names = named
            try:
                response = await self._client.send(node, FetchById(request, topics), **options)
            except Unsupported:
                pass  # nothing was sent: a broker before 3.1
            else:
                return self._screened(request, self._read(response, topics, names))
        response = await self._client.send(node, request, **options)
        throttle_ms = getattr(response, "throttle_time_ms", 0)
        return self._screened(request, Answer(response.topics, response.API_VERSION, throttle_ms))

    def _by_id(self, request: FetchRequest) -> tuple[dict[UUID, list[tuple[int, int, int]]], dict[UUID, str]] | None:
        topics: dict[UUID, list[tuple[int, int, int]]] = {}
        names: dict[UUID, str] = {}
        for topic, partitions in request.topics:
            for partition in partitions:
                id = self._ids.get(Partition(topic, partition[0]))
                if id is None:
                    return None
                topics.setdefault(id, []).append(partition)
                names[id] = topic
        return topics, names

    def _read(
        self, answer: Any, topics: Mapping[UUID, list[tuple[int, int, int]]], names: Mapping[UUID, str]
    ) -> Answer:
        if answer.error:  # of the whole request
            return Answer(
                [
                    (names[id], [(partition[0], answer.error, -1, -1, -1, None, -1, b"") for partition in partitions])
                    for id, partitions in topics.items()
                ],
                throttle_time_ms=answer.throttle_time_ms,
            )
        by_topic: list[tuple[str, list[tuple[Any, ...]]]] = []
        for id, partitions, _ in answer.topics:
            rows = []
            for partition, error, high, stable, start, aborted, preferred, records, _ in partitions:
                pairs = None if aborted is None else [(producer, first) for producer, first, _ in aborted]
                rows.append((partition, error, high, stable, start, pairs, preferred, records or b""))
            by_topic.append((names[id], rows))
        return Answer(by_topic, throttle_time_ms=answer.throttle_time_ms)

    # -- what is wrong stays with its partition -----------------------------------------------------------------------

    def _screened(self, request: FetchRequest, answer: Answer) -> Answer:
        self._is_throttled = answer.throttle_time_ms > 0
        offsets = {
            (topic, partition[0]): partition[1] for topic, partitions in request.topics for partition in partitions
        }
        topics = [
            (topic, [row for fetched in rows if (row := self._sound(topic, fetched, offsets)) is not None])
            for topic, rows in answer.topics
        ]
        return answer._replace(topics=topics)

    def _sound(
        self, topic: str, row: tuple[Any, ...], offsets: Mapping[tuple[str, int], int]
    ) -> tuple[Any, ...] | None:
        """Return what the client may read of a partition, or None."""
        number, error, log = row[0], row[1], row[-1]
        partition = Partition(topic, number)
        if error == _NONE:
            offset = offsets[topic, number]
            if not log:
                if len(row) > _STABLE_END_AT + 1 and 0 <= offset < row[_STABLE_END_AT] and not self._is_throttled:
                    self._listener.empty(partition, offset)
                else:
                    self._listener.nothing_new(partition)
                return row
            size, damage = self._checked(partition, log, offset, row[2])
            if size == 0 and damage is not None and damage.last is not None and damage.last < offset:
                log = log[damage.next_at :]  # the broken batch is before the requested offset
                row = (*row[:-1], log)
                size, damage = check(log, offset, row[2])
            if damage is not None:
                self._damaged[partition] = damage
            if size == 0:
                self._listener.failed(partition, _frame_failure(offset, len(log), damage))
                return None
            return row if size == len(log) else (*row[:-1], log[:size])
        if error == _OUT_OF_RANGE:
            return row
        offset = offsets[topic, number]
        name = for_code(error).__name__
        if error in _OTHER_TOPIC:
            self._listener.refused(partition)
            self.force_metadata_update()
        elif error == _NOT_ALLOWED:
            self._listener.failed(partition, ReadFailure(HaltReason.NOT_ALLOWED, name, offset))
        elif error in (_CORRUPT, _UNSUPPORTED_COMPRESSION) or (
            (damage := self._damaged.get(partition)) is not None and damage.first == offset
        ):
            self._listener.failed(partition, self._broken_at(partition, offset, name))
        else:
            self._listener.delayed(partition, name)
            self.force_metadata_update()
        return None

    def _checked(self, partition: Partition, log: bytes, offset: int, end: int) -> tuple[int, Damage | None]:
        """Check frames, remembering a batch that was broken behind others.

        Alone, such a batch may look sound.
        """
        if self._damaged:
            known = self._damaged.get(partition)
            if known is not None and known.first == offset and log.startswith(known.head):
                return 0, known
        return check(log, offset, end)

    def _broken_at(self, partition: Partition, offset: int, name: str) -> ReadFailure:
        """Return the failure for a batch that the broker itself cannot read.

        It names what was wrong with the batch when it still came behind others.
        """
        damage = self._damaged.get(partition)
        if damage is None or damage.first != offset:
            return ReadFailure(HaltReason.DAMAGED, f"the broker answers {name}", offset, is_brokers=True)
        return ReadFailure(
            HaltReason.DAMAGED, f"{damage.text} (the broker answers {name})", offset, damage.last, is_brokers=True
        )


def _frame_failure(offset: int, size: int, damage: Damage | None) -> ReadFailure:
    if damage is not None:
        return ReadFailure(HaltReason.DAMAGED, damage.text, offset, damage.last)
    return ReadFailure(
        HaltReason.TOO_LARGE,
        f"the broker gives only {size:,} bytes of a larger batch; raise CONSUMER_KAFKA_PARTITION_FETCH_BYTES_MAX",
        offset,
    )
