"""Partitions that a worker cannot read, stored for `consumer status`.

Knows one table; core/partition_faults.py decides on the text and on the time of the next attempt. The worker pauses and
resumes partitions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from consumer.core.log_identity import HaltReason, PartitionHalt
from consumer.core.message import Partition
from consumer.core.partition_faults import ReadFailure, UnreadablePartition, halt_of
from consumer.postgres import positions
from consumer.postgres.protocol import Connection

_SAVE = """
insert into consumer.stopped_partitions as s (app, topic, partition, reason, why, "do", first_offset, last_offset)
values ($1, $2, $3, $4, $5, $6, $7, $8)
on conflict (app, topic, partition) do update set reason = excluded.reason, why = excluded.why, "do" = excluded."do",
    first_offset = excluded.first_offset, last_offset = excluded.last_offset,
    since = case when (s.reason, s.first_offset) = (excluded.reason, excluded.first_offset) then s.since else now() end
"""
_DELETE = "delete from consumer.stopped_partitions where (app, topic, partition) = ($1, $2, $3)"
_READ = """
select topic, partition, reason, why, "do", first_offset, last_offset from consumer.stopped_partitions
where app = $1 order by topic, partition
"""


class Stops:
    """The unreadable partitions of one worker."""

    def __init__(self, databases: Sequence[str]) -> None:
        self._troubles: dict[Partition, UnreadablePartition] = {}
        # By database, what it does not have yet: a halt, or None for a partition that continues.
        self._unsaved: dict[str, dict[Partition, UnreadablePartition | None]] = {name: {} for name in databases}
        self._refused: frozenset[str] = frozenset()
        self._refused_unsaved: dict[str, set[str]] = {name: set() for name in databases}

    def __bool__(self) -> bool:
        return bool(self._troubles)

    def failed(self, partition: Partition, failure: ReadFailure, now: float) -> tuple[PartitionHalt, bool]:
        """Record a failure.

        Returns why the partition halts, and whether to log it.
        """
        stop = halt_of(partition, failure)
        trouble = self._troubles.get(partition)
        if trouble is None:
            trouble = self._troubles[partition] = UnreadablePartition(stop, failure.first, now)
        is_logged = trouble.record_failure(stop, failure.first, now)
        if is_logged:
            self._save_later(partition, trouble)
        return stop, is_logged

    def due(self, now: float, partitions: Collection[Partition]) -> list[Partition]:
        """Return which of `partitions` are due for another attempt."""
        return [
            partition
            for partition, trouble in self._troubles.items()
            if partition in partitions and trouble.retry_at <= now
        ]

    def went_on(self, partition: Partition, position: int, *, is_read: bool = False) -> bool:
        """Record that a partition was read, or moved, to `position`.

        Returns whether it was unreadable before. is_read: the broker has answered a fetch from there.
        """
        trouble = self._troubles.get(partition)
        if trouble is None or position < trouble.first or (position == trouble.first and not is_read):
            return False
        del self._troubles[partition]
        self._save_later(partition, None)
        return True

    def forget(self) -> None:
        """Forget all partitions: other workers may own them now.

        Their rows stay.
        """
        self._troubles.clear()

    def refused(self, topics: frozenset[str]) -> None:
        """Record which topics the worker has no right to see now.

        A topic's rows are deleted when a worker that has the right reads it.
        """
        for unsaved in self._refused_unsaved.values():
            unsaved |= topics - self._refused
            unsaved &= topics
        self._refused = topics

    def _save_later(self, partition: Partition, trouble: UnreadablePartition | None) -> None:
        for unsaved in self._unsaved.values():
            unsaved[partition] = trouble

    def has_unsaved(self, database: str) -> bool:
        return bool(self._unsaved[database] or self._refused_unsaved[database])

    async def save(self, database: str, connection: Connection, app: str) -> None:
        """Write what has changed since the last call.

        Raises the driver's errors; then the next call writes it.
        """
        if refused := self._refused_unsaved[database]:
            # Such a topic is not assigned: its partitions are known from their positions.
            for partition, offset in (await positions.of_topics(connection, app, sorted(refused))).items():
                stop = refused_stop(partition, offset)
                await connection.execute(_SAVE, app, *partition, stop.reason.value, stop.text, stop.do, offset, offset)
            refused.clear()
        unsaved = self._unsaved[database]
        for partition, trouble in list(unsaved.items()):
            if trouble is None:
                await connection.execute(_DELETE, app, *partition)
            else:
                stop = trouble.stop
                first, last = stop.missing or (trouble.first, trouble.first)
                await connection.execute(_SAVE, app, *partition, stop.reason.value, stop.text, stop.do, first, last)
            if unsaved.get(partition) is trouble:
                del unsaved[partition]

    async def recall(self, connection: Connection, app: str, partitions: Collection[Partition], now: float) -> None:
        """Read the halts of partitions that are this worker's now."""
        for partition, (stop, first) in (await read(connection, app)).items():
            if partition in partitions and partition not in self._troubles:
                self._troubles[partition] = UnreadablePartition(stop, first, now)


def refused_stop(partition: Partition, offset: int) -> PartitionHalt:
    """Return the halt of a partition that Kafka refuses to show."""
    return halt_of(partition, ReadFailure(HaltReason.NOT_ALLOWED, "its user may not see it", offset))


async def read(connection: Connection, app: str) -> Mapping[Partition, tuple[PartitionHalt, int]]:
    """Return the unreadable partitions of an application.

    Each with the offset where it halted.
    """
    stopped: dict[Partition, tuple[PartitionHalt, int]] = {}
    for topic, partition, reason, why, do, first, last in await connection.fetch(_READ, app):
        missing = (first, last) if do.startswith("--") else None
        stopped[Partition(topic, partition)] = PartitionHalt(HaltReason(reason), why, do, missing), first
    return stopped
