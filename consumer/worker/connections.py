"""Opens connections to the databases, and shares them when they are few.

Each shard has one connection beside its lanes. Limitations: an outage is waited for as long as it takes; it does not
count against a message.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from consumer.core.errors import Misconfigured
from consumer.logs import describe, event
from consumer.postgres import connection_shortage
from consumer.postgres.connection import wait_for
from consumer.postgres.epoch import is_left_behind
from consumer.postgres.errors import NotPrimary, Outage, sqlstate_of
from consumer.postgres.session import Session
from consumer.worker.lifetime import Lifetime
from consumer.worker.message_log import MessageLog
from consumer.worker.partitions import Partitions
from consumer.worker.shard import LaneState, Shard

BACKOFF_SECONDS = (0.1, 5.0)
_TOO_MANY_CONNECTIONS = "53300"
_CROWDED_SECONDS = 0.5

Result = TypeVar("Result")


class Connections:
    """Opens connections for one worker.

    waiting: how many lanes and others wait for PostgreSQL. is_pooled: behind a pooler, the server's free connections
    say nothing.
    """

    def __init__(
        self,
        partitions: Partitions,
        lifetime: Lifetime,
        message_log: MessageLog,
        random: Callable[[], float],
        *,
        is_pooled: bool,
    ) -> None:
        self.waiting = 0
        self._partitions = partitions
        self._lifetime = lifetime
        self._message_log = message_log
        self._random = random
        self._is_pooled = is_pooled

    async def open(self, shard: Shard) -> Session | None:
        """Wait for a connection to the primary; None if the worker stops."""
        pause, logged = BACKOFF_SECONDS[0], ""

        async def attempt(timeout_seconds: float) -> Session | None:
            return None if self._lifetime.is_stopping else await self._open_once(shard, timeout_seconds)

        def after(outage: Outage) -> float:
            nonlocal pause, logged
            cause = outage.__cause__ or outage
            why = str(outage) if isinstance(outage, NotPrimary) else describe(cause)
            if sqlstate_of(cause) == _TOO_MANY_CONNECTIONS:
                self._share(shard)
                pause = min(pause, _CROWDED_SECONDS)
            if why != logged:
                event(logging.WARNING, "waiting for postgresql", error=why, **shard.label)
            logged = why
            seconds, pause = pause, min(BACKOFF_SECONDS[1], pause * 2)
            return seconds * (0.5 + self._random() / 2)

        self.waiting += 1
        try:
            session = await wait_for(attempt, math.inf, after=after, sleep=self._lifetime.pause)
        finally:
            self.waiting -= 1
        if session is not None and logged:
            event(logging.INFO, "postgresql is back", **shard.label)
        return session

    async def _open_once(self, shard: Shard, timeout_seconds: float) -> Session:
        session = await Session.open(shard.settings, timeout_seconds, shard.init)
        if shard.epoch and is_left_behind(session.epoch, shard.epoch):
            session.close()
            raise NotPrimary(
                "an old primary, left behind on its timeline when another server was promoted: stop it, and let the "
                "address lead to the new one (if it is to be the one again: restart the workers)"
            )
        return session

    # -- the connection beside the lanes ----------------------------------------------------------------------------

    async def control(self, shard: Shard) -> Session | None:
        """The connection beside the lanes, under its lock.

        None when the worker stops, and when the shard's positions are to be read again.
        """
        if shard.control is not None and is_left_behind(shard.control.epoch, shard.epoch):
            shard.control.close()
        if shard.control is None or not shard.control.is_usable:
            shard.control = await self.open(shard)
        if shard.control is not None and shard.control.epoch != shard.epoch:
            self._partitions.new_epoch(shard, shard.control.epoch)
            return None
        return shard.control

    async def try_with_control(
        self, shard: Shard, action: Callable[[Session], Awaitable[Result]], problem: str
    ) -> Result | None:
        """Run an optional action over the connection beside the lanes.

        Returns None if that connection was busy or the action failed. problem: the log event of a failure. Raises
        Misconfigured.
        """
        control = shard.control
        if control is None or not control.is_usable or shard.control_lock.locked():
            return None
        try:
            async with shard.control_lock:
                return await action(control)
        except Misconfigured:
            raise
        except Exception as error:  # retried later; nothing depends on it until then
            event(logging.DEBUG, problem, error=describe(error), **shard.label)
            control.close()
            return None

    # -- while the server has few connections -----------------------------------------------------------------------

    def _share(self, shard: Shard) -> None:
        """Give connections back for a while: others wait for one."""
        self._message_log.log_rarely(
            logging.WARNING,
            "postgresql has too few connections: lanes and workers take turns",
            (shard.name,),
            {"do": "raise max_connections, or lower CONSUMER_LANES_MAX or --workers", **shard.label},
        )
        shard.crowded_until = time.monotonic() + connection_shortage.SECONDS

    async def give_back(self, lane: LaneState, *, is_idle: bool) -> None:
        """Close a lane's connection while others wait for one."""
        now = time.monotonic()
        if lane.session is None or (not is_idle and now - lane.opened_at < connection_shortage.HELD_SECONDS_MAX):
            return
        lane.session.close()
        lane.session = None
        if not is_idle:
            lane.idle.set()
            await self._lifetime.pause(_CROWDED_SECONDS * (0.5 + self._random() / 2))

    async def check_shortage(self, shard: Shard) -> None:
        """Give up the connection beside the lanes while connections run out.

        The caller holds the lock of that connection. Raises the driver's errors.
        """
        if shard.control is not None and shard.control.is_usable:
            if not self._is_pooled and await connection_shortage.is_crowded(shard.control.connection):
                self._share(shard)
            if shard.crowded_until > time.monotonic() and not self._partitions.table.unpositioned(shard.name):
                shard.control.close()
        elif shard.crowded_until < time.monotonic() - _CROWDED_SECONDS and shard.crowded_until:
            try:
                shard.control = await Session.open(shard.settings)
            except Outage:
                shard.crowded_until = time.monotonic() + connection_shortage.SECONDS
