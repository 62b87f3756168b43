"""Halts partitions that must not go on, and reads them again later.

A halt lasts until the position is moved; for a partition that cannot be read, until a later attempt reads it.
Limitations: log_monitor.py observes the logs, and the Kafka client reports failed fetches.
"""

from __future__ import annotations

import asyncio
import logging
import time

from consumer.core.log_identity import PartitionHalt, Position
from consumer.core.message import Partition
from consumer.core.partition_faults import ReadFailure
from consumer.logs import event
from consumer.postgres.stopped_partitions import Stops
from consumer.worker.partition_table import State
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard


class Halts:
    """The halted and the refused partitions of one worker.

    check_due: set when a fetch was refused, so that the logs are checked at once. path: how commands name the App.
    """

    def __init__(self, partitions: Partitions, shards: list[Shard], path: str) -> None:
        self.unreadable = Stops([shard.name for shard in shards])
        self.check_due = asyncio.Event()
        self._partitions = partitions
        self._table = partitions.table
        self._shards = shards
        self._path = path

    def refused(self, partition: Partition, *, out_of_range: bool = False) -> None:
        """Note that a fetch was refused; the log monitor finds out why."""
        if self._partitions.refuse(partition, out_of_range=out_of_range):
            self.check_due.set()

    def halt(
        self, shard: Shard, partition: Partition, stop: PartitionHalt, position: Position, *, is_logged: bool = True
    ) -> None:
        """Halt a partition, and log why and what lets it go on."""
        self._partitions.halt(shard, partition, stop, position)
        if is_logged:
            event(
                logging.ERROR,
                "partition stopped",
                why=stop.text,
                topic=partition.topic,
                partition=partition.partition,
                reason=stop.reason.value,
                do=stop.command(self._path, f" --shard {shard.name}" if shard.name else ""),
                **shard.label,
            )

    def cannot_be_read(self, partition: Partition, failure: ReadFailure) -> None:
        """Halt an unreadable partition in every shard; it is retried later."""
        shards = self._partitions.open_shards_of(partition)
        if not shards or self._table.state(partition) is State.HALTED or not self._table.has_assignment:
            return
        stop, is_logged = self.unreadable.failed(partition, failure, time.monotonic())
        for shard in shards:
            received = shard.scheduler.received(partition) or 0
            position = self._table.positions(shard.name)[partition]._replace(offset=received, seen=None)
            self.halt(shard, partition, stop, position, is_logged=is_logged)

    def retry_unreadable(self) -> None:
        """Read partitions again that could not be read and are due."""
        for partition in self.unreadable.due(time.monotonic(), self._table.in_state(State.HALTED)):
            self._partitions.retry(partition)

    def nothing_new(self, partition: Partition) -> None:
        """Note that a fetch at the end of a partition succeeded."""
        if self.unreadable and (offset := self._table.offset(partition)) is not None:
            self.went_on(partition, offset, is_read=True)

    def went_on(self, partition: Partition, offset: int, *, is_read: bool = False) -> None:
        """Note that a partition was read, or moved, to an offset."""
        if self.unreadable and self.unreadable.went_on(partition, offset, is_read=is_read):
            event(logging.INFO, "the partition is read again", topic=partition.topic, partition=partition.partition)

    def forget(self) -> None:
        """Forget unreadable partitions: other workers may own them."""
        self.unreadable.forget()
