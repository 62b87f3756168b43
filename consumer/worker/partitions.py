"""Carries out what the partition table decides.

Moves the Kafka client, and opens and closes partitions in the schedulers. Every part of the worker that changes what happens
to a partition does it here. Limitations: asks no service; positions come in from assignment.py, and what speaks against
them from halts.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from consumer.core.delivery import SavedAttempts
from consumer.core.log_identity import PartitionHalt, Position
from consumer.core.message import Partition
from consumer.core.pauses import PauseOrder, paused_among
from consumer.kafka.consumer import KafkaConsumer
from consumer.logs import event
from consumer.settings import Settings
from consumer.worker.partition_table import Action, AwaitPosition, PartitionTable, Pause, Resume, Seek, State
from consumer.worker.shard import Shard
from consumer.worker.wait_reports import Reporter


class Partitions:
    """Keeps the table, the Kafka client and the schedulers in step.

    room: set when a shard may have room again, so that the fetcher goes on.
    """

    def __init__(
        self,
        table: PartitionTable,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        reporters: Mapping[str, Reporter],
        settings: Settings,
    ) -> None:
        self.table = table
        self.room = asyncio.Event()
        self._source = source
        self._shards = shards
        self._reporters = reporters
        self._messages_max = settings.buffer_messages_max / len(shards)
        self._bytes_max = settings.buffer_bytes_max / len(shards)

    # -- lanes ------------------------------------------------------------------------------------------------------

    def open_shards_of(self, partition: Partition) -> list[Shard]:
        """Those shards that have given a partition its position."""
        return [shard for shard in self._shards if shard.scheduler.received(partition) is not None]

    def wake_lanes(self) -> None:
        """Wake every lane to look for a batch or a stop."""
        for shard in self._shards:
            for lane in shard.lanes:
                lane.wake.set()

    def wake(self) -> None:
        """Wake the lanes and the fetcher to notice a stop."""
        self.wake_lanes()
        self.room.set()

    # -- assignment -------------------------------------------------------------------------------------------------

    def assign(self, assigned: Iterable[Partition]) -> None:
        """Begin an assignment. Asks no service: the client sends no heartbeat meanwhile."""
        self._take(self.table.assign(assigned))
        for shard in self._shards:
            shard.positions_wanted.set()

    def begin_revoke(self) -> None:
        """Let the lanes take no more batches."""
        self.table.begin_revoke()
        self.wake_lanes()

    def finish_revoke(self) -> None:
        """Forget every partition and what was fetched of it.

        The next owner reads it again.
        """
        for shard in self._shards:
            for partition in shard.scheduler.partitions:
                shard.scheduler.revoke(partition)
        self.table.finish_revoke()
        self.room.set()

    # -- positions --------------------------------------------------------------------------------------------------

    def open(
        self,
        shard: Shard,
        partition: Partition,
        position: Position,
        chains: Iterable[tuple[int, bytes]],
        attempts: Mapping[tuple[int, int], SavedAttempts],
        cross_check_below: int,
    ) -> None:
        """Read a partition on from the position that a shard has.

        chains, attempts: what the shard remembers of its messages.
        """
        if self.table.state(partition) is None:
            return
        self.table.open(shard.name, partition, position, cross_check_below)
        shard.scheduler.assign(partition, position.offset)
        shard.scheduler.restore(partition, chains, attempts)
        self.read_on(partition)

    def reopen(self, shard: Shard, partitions: Iterable[Partition]) -> None:
        """Restart partitions of a shard at their positions in PostgreSQL.

        Forgets what was read of them.
        """
        for partition in partitions:
            shard.scheduler.revoke(partition)
            self._take(self.table.close(shard.name, partition))
        shard.positions_wanted.set()
        self.room.set()

    def new_epoch(self, shard: Shard, epoch: str) -> None:
        """Reopen every partition of a database that began another epoch.

        It is another database, or it went back in time: what is in flight means nothing there.
        """
        event(logging.WARNING, "another epoch of postgresql: positions are read again", epoch=epoch, **shard.label)
        shard.epoch = epoch
        self.table.next_epoch(shard.name)
        if shard.precheck is not None:
            shard.precheck.new_epoch(epoch)
        for lane in shard.lanes:
            if lane.session is not None and lane.session.epoch != epoch:
                lane.session.close()
        self.reopen(shard, shard.scheduler.partitions)

    # -- pauses of operators ----------------------------------------------------------------------------------------

    def pause(self, shard: Shard, pauses: Sequence[PauseOrder]) -> None:
        """Settle nothing new of what operators have paused in a shard.

        The rest goes on. Call it before partitions are opened, too. What is in flight finishes.
        """
        paused = paused_among(pauses, self.table.partitions())
        began, ended = paused - shard.paused, shard.paused - paused
        shard.paused = paused
        self.table.pause_by_operator(frozenset.intersection(*(every.paused for every in self._shards)))
        if not began and not ended:
            return
        shard.scheduler.paused = paused
        for lane in shard.lanes:
            lane.wake.set()
        for partition in began | ended:
            self.read_on(partition)
        self.room.set()
        if began:
            event(logging.INFO, "partitions are paused by an operator", count=len(began), **shard.label)
        if ended:
            event(logging.INFO, "paused partitions go on", count=len(ended), **shard.label)

    @property
    def paused(self) -> frozenset[Partition]:
        """The assigned partitions that are paused in some shard."""
        paused = frozenset[Partition]().union(*(shard.paused for shard in self._shards))
        return paused.intersection(self.table.partitions())

    # -- fetching ---------------------------------------------------------------------------------------------------

    def share_room(self) -> bool:
        """Pause partitions for which no shard has room.

        Returns whether something may be read.
        """
        serving = [shard for shard in self._shards if shard.scheduler.partitions]
        for shard in serving:
            messages, size = shard.scheduler.fetched
            # A shard that fell behind resumes only with plenty of room: each time, the log is read again.
            share = 0.5 if len(self._shards) > 1 and not shard.has_room else 1.0
            shard.has_room = messages < self._messages_max * share and size < self._bytes_max * share
        for partition in self.table.partitions():
            self.read_on(partition)
        self._source.set_fetch_wait(short=self.table.waits_for_room)
        return not serving or any(shard.has_room for shard in serving) or bool(self.table.in_state(State.READING))

    def has_room(self, shard: Shard, partition: Partition) -> bool:
        """Whether records of a partition may wait in a shard.

        Also in a full buffer if none of its records wait and a lane is idle: a slow handler, with its partitions' messages
        in the buffer, stops no other partition.
        """
        return shard.has_room or (shard.starts.has_idle_lane and not shard.scheduler.has_fetched(partition))

    def read_on(self, partition: Partition) -> None:
        """Read a partition on for the shard that is furthest behind.

        Pauses it while no shard has room. With one shard that is where the client is, except after the partition was
        opened. With several, a shard that is away or slow fills its share of the buffer and falls behind, and the log
        is read again from there when it has room: the shards that are ahead drop what they have had.
        """
        if not self.table.may_be_read(partition):
            return
        wanted = []
        for shard in self.open_shards_of(partition):
            scheduler = shard.scheduler
            if scheduler.paused and partition in scheduler.paused:
                scheduler.drop_fetched(partition)  # as below
            elif scheduler.is_full(partition):
                self._reporters[shard.name].log_full(partition)
                scheduler.drop_fetched(partition)  # else it would take the room of the others
            elif self.has_room(shard, partition):
                wanted.append(scheduler.received(partition) or 0)
        action = self.table.want(partition, min(wanted, default=None))
        if action is not None:
            self._take([action])

    # -- refusals and halts -----------------------------------------------------------------------------------------

    def refuse(self, partition: Partition, *, out_of_range: bool) -> bool:
        """Pause a partition whose fetch was refused.

        Returns False if the refusal is of an earlier fetch, and so says nothing.
        """
        actions = self.table.refuse(partition, out_of_range=out_of_range)
        self._take(actions)
        return bool(actions)

    def accept(self, partition: Partition) -> None:
        """Read a partition on whose fetch was refused: nothing speaks against it."""
        self.table.accept(partition)
        self.read_on(partition)

    def halt(self, shard: Shard, partition: Partition, stop: PartitionHalt, position: Position) -> None:
        """Stop fetching a partition; what was read before is still settled."""
        self._take(self.table.halt(shard.name, partition, stop, position))

    def retry(self, partition: Partition) -> None:
        """Read a halted partition again, from where it was."""
        self.table.retry(partition)
        self.read_on(partition)

    def _take(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case AwaitPosition(partition):
                    self._source.pause_until_positioned(partition)
                case Pause(partition):
                    self._source.pause(partition)
                case Resume(partition):
                    self._source.resume(partition)
                    self.room.set()  # the fetcher may sleep, since nothing could be read
                case Seek(partition, offset, topic_id):
                    self._source.seek_and_resume(partition, offset, topic_id)
                    self.room.set()
