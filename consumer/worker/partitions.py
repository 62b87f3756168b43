"""Carries out what the partition table decides.

Moves the Kafka client, and opens and closes partitions in the lanes. Every part of the worker that changes what happens
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
from consumer.worker.partition_table import Action, AwaitPosition, PartitionTable, Pause, Resume, Seek
from consumer.worker.shard import LaneState, Shard
from consumer.worker.wait_reports import Reporter


class Partitions:
    """Keeps the table, the Kafka client and the lanes in step.

    room: set when a lane may have room again, so that the fetcher goes on.
    """

    def __init__(
        self,
        table: PartitionTable,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        lanes: Sequence[LaneState],
        reporters: Mapping[str, Reporter],
        settings: Settings,
    ) -> None:
        self.table = table
        self.room = asyncio.Event()
        self._source = source
        self._shards = shards
        self._lanes = lanes
        self._by_shard = {shard.name: [lane for lane in lanes if lane.shard is shard] for shard in shards}
        self._reporters = reporters
        self._messages_max = settings.buffer_messages_max / len(lanes)
        self._bytes_max = settings.buffer_bytes_max / len(lanes)

    # -- lanes ------------------------------------------------------------------------------------------------------

    def lane_of(self, shard: Shard, partition: Partition) -> LaneState | None:
        """Return a partition's lane in a shard; None if not assigned."""
        number = self.table.number(partition)
        if number is None:
            return None
        lanes = self._by_shard[shard.name]
        return lanes[number % len(lanes)]

    def lanes_of(self, partition: Partition) -> list[LaneState]:
        """Return a partition's lanes, one per shard and in their order.

        Empty if the partition is not assigned.
        """
        number = self.table.number(partition)
        return [] if number is None else [lanes[number % len(lanes)] for lanes in self._by_shard.values()]

    def open_lanes_of(self, partition: Partition) -> list[LaneState]:
        """Those lanes of a partition that know its position."""
        return [lane for lane in self.lanes_of(partition) if lane.scheduler.received(partition) is not None]

    def wake_lanes(self) -> None:
        """Wake every lane to look for a batch or a stop."""
        for lane in self._lanes:
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
        for lane in self._lanes:
            for partition in lane.scheduler.partitions:
                lane.scheduler.revoke(partition)
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
        lane = self.lane_of(shard, partition)
        if lane is None:
            return
        self.table.open(shard.name, partition, position, cross_check_below)
        lane.scheduler.assign(partition, position.offset)
        lane.scheduler.restore(partition, chains, attempts)
        self.read_on(partition)

    def reopen(self, lane: LaneState, partition: Partition) -> None:
        """Restart a partition of a lane at its position in PostgreSQL.

        Forgets what was read of it.
        """
        lane.scheduler.revoke(partition)
        self._take(self.table.close(lane.shard.name, partition))
        lane.shard.positions_wanted.set()

    def reopen_lane(self, lane: LaneState) -> None:
        """Reopen every partition of a lane."""
        for partition in lane.scheduler.partitions:
            self.reopen(lane, partition)
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
        for lane in self._by_shard[shard.name]:
            if lane.session is not None and lane.session.epoch != epoch:
                lane.session.close()
            self.reopen_lane(lane)

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
        for lane in self._by_shard[shard.name]:
            lane.scheduler.paused = paused
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
        """Pause lanes whose share of the buffer is used up.

        Returns whether some lane has room.
        """
        serving = [lane for lane in self._lanes if lane.scheduler.partitions]
        for lane in serving:
            messages, size = lane.scheduler.fetched
            # A lane that fell behind resumes only with plenty of room: each time, the log is read again.
            share = 0.5 if len(self._shards) > 1 and not lane.has_room else 1.0
            lane.has_room = messages < self._messages_max * share and size < self._bytes_max * share
        for partition in self.table.partitions():
            self.read_on(partition)
        self._source.set_fetch_wait(short=self.table.waits_for_room)
        return not serving or any(lane.has_room for lane in serving)

    def read_on(self, partition: Partition) -> None:
        """Read a partition on for the lane that is furthest behind.

        Pauses it while no lane has room. With one shard that is where the client is, except after the partition was
        opened. With several, a shard that is away or slow fills its share of the buffer and falls behind, and the log
        is read again from there when it has room: the lanes that are ahead drop what they have had.
        """
        if not self.table.may_be_read(partition):
            return
        wanted = []
        for lane in self.open_lanes_of(partition):
            if lane.scheduler.paused and partition in lane.scheduler.paused:
                lane.scheduler.drop_fetched(partition)  # as below
            elif lane.scheduler.is_full(partition):
                self._reporters[lane.shard.name].log_full(partition)
                lane.scheduler.drop_fetched(partition)  # else it would take the room of the others
            elif lane.has_room:
                wanted.append(lane.scheduler.received(partition) or 0)
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
                case Seek(partition, offset, topic_id):
                    self._source.seek_and_resume(partition, offset, topic_id)
