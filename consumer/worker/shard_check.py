"""Asks other shards about messages applied before the route changed.

Of a partition with several shards, the messages that the log held when its position was read are asked about once. A
message that another shard holds is not applied again: the worker ends with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from consumer.app import App
from consumer.core.delivery import Batch, Delivery
from consumer.core.shard_route import Router
from consumer.logs import describe, event
from consumer.sharding import shards as shard_registry
from consumer.worker.connections import BACKOFF_SECONDS, Connections
from consumer.worker.lifetime import Lifetime
from consumer.worker.partition_table import PartitionTable
from consumer.worker.shard import LaneState, Shard


class ShardCheck:
    """Compares the shards of one App, and records their keys."""

    def __init__(
        self,
        app: App,
        router: Router,
        shards: Sequence[Shard],
        table: PartitionTable,
        connections: Connections,
        lifetime: Lifetime,
    ) -> None:
        self._app = app
        self._router = router
        self._shards = shards
        self._table = table
        self._connections = connections
        self._lifetime = lifetime

    async def is_in_no_other_shard(self, lane: LaneState, batch: Batch) -> bool:
        """Whether no other shard has applied messages of a batch.

        Waits for a shard that is away. False if the lane's partitions went away meanwhile. Raises RouteFault, which
        ends the worker.
        """
        below = self._table.cross_check_below(lane.shard.name)
        if not below:
            return True
        old = [
            delivery
            for delivery in batch.deliveries
            if delivery.outcome is None
            and delivery.handler.idempotent
            and delivery.record.offset < below.get(delivery.partition, 0)
        ]
        for other in self._shards if old else ():
            if other is lane.shard:
                continue
            there = await self._held_by(other, old, lane)
            here = await self._held_by(lane.shard, there, lane) if there else there
            if here is None or there is None:
                return False
            if strays := [delivery for delivery in there if delivery not in here]:
                raise shard_registry.stray(self._app.name, strays[0], other.name, lane.shard.name)
        return True

    async def _held_by(self, shard: Shard, deliveries: list[Delivery], lane: LaneState) -> list[Delivery] | None:
        """Return deliveries whose same record a shard has claimed.

        None if the lane's partitions went away.
        """
        epoch = self._table.assignment_epoch(lane.shard.name)
        handlers = {handler.name: handler for handler in shard.handlers}
        asked: dict[Delivery, Delivery] = {}
        for delivery in deliveries:
            handler = handlers[delivery.handler.name]  # with its number there
            twin = Delivery(handler, delivery.record, delivery.id, delivery.fingerprint)
            asked[twin] = delivery
        lane.idle.set()  # nothing is in flight
        while epoch == self._table.assignment_epoch(lane.shard.name) and not self._lifetime.is_stopping:
            try:
                async with shard.control_lock:
                    control = await self._connections.control(shard)
                    if control is None:
                        continue
                    standing, _ = await control.existing_claims(list(asked), shard.ids.topics)
            except Exception as error:
                event(logging.WARNING, "waiting for another shard's answer", error=describe(error), **shard.label)
                if shard.control is not None:
                    shard.control.close()
                await self._lifetime.pause(BACKOFF_SECONDS[0])
                continue
            if epoch != self._table.assignment_epoch(lane.shard.name):
                break
            lane.idle.clear()
            return [asked[twin] for twin, claim in standing.items() if claim.same_record]
        return None

    async def record_keys(self, shard: Shard) -> None:
        """Record in a shard which new keys the route sent there.

        Another route is then refused at the next start.
        """
        if shard.name:
            await self._connections.try_with_control(
                shard,
                lambda control: shard_registry.record(self._app, shard.name, self._router, control),
                "keys cannot be recorded now",
            )
