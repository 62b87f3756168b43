"""Moves what web applications published into streams, for one database.

The owner of one input partition does it (`outbox.streams.home`), so that a worker that takes the partition over goes on.
Two of them at a time do no harm: rows are moved once, in one transaction. Limitations: sends nothing; the relay does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from consumer.core.message import Partition
from consumer.logs import describe, event
from consumer.outbox.record import Outgoing, StoredStream
from consumer.outbox.streams import INTAKE
from consumer.postgres import dead_letter_copies, outbox_intake
from consumer.postgres.connection import translated_errors
from consumer.postgres.errors import Outage
from consumer.postgres.protocol import Connection
from consumer.postgres.session import Session
from consumer.worker.connections import Connections
from consumer.worker.lifetime import Lifetime
from consumer.worker.partition_table import PartitionTable
from consumer.worker.shard import Shard

# Between two looks: after rows were moved, and at most. Each look without a row doubles the pause.
_PAUSE_SECONDS = (0.05, 1.0)


class OutboxIntake:
    """Moves rows for one worker, over the connection beside its lanes.

    home: the partition whose owner does it. on_moved: called with an epoch and the rows whose COMMIT has returned. dead_letter_topic: where one is
    set, dead letters that a worker of the version before has not published are moved, too.
    """

    def __init__(
        self,
        app: str,
        home: Callable[[], Partition | None],
        shard: Shard,
        table: PartitionTable,
        connections: Connections,
        lifetime: Lifetime,
        on_moved: Callable[[str, Sequence[StoredStream]], None],
        dead_letter_topic: str | None,
    ) -> None:
        self._app = app
        self._home = home
        self._shard = shard
        self._table = table
        self._connections = connections
        self._lifetime = lifetime
        self._on_moved = on_moved
        self._dead_letter_topic = dead_letter_topic

    async def run(self) -> None:
        """Move rows until the worker stops.

        Waits for PostgreSQL for as long as it takes. Raises Misconfigured.
        """
        pause = _PAUSE_SECONDS[1]
        while True:
            await self._lifetime.pause(pause)
            if self._lifetime.is_stopping:
                return  # a loop that waits for nothing would block the event loop
            if not self._table.has_assignment or self._home() not in self._table.partitions():
                pause = _PAUSE_SECONDS[1]
                continue
            try:
                has_moved = await self._move()
            except (Outage, OSError) as error:
                event(logging.WARNING, "the outbox waits for postgresql", error=describe(error), **self._shard.label)
                has_moved = False
            pause = _PAUSE_SECONDS[0] if has_moved else min(_PAUSE_SECONDS[1], pause * 2)

    async def _move(self) -> bool:
        """Move rows, if there are any."""
        async with self._shard.control_lock:
            session = await self._connections.control(self._shard)
            if session is None:
                return False
            try:
                with translated_errors(self._shard.settings):
                    if not await self._is_waiting(session.connection):
                        return False
                    stored = await self._move_some(session)
            except BaseException:
                session.close()  # whatever happened to the transaction: this undoes it, unless it has committed
                raise
        self._on_moved(session.epoch, stored)
        return bool(stored)

    async def _is_waiting(self, connection: Connection) -> bool:
        if await outbox_intake.is_waiting(connection, self._app):
            return True
        return self._dead_letter_topic is not None and await dead_letter_copies.is_left(connection, self._app)

    async def _move_some(self, session: Session) -> Sequence[StoredStream]:
        await session.begin()
        records = await outbox_intake.take(session.connection, self._app)
        if self._dead_letter_topic is not None:
            left = await dead_letter_copies.take_left(session.connection, self._app, self._dead_letter_topic)
            records += [copy.record for copy in left]
        stored: Sequence[StoredStream] = ()
        if records:
            stored = await session.store_outgoing(
                self._app, [Outgoing(record, INTAKE, None, None) for record in records]
            )
            await session.check_epoch()  # in the transaction: a pooler may have led to another server
        await session.commit()
        return stored
