"""What this package uses of aiokafka that is not public.

An upgrade of aiokafka begins here: read each of these again, then raise VERSION. The requests that it does not have are in
kafka/protocol.py, and its bootstrap is corrected in kafka/brokers.py.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.record.memory_records import MemoryRecords

from consumer.core.message import LogRecord, Partition

VERSION = "0.14."
if not aiokafka.__version__.startswith(VERSION):  # the dependency is pinned: this is for those who loosen the pin
    raise ImportError(
        f"aiokafka {aiokafka.__version__}: kafka/internals.py knows the internals of {VERSION}x; install aiokafka=={VERSION}*"
    )

READ_UNCOMMITTED, READ_COMMITTED = 0, 1
_REQUEST_SECONDS = 10

# Wraps the decoded records of a partition; the second argument is the client's reader, with its `next_fetch_offset`.
RecordGuard = Callable[[Partition, Any, Iterator[Any]], Iterator[Any]]


class _Matcher:
    """A pattern of topics, as far as the client asks."""

    def __init__(self, match: Callable[[str], bool]) -> None:
        self.match = match


def to_record(partition: Any, record: Any) -> LogRecord:
    """Convert a record of the client's decoder."""
    topic, number = partition
    return LogRecord(topic, number, record.offset, record.timestamp, record.key, record.value, tuple(record.headers))


class FetchedRecords(OrderedDict[Any, Any]):
    """Fetched records of the client, which yield LogRecords and raise nothing.

    The client's own records are dataclasses of eleven fields: a fifth of a replay's CPU time, and work for the collector of
    cycles.
    """

    def __init__(self, content: Any, guard: RecordGuard) -> None:
        super().__init__(content)
        self._guard = guard

    def __setitem__(self, partition: Any, result: Any) -> None:
        if isinstance(result, FetchResult):
            reader = result._partition_records
            reader._consumer_record = to_record
            reader._records_iterator = self._guard(Partition(*partition), reader, reader._records_iterator)
        super().__setitem__(partition, result)


def batch_reader(partition: Partition, log: bytes, aborted: Any, offset: int) -> Any:
    """Return an iterator over the records of raw batches.

    It begins at the offset and leaves out aborted transactions. When it raises, its `next_fetch_offset` is the first record that was not read.
    """
    reader = PartitionRecords(
        TopicPartition(*partition), MemoryRecords(log), aborted, offset, None, None, True, READ_COMMITTED
    )
    reader._consumer_record = to_record
    return reader


def last_offset_on_stack(trace: TracebackType | None) -> int | None:
    """Return the last offset of the batch whose decoding raised."""
    batch = None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_unpack_records":
            batch = trace.tb_frame.f_locals.get("next_batch")
        trace = trace.tb_next
    try:
        return int(batch.next_offset) - 1 if batch is not None else None
    except Exception:
        return None


class ClientControl:
    """Assigned and paused partitions of a started AIOKafkaConsumer, and their positions."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer

    @property
    def client(self) -> AIOKafkaClient:
        """The client whose connections the consumer uses."""
        return self._consumer._client

    @property
    def member_id(self) -> str:
        """The member id in the group, empty before the first join."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        return getattr(coordinator, "member_id", "") or ""

    def intercept_fetches(self, guard: RecordGuard, proxy: Callable[[Any], Any]) -> None:
        """Send fetches through a proxy, and hand out records through a guard."""
        fetcher = self._consumer._fetcher
        fetcher._records = FetchedRecords(fetcher._records, guard)
        fetcher._client = proxy(fetcher._client)

    def subscribe_matching(self, takes: Callable[[str], bool], listener: ConsumerRebalanceListener) -> None:
        """Subscribe to the topics for which `takes` is true, now and later.

        The client's own patterns match the beginning of a name. It replaces its subscription when other topics match, and
        fails for good if it was asking for the coordinator meanwhile (an assertion in `__coordination_routine`): so it joins
        again in any case.
        """
        state = self._consumer._subscription
        change = state.subscribe_from_pattern

        def changed(topics: Any) -> None:
            change(topics)
            self._consumer._coordinator.request_rejoin()

        state.subscribe_from_pattern = changed
        state.subscribe_pattern(_Matcher(takes), listener)
        self.client.set_topics([])  # all of the cluster, and at once

    async def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """Commit offsets and metadata as a member of the group. Raises KafkaError.

        The consumer's own commit refuses partitions once its subscription was replaced, while they are still being
        drained.
        """
        named = {TopicPartition(*partition): OffsetAndMetadata(*copy) for partition, copy in offsets.items()}
        await self._consumer._coordinator.commit_offsets(None, named)

    def set_fetch_wait(self, milliseconds: int) -> None:
        """Set how long a broker holds a fetch that finds nothing."""
        self._consumer._fetcher._fetch_max_wait_ms = milliseconds

    def is_assigned(self, partition: Partition) -> bool:
        return TopicPartition(*partition) in self._consumer.assignment()

    def is_paused(self, partition: Partition) -> bool:
        return TopicPartition(*partition) in self._consumer.paused()

    # The client raises IllegalStateError for a partition that is not assigned, but an AssertionError between a change of its
    # subscription and the next assignment.

    def pause(self, partition: Partition) -> None:
        """Stop fetching a partition; nothing happens if it is not assigned."""
        if self.is_assigned(partition):
            self._consumer.pause(TopicPartition(*partition))

    def resume(self, partition: Partition) -> None:
        """Fetch a partition again; nothing happens if it is not assigned."""
        if self.is_assigned(partition):
            self._consumer.resume(TopicPartition(*partition))

    def seek(self, partition: Partition, offset: int) -> None:
        """Fetch from an offset next; nothing happens if it is not assigned."""
        if self.is_assigned(partition):
            self._consumer.seek(TopicPartition(*partition), offset)

    def fetch_position(self, partition: Partition) -> int:
        """Return the next offset to fetch of an assigned partition."""
        assignment = self._consumer._subscription.subscription.assignment
        return int(assignment.state_value(TopicPartition(*partition)).position)

    def is_reading_at(self, partition: Partition, offset: int) -> bool:
        """Whether a partition is being read from this offset.

        Otherwise a report about it is out of date.
        """
        topic_partition = TopicPartition(*partition)
        subscription = self._consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or topic_partition not in assignment.tps:
            return False
        state = assignment.state_value(topic_partition)
        return bool(state.has_valid_position and state.position == offset and not state.paused)

    def is_leaderless(self, partition: Partition) -> bool:
        """Whether the brokers knew no leader of a partition at last."""
        return bool(self.client.cluster.leader_for_partition(TopicPartition(*partition)) == -1)

    async def committed_with_metadata(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, str]]:
        """Return the group's committed offsets and metadata, in one request. Raises KafkaError."""
        keys = [TopicPartition(*partition) for partition in partitions]
        committed = await asyncio.wait_for(self._consumer._coordinator.fetch_committed_offsets(keys), _REQUEST_SECONDS)
        return {Partition(*key): (int(commit.offset), commit.metadata or "") for key, commit in committed.items()}
