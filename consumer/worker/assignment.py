"""Opens partitions and gives them up, and reads their positions again.

Positions are read from every shard, for as long as it takes. Limitations: whether a partition is still this worker's is
decided when its position is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from consumer.app import App
from consumer.core.log_identity import PartitionHalt, Position
from consumer.core.message import Partition
from consumer.core.pauses import PauseOrder
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.worker import message_log, start_positions
from consumer.worker.connections import BACKOFF_SECONDS, Connections
from consumer.worker.group_check import GroupCheck
from consumer.worker.halts import Halts
from consumer.worker.lifetime import Lifetime
from consumer.worker.offset_commits import OffsetCommits
from consumer.worker.outbox_relay import OutboxRelay
from consumer.worker.partitions import Partitions
from consumer.worker.registration import register
from consumer.worker.shard import LaneState, Shard
from consumer.worker.subscription import Subscription
from consumer.worker.wait_reports import Reporter

_CONTROL_SECONDS = 2.0  # for a report that runs while partitions are given up
_RELAY_DRAIN_SECONDS = 2.0  # for Kafka's answers to what the outbox has sent
DRAIN_SECONDS_MAX = 20.0  # of a rebalance; below the time that the group waits for its members

Report = Callable[[dict[str, Any]], object]  # returns False for a report that could not be sent


class _Read(NamedTuple):
    """What a shard knows of partitions before they are opened."""

    positions: Mapping[Partition, tuple[Position, PartitionHalt | None]]
    chains: start_positions.Chains
    attempts: start_positions.Attempts
    pauses: Sequence[PauseOrder]
    ends: Mapping[Partition, int]  # of the logs, with several shards


class Assignment:
    """The rebalances of one worker.

    report: called with what the supervisor must know. path: how commands name the App.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        source: KafkaConsumer,
        shards: Sequence[Shard],
        lanes: Sequence[LaneState],
        subscription: Subscription,
        partitions: Partitions,
        halts: Halts,
        connections: Connections,
        commits: OffsetCommits,
        reporters: Mapping[str, Reporter],
        group_check: GroupCheck,
        lifetime: Lifetime,
        report: Report,
        on_step: Callable[[str], None],
        path: str,
        relays: Sequence[OutboxRelay],
    ) -> None:
        self._app = app
        self._settings = settings
        self._source = source
        self._shards = shards
        self._lanes = lanes
        self._subscription = subscription
        self._partitions = partitions
        self._table = partitions.table
        self._halts = halts
        self._connections = connections
        self._commits = commits
        self._reporters = reporters
        self._group_check = group_check
        self._lifetime = lifetime
        self._report = report
        self._on_step = on_step
        self._path = path
        self._relays = relays

    # -- rebalances -------------------------------------------------------------------------------------------------

    async def on_assigned(self, assigned: set[Partition]) -> None:
        """Note which partitions to open.

        Asks no service: the client sends no heartbeat meanwhile, and PostgreSQL may be away.
        """
        self._subscription.joined(self._source.subscribed)
        self._partitions.assign(assigned)
        for relay in self._relays:
            relay.look()
        self._group_check.is_due = True
        self._report(
            {"member": self._source.member_id}
        )  # at once, so that the supervisor can remove it even if it dies before its next heartbeat

    async def on_revoked(self, revoked: set[Partition]) -> None:
        """Finish what is in flight, and forget the rest.

        The next owner reads the rest again.
        """
        if revoked:
            event(logging.INFO, "partitions revoked", count=len(revoked))
            self._on_step("revoked")
        with suppress(Exception):
            await self.drain(min(DRAIN_SECONDS_MAX, self._settings.grace_seconds))

    async def drain(self, seconds: float) -> None:
        """Settle what is in flight, commit offsets, and forget the partitions.

        Lanes take no new batch meanwhile.
        """
        self._partitions.begin_revoke()
        self._halts.forget()
        try:
            await self._wait_for_lanes(seconds)
            await self._commits.commit()
            await asyncio.gather(*(self._finish_report(shard) for shard in self._shards))
        finally:
            self._partitions.finish_revoke()
        for relay in self._relays:
            await relay.drain(_RELAY_DRAIN_SECONDS)

    async def _finish_report(self, shard: Shard) -> None:
        """Update the rows of waiting messages, unless the connection stays busy.

        A report that runs just now is waited for: it may have written what no longer waits.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONTROL_SECONDS), shard.control_lock:
                if shard.control is not None and shard.control.is_usable:
                    reporter = self._reporters[shard.name]
                    await reporter.finish(shard.control.connection, stays=self._lifetime.is_stopping)

    async def _wait_for_lanes(self, seconds: float) -> None:
        waits = [asyncio.create_task(lane.idle.wait()) for lane in self._lanes]
        _, late = await asyncio.wait(waits, timeout=seconds)
        if late:
            event(logging.WARNING, "drain took too long: open transactions are undone", seconds=round(seconds, 1))
            for lane in self._lanes:
                if not lane.idle.is_set() and lane.session is not None:
                    lane.session.close()
            await asyncio.wait(late, timeout=2)
        for task in waits:
            task.cancel()

    # -- positions --------------------------------------------------------------------------------------------------

    async def position_partitions(self, shard: Shard) -> None:
        """Read the position of every assigned partition from a shard.

        Waits for services for as long as it takes. Returns when the worker stops.
        """
        pause = BACKOFF_SECONDS[0]
        while True:
            await shard.positions_wanted.wait()
            if self._lifetime.is_stopping:
                return  # nothing is opened any more; a loop that waits for nothing would block the event loop
            shard.positions_wanted.clear()
            wanted, epoch = self._table.unpositioned(shard.name), self._table.assignment_epoch(shard.name)
            if not wanted:
                continue
            try:
                read = await self._read(shard, wanted)
            except (Outage, KafkaError, TimeoutError, OSError) as error:
                event(logging.WARNING, "positions cannot be read yet", error=describe(error), **shard.label)
                await self._lifetime.pause(pause)
                pause = min(BACKOFF_SECONDS[1], pause * 2)
                shard.positions_wanted.set()
                continue
            if read is None or epoch != self._table.assignment_epoch(shard.name):
                shard.positions_wanted.set()
                continue
            self._open(shard, read)
            if left := len(set(wanted) - set(read.positions)):
                event(logging.WARNING, "partitions wait for their topic or their leader", count=left)
                await self._lifetime.pause(pause)
                pause = min(BACKOFF_SECONDS[1], pause * 2)
                shard.positions_wanted.set()
            else:
                pause = BACKOFF_SECONDS[0]

    async def _read(self, shard: Shard, wanted: list[Partition]) -> _Read | None:
        """Read what a shard knows of partitions; None: ask again."""
        async with shard.control_lock:
            control = await self._connections.control(shard)
            if control is None:
                return None
            topics = {partition.topic for partition in wanted}
            if shard.registered != shard.epoch or not topics <= shard.registered_topics:
                await register(self._app, shard, control)
            positions = await self._read_positions(shard, control, wanted)
            numbers = {handler.number for handler in shard.handlers}
            chains, attempts = await start_positions.restore_queues(control, numbers, positions)
            await start_positions.restore_stops(control, self._halts.unreadable, self._app.name, positions)
            paused = await start_positions.read_pauses(control, self._app.name)
            await control.check_epoch()  # invariant: last, so that everything read before is of this epoch
        # With several shards: another one may have applied what the log holds now, if the route has changed.
        ends = await self._source.log.ends(wanted) if len(self._shards) > 1 else {}
        return _Read(positions, chains, attempts, paused, ends)

    async def _read_positions(
        self, shard: Shard, control: Session, wanted: list[Partition]
    ) -> Mapping[Partition, tuple[Position, PartitionHalt | None]]:
        numbers = {
            topic: [handler.number for handler in handlers if handler.idempotent]
            for topic, handlers in shard.by_topic.items()
        }
        others = {other.installation for other in self._shards if other is not shard}
        positions, changes = await start_positions.read_positions(
            self._source, control, self._app.name, wanted, shard.label, numbers, others
        )
        message_log.log_handler_changes(changes, self._app.name, self._path, shard.label)
        return positions

    def _open(self, shard: Shard, read: _Read) -> None:
        now = time.monotonic()
        self._partitions.pause(shard, read.pauses)
        for partition, (position, stop) in read.positions.items():
            if stop is not None:
                self._halts.halt(shard, partition, stop, position)
                continue
            attempts = {
                delivery: saved._replace(due=now + saved.due)
                for delivery, saved in read.attempts.get(partition, {}).items()
            }
            chains, end = read.chains.get(partition, ()), read.ends.get(partition, 0)
            self._partitions.open(shard, partition, position, chains, attempts, end)
            self._halts.went_on(partition, position.offset)
        event(logging.INFO, "partitions opened", count=len(read.positions), **shard.label)
        self._report({"opened": len(read.positions)})
