"""Reports what waits, and obeys the pauses of operators."""

from __future__ import annotations

import asyncio
import logging
import time

from consumer.app import App
from consumer.handler_records import handler_code
from consumer.logs import describe, event
from consumer.postgres import pauses
from consumer.postgres.protocol import Connection
from consumer.worker import wait_reports
from consumer.worker.connections import Connections
from consumer.worker.message_log import MessageLog
from consumer.worker.partitions import Partitions
from consumer.worker.shard import Shard
from consumer.worker.wait_reports import Reporter


class Upkeep:
    """Reports to one shard over the connection beside its lanes.

    While PostgreSQL has too few connections, that one is given up, and pauses are obeyed later.
    """

    def __init__(
        self,
        app: App,
        shard: Shard,
        partitions: Partitions,
        reporter: Reporter,
        connections: Connections,
        message_log: MessageLog,
    ) -> None:
        self._app = app
        self._shard = shard
        self._partitions = partitions
        self._reporter = reporter
        self._connections = connections
        self._message_log = message_log

    async def run(self) -> None:
        """Report at every interval, and read what operators have paused."""
        shard = self._shard
        while True:
            await asyncio.sleep(wait_reports.SECONDS)
            self._message_log.flush()
            if not self._partitions.table.has_assignment or shard.control_lock.locked():
                continue
            control = shard.control
            try:
                async with shard.control_lock:
                    if not shard.crowded_until:
                        control = await self._connections.control(shard)
                    if control is not None and control.is_usable:
                        self._partitions.pause(shard, await pauses.read(control.connection, self._app.name))
                        await self._reporter.report(control.connection)
                        await self._renew_code(control.connection)
                    await self._connections.check_shortage(shard)
            except Exception as error:  # retried later; no message depends on it
                event(logging.DEBUG, "what waits cannot be reported now", error=describe(error), **shard.label)
                if control is not None:
                    control.close()

    async def _renew_code(self, connection: Connection) -> None:
        if time.monotonic() - self._shard.code_recorded_at > handler_code.RENEW_SECONDS:
            await handler_code.record(connection, self._app)
            self._shard.code_recorded_at = time.monotonic()
