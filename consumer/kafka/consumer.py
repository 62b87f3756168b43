"""Poll, seek, pause and commit, in a consumer group or without one.

Traps of aiokafka 0.14, measured or read in its source, and what is done about them:

- A rebalance runs in the background, is eager, and does not wait for polling: a callback must drain what it revokes.
- `getmany` is never cancelled: that would switch the client's own liveness check off for good. Ours is worker/watchdog.py.
- When `getmany` raises, the records that it had already taken out are gone from the client, and its position may be past
  them. So after any exception every partition is sought back to the next offset that was not received.
- `getmany` raises what is wrong with one partition for all of them. kafka/fetch_faults.py takes that partition out before.
- `commit()` without offsets would commit what was handed out. Offsets are always given.
- It names topics, and a recreated topic has the same name. So fetches name the topic id (kafka/protocol.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from uuid import UUID

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, InvalidSessionTimeoutError, KafkaError, OffsetOutOfRangeError

from consumer.core.errors import Misconfigured
from consumer.core.message import Partition, Record
from consumer.core.partition_faults import ReadFailure
from consumer.kafka import decompression
from consumer.kafka.brokers import Brokers
from consumer.kafka.client import client_id, connection_options, start_client
from consumer.kafka.errors import LogTruncated
from consumer.kafka.fetch_faults import FetchFaults
from consumer.kafka.fetch_proxy import FetchingById
from consumer.kafka.group import WorkerAssignor
from consumer.kafka.internals import ClientControl
from consumer.kafka.log_inspection import LogInspection
from consumer.logs import describe, event
from consumer.settings import Settings

METADATA_SECONDS = 10  # new topics and partitions are noticed within this time
REBALANCE_SECONDS = 60  # how long the group waits for every member to have drained
_COMMIT_SECONDS = 5
_REQUEST_SECONDS = 10
_WAIT_MS, _SHORT_WAIT_MS = 500, 50  # how long a broker holds a fetch that finds nothing

RebalanceCallback = Callable[[set[Partition]], Awaitable[None]]


class KafkaConsumer:
    """One member of a consumer group, or a reader without one."""

    def __init__(
        self,
        settings: Settings,
        group: str | None,
        worker: str | None = None,
        inspect: Callable[[Brokers], LogInspection] = LogInspection,
    ) -> None:
        self._settings = settings
        self._group = group
        self._worker = worker
        self._inspect = inspect
        self._consumer: AIOKafkaConsumer | None = None
        self._started_log: LogInspection | None = None
        self._ids: dict[Partition, UUID] = {}
        self._faults = FetchFaults(settings, client_id(settings, group, worker))

    def _make(self) -> AIOKafkaConsumer:
        settings = self._settings
        session = int(settings.kafka_session_timeout_seconds * 1000)
        return AIOKafkaConsumer(
            **connection_options(settings, self._group, self._worker),
            group_id=self._group,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            exclude_internal_topics=False,  # `takes` decides, in `subscribe`
            session_timeout_ms=session,
            heartbeat_interval_ms=min(int(settings.kafka_heartbeat_seconds * 1000), session // 3),
            rebalance_timeout_ms=REBALANCE_SECONDS * 1000,
            partition_assignment_strategy=(WorkerAssignor,),
            # Full buffers stop the polling for as long as a batch takes; the supervisor notices a member that does nothing.
            max_poll_interval_ms=24 * 3600 * 1000,
            metadata_max_age_ms=METADATA_SECONDS * 1000,
            max_partition_fetch_bytes=settings.kafka_partition_fetch_bytes_max,
            request_timeout_ms=40_000,
            fetch_max_wait_ms=_WAIT_MS,
        )

    async def start(self, wait_seconds: float) -> None:
        """Connect. Raises ServiceUnavailable or Misconfigured."""
        decompression.prepare(self._settings.kafka_batch_decompressed_bytes_max)
        self._consumer = await start_client(self._make, self._settings, wait_seconds)
        self._control = ClientControl(self._consumer)
        self._started_log = self._inspect(Brokers(self._control.client))
        self._faults.connect(self._control, self._started_log)
        self._control.intercept_fetches(
            self._faults.guard, lambda client: FetchingById(client, self._ids, self._faults)
        )

    async def stop(self, timeout_seconds: float) -> None:
        """Leave the group and disconnect, or give up after the timeout."""
        if self._consumer is None:
            return
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        try:
            await asyncio.wait_for(self._consumer.stop(), timeout_seconds)
        except asyncio.CancelledError:
            # Since Python 3.12 the client's own cancelled tasks are raised here: they must not hide the reason of this stop.
            if task is not None and task.cancelling() > cancelled:
                raise
        except Exception:  # noqa: S110 - the connection is gone either way
            pass

    @property
    def consumer(self) -> AIOKafkaConsumer:
        """The client."""
        assert self._consumer is not None, "start() comes first"
        return self._consumer

    @property
    def log(self) -> LogInspection:
        """Questions to the brokers about logs, which the client does not read."""
        assert self._started_log is not None, "start() comes first"
        return self._started_log

    # -- reports ------------------------------------------------------------------------------------------------------

    @property
    def on_refused(self) -> Callable[[Partition], None]:
        """Called with a partition whose topic was recreated.

        The broker does not have the topic under the id of `seek_and_resume`; the partition is paused.
        """
        return self._faults.on_refused

    @on_refused.setter
    def on_refused(self, callback: Callable[[Partition], None]) -> None:
        self._faults.on_refused = callback

    @property
    def on_unreadable(self) -> Callable[[Partition, ReadFailure], None] | None:
        """Called with a paused partition that cannot be read.

        None: `poll` raises PartitionUnreadable.
        """
        return self._faults.on_unreadable

    @on_unreadable.setter
    def on_unreadable(self, callback: Callable[[Partition, ReadFailure], None] | None) -> None:
        self._faults.on_unreadable = callback

    @property
    def on_end_reached(self) -> Callable[[Partition], None]:
        """Called with a partition that was read to its end."""
        return self._faults.on_end_reached

    @on_end_reached.setter
    def on_end_reached(self, callback: Callable[[Partition], None]) -> None:
        self._faults.on_end_reached = callback

    # -- the group ----------------------------------------------------------------------------------------------------

    def subscribe(
        self,
        topics: Sequence[str],
        on_revoked: RebalanceCallback,
        on_assigned: RebalanceCallback,
        takes: Callable[[str], bool] | None = None,
    ) -> None:
        """Join the group.

        A topic that does not exist yet is consumed as soon as it exists. takes: whether to consume a topic, asked for each one of
        the cluster, now and at each refresh of the metadata; then `topics` are not looked at.
        """
        listener = _RebalanceListener(on_revoked, on_assigned)
        if takes is None:
            self.consumer.subscribe(topics=list(topics), listener=listener)
        else:
            self._control.subscribe_matching(takes, listener)

    @property
    def subscribed(self) -> frozenset[str]:
        """The topics with which this member joins the group."""
        return frozenset(self.consumer.subscription())

    def assign(self, partitions: Iterable[Partition]) -> None:
        """Read these partitions, without a group."""
        self.consumer.assign([TopicPartition(*partition) for partition in partitions])

    @property
    def member_id(self) -> str:
        """The member id in the group, empty before the first join."""
        return self._control.member_id

    def is_assigned(self, partition: Partition) -> bool:
        """Whether the client reads a partition."""
        return self._control.is_assigned(partition)

    def is_leaderless(self, partition: Partition) -> bool:
        """Whether the brokers knew no leader of a partition at last."""
        return self._control.is_leaderless(partition)

    # -- records ------------------------------------------------------------------------------------------------------

    async def poll(
        self, timeout_seconds: float, received: Callable[[Partition], int | None]
    ) -> dict[Partition, Sequence[Record]]:
        """Return fetched records by partition, in offset order. Never cancel it.

        received: returns the next offset wanted, for partitions that are being consumed. Raises LogTruncated for a partition
        whose position the log does not hold, and PartitionUnreadable where `on_unreadable` is not set; it is paused then. A
        record with a header key that is not UTF-8 comes as a LogRecord in its place.
        """
        try:
            records = await self.consumer.getmany(timeout_ms=int(timeout_seconds * 1000))
        except OffsetOutOfRangeError as error:
            self._seek_back(received)
            partition, position = next(iter(error.args[0].items()))
            self._control.pause(Partition(*partition))
            raise LogTruncated(Partition(*partition), position) from None
        except InvalidSessionTimeoutError:
            raise Misconfigured(
                f"CONSUMER_KAFKA_SESSION_TIMEOUT_SECONDS={self._settings.kafka_session_timeout_seconds:g}: "
                "Kafka refuses it; choose one between the broker's group.min.session.timeout.ms and group.max.session.timeout.ms"
            ) from None
        except BaseException:
            self._seek_back(received)
            raise
        self._faults.received(records)
        if self._faults.is_pending:
            return await self._faults.recover(records)
        return records  # type: ignore[no-any-return]

    def _seek_back(self, received: Callable[[Partition], int | None]) -> None:
        for partition in self.consumer.assignment():
            offset = received(Partition(*partition))
            if offset is not None:
                self.consumer.seek(partition, offset)

    def pause_until_positioned(self, partition: Partition) -> None:
        """Fetch nothing of a partition until `seek_and_resume`."""
        self._faults.forget(partition)
        self._control.pause(partition)
        self._control.seek(partition, 0)  # any position keeps the client from asking the group's coordinator for one

    def seek_and_resume(self, partition: Partition, offset: int, topic_id: UUID | None = None) -> None:
        """Fetch a partition from an offset.

        topic_id: only of the topic with that id; None: of whatever topic has the name.
        """
        if topic_id is None:
            self._ids.pop(partition, None)
        else:
            self._ids[partition] = topic_id
        self._faults.forget(partition)
        self._control.seek(partition, offset)
        self._control.resume(partition)

    def pause(self, partition: Partition) -> None:
        """Fetch nothing more of a partition, and keep its position."""
        self._faults.end_delay(partition)
        self._control.pause(partition)

    def resume(self, partition: Partition) -> None:
        """Fetch a paused partition again, from where it was."""
        self._faults.end_delay(partition)
        self._control.resume(partition)

    def set_fetch_wait(self, short: bool) -> None:
        """Choose how long a broker holds a fetch that finds nothing.

        The client has one fetch at a time on its way to a broker, and one that finds nothing waits there for half a second. A
        partition that is resumed meanwhile waits as long: where the others were idle, one busy partition was read at
        27,000 messages a second, and is at 60,000 since. So the wait is short while paused partitions are read on soon.
        """
        self._control.set_fetch_wait(_SHORT_WAIT_MS if short else _WAIT_MS)

    # -- offsets ------------------------------------------------------------------------------------------------------

    async def position(self, partition: Partition) -> int | None:
        """Return the next offset, past markers and aborted records."""
        with suppress(IllegalStateError):
            return int(await self.consumer.position(TopicPartition(*partition)))
        return None

    def held_back_at(self, partition: Partition) -> int | None:
        """Return the offset at which an open transaction holds readers back.

        As of the last fetch.
        """
        if self.is_assigned(partition):
            end = self.consumer.highwater(TopicPartition(*partition))
            stable = self.consumer.last_stable_offset(TopicPartition(*partition))
            if end is not None and stable is not None and 0 <= stable < end:
                return int(stable)
        return None

    def end_seen(self, partition: Partition) -> int | None:
        """Return the end of a log for readers.

        As of the last fetch; None before the first one.
        """
        if not self.is_assigned(partition):
            return None
        stable = self.consumer.last_stable_offset(TopicPartition(*partition))
        return int(stable) if stable is not None and stable >= 0 else None

    async def committed(self, partition: Partition) -> int | None:
        """Return the group's committed offset. Raises KafkaError."""
        offset = await asyncio.wait_for(self.consumer.committed(TopicPartition(*partition)), _REQUEST_SECONDS)
        return None if offset is None else int(offset)

    async def committed_with_metadata(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, str]]:
        """Return the group's committed offsets and metadata, in one request. Raises KafkaError."""
        return await self._control.committed_with_metadata(partitions)

    async def commit(self, positions: Mapping[Partition, tuple[int, str]]) -> bool:
        """Copy positions and their metadata to Kafka.

        positions: of partitions that the worker has not given up yet; Kafka checks the generation of the group, not whose they
        are. Best effort: returns False when a rebalance or an outage came between, which is normal.
        """
        if not positions:
            return True
        try:
            await asyncio.wait_for(self._control.commit(positions), _COMMIT_SECONDS)
        except (KafkaError, TimeoutError) as error:
            event(logging.DEBUG, "offset commit failed; positions are in PostgreSQL", error=describe(error))
            return False
        return True


class _RebalanceListener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Hands rebalances to the worker.

    The client logs and swallows exceptions, so the worker's callbacks raise none.
    """

    def __init__(self, on_revoked: RebalanceCallback, on_assigned: RebalanceCallback) -> None:
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._on_revoked({Partition(*partition) for partition in revoked})

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._on_assigned({Partition(*partition) for partition in assigned})
