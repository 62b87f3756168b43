"""Copies positions to Kafka periodically, and notices positions that were moved.

The positions in PostgreSQL count. Kafka's offsets are a copy for people and their tools, and for a database that has
lost its positions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from consumer.core.log_identity import Position, commit_metadata
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.logs import event
from consumer.worker.connections import Connections
from consumer.worker.halts import Halts
from consumer.worker.partition_table import State
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard
from consumer.worker.shard_check import ShardCheck


class OffsetCommits:
    """Commits the offsets of one worker, and runs other periodic checks."""

    def __init__(
        self,
        app: str,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        partitions: Partitions,
        halts: Halts,
        connections: Connections,
        shard_check: ShardCheck,
        on_step: Callable[[str], None],
        interval_seconds: float,
    ) -> None:
        self._app = app
        self._source = source
        self._shards = shards
        self._partitions = partitions
        self._table = partitions.table
        self._halts = halts
        self._connections = connections
        self._shard_check = shard_check
        self._on_step = on_step
        self._interval_seconds = interval_seconds

    async def run(self) -> None:
        """Commit at every interval. Raises RouteFault."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            if not self._table.has_assignment:
                continue
            await self._skip_markers()
            self._partitions.wake_lanes()
            if not self._table.has_assignment:
                continue
            await self.commit()
            for shard in self._shards:
                await self._check_moved_positions(shard)
                await self._shard_check.record_keys(shard)
                await self._save_unreadable(shard)

    async def commit(self) -> None:
        """Commit the partitions of which something was settled since the last time."""
        moved = self._table.take_moved()
        if not moved:
            return
        self._on_step("before_offset_commit")
        copies = {partition: (self._settled_below(partition), self._note(partition)) for partition in moved}
        if await self._source.commit(copies):
            self._on_step("after_offset_commit")
        else:
            self._table.put_back_moved(moved)

    def _settled_below(self, partition: Partition) -> int:
        """The offset below which a partition is settled in every shard."""
        return min(shard.scheduler.position(partition) for shard in self._shards)

    def _note(self, partition: Partition) -> str:
        """The text beside a committed offset."""
        positions = ((shard.installation, self._table.positions(shard.name).get(partition)) for shard in self._shards)
        return commit_metadata(positions)

    async def _skip_markers(self) -> None:
        """Let the positions pass markers and aborted records.

        The client hands neither out. Without this, the position would stay below those at the end of a log.
        """
        for partition in self._table.in_state(State.READING):
            end = await self._source.position(partition)
            offset = self._table.offset(partition)
            if end is None or offset is None or end <= offset or self._table.state(partition) is not State.READING:
                continue
            for shard in self._shards:
                if self._partitions.has_room(shard, partition):
                    shard.scheduler.add(partition, (), offset, end)
            self._table.advance(partition, end)

    async def _save_unreadable(self, shard: Shard) -> None:
        """Write which partitions cannot be read, for `consumer status`."""
        unreadable = self._halts.unreadable
        if unreadable.has_unsaved(shard.name):
            await self._connections.try_with_control(
                shard,
                lambda control: unreadable.save(shard.name, control.connection, self._app),
                "stopped partitions cannot be written now",
            )

    # -- positions that somebody else has moved ---------------------------------------------------------------------

    async def _check_moved_positions(self, shard: Shard) -> None:
        """Reopen idle partitions whose position was moved.

        The lane that settles something of a partition notices by itself.
        """
        known = self._resting_positions(shard)
        if not known:
            return
        epoch = self._table.assignment_epoch(shard.name)
        stored = await self._connections.try_with_control(
            shard, lambda control: control.positions(self._app, list(known)), "positions cannot be read now"
        )
        if stored is None or epoch != self._table.assignment_epoch(shard.name):
            return
        for partition, position in known.items():
            if self._resting_position(shard, partition) != position:
                continue  # race: a lane has settled something meanwhile
            current = stored.get(partition, position)
            if (current.offset, current.topic_id) != (position.offset, position.topic_id):
                event(logging.WARNING, "positions have moved: reading them again", topic=partition.topic, **shard.label)
                self._partitions.reopen(shard, [partition])

    def _resting_positions(self, shard: Shard) -> dict[Partition, Position]:
        """Return positions of partitions that are halted or idle."""
        resting = {}
        for partition in self._table.partitions():
            if (position := self._resting_position(shard, partition)) is not None:
                resting[partition] = position
        return resting

    def _resting_position(self, shard: Shard, partition: Partition) -> Position | None:
        """Return the last known position of an idle partition; else None."""
        received = shard.scheduler.received(partition)
        if received is None:  # halted before it was opened
            halt = self._table.halts(shard.name).get(partition)
            return halt.position if halt is not None else None
        if shard.scheduler.position(partition) != received:
            return None
        return self._table.positions(shard.name)[partition]._replace(offset=received)
