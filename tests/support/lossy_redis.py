"""A Redis client that loses answers."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis


class LossyRedis(Redis):
    """Executes scripts and loses the answers of the next `losses` ones.

    hangs: wait for ever instead of raising ConnectionError. executed: set when an answer was lost.
    """

    losses = 0
    hangs = False

    def __init__(self, redis: Redis) -> None:
        super().__init__(connection_pool=redis.connection_pool)
        self.executed = asyncio.Event()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # of super(), whose module untyped_calls_exclude does not see
        if args[0] == "EVALSHA" and self.losses:
            self.losses -= 1
            self.executed.set()
            if self.hangs:
                await asyncio.Event().wait()
            raise ConnectionError("the answer was lost")
        return answer
