"""A process that owns a lock, for tests that stop it.

It prints what it holds, writes when it reads a line, and prints how it ended.

On uvloop, as workers are.

`python lock_owner.py REDIS_URL DSN NAME TTL_SECONDS fenced|unfenced`, from the project's directory.
"""

from __future__ import annotations

import asyncio
import sys

import asyncpg
import uvloop
from redis.asyncio import Redis

from consumer.schemes.lock import LateWriter, Lock, LockLost, check_fence


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def main(url: str, dsn: str, name: str, ttl_seconds: float, fenced: bool) -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    connection = await asyncpg.connect(dsn)

    async def write(number: int) -> None:
        """A write that was on its way.

        No cancellation of the block reaches it.
        """
        await orders.readline()
        try:
            async with connection.transaction():
                if fenced:
                    await check_fence(connection, "fences", name, number)
                await connection.execute("insert into writes values ('paused owner', $1)", number)
            say("written")
        except LateWriter:
            say("refused")

    async with Redis.from_url(url) as redis:
        lock = Lock(redis, name, ttl_seconds)
        writing = None
        try:
            async with lock:
                writing = asyncio.create_task(write(lock.number))
                say(f"holding {lock.number}")
                await asyncio.Event().wait()
        except LockLost:
            say(f"lost {lock.lost.is_set()}")
        assert writing is not None
        await writing
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5] == "fenced"))
