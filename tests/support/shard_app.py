"""An App with two shards, and a route that the environment chooses.

`python shard_app.py STEP NTH` is a worker that kills itself when it passes a step the nth time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import zlib

import msgspec

from consumer import App, Tx
from consumer.logs import configure
from consumer.settings import load
from consumer.worker.worker import Worker

NAMES = ("east", "west")


class Payment(msgspec.Struct):
    id: str
    amount: int


def by_crc(key: bytes | None) -> str:
    return NAMES[zlib.crc32(key or b"") % 2]


def the_other_way(key: bytes | None) -> str:
    return NAMES[1 - zlib.crc32(key or b"") % 2]


def by_hash(key: bytes | None) -> str:
    return NAMES[hash(key) % 2]


def one_key_moved(key: bytes | None) -> str:
    """As by_crc, but for one key that no probe has."""
    return the_other_way(key) if key == MOVES.encode() else by_crc(key)


def by_chance(key: bytes | None) -> str:
    return random.choice(NAMES) if key == b"trap" else by_crc(key)


def raises(key: bytes | None) -> str:
    return NAMES[int(key)] if key == b"trap" else by_crc(key)


def unknown(key: bytes | None) -> str:
    return "north" if key == b"trap" else by_crc(key)


MOVES = "the-key-that-moves"
ROUTES = {
    route.__name__: route for route in (by_crc, the_other_way, by_hash, one_key_moved, by_chance, raises, unknown)
}


def app_of(name: str, topic: str, route: str, east: str = "env:TEST_EAST", west: str = "env:TEST_WEST") -> App:
    app = App(name, shards={"east": east, "west": west}, route=ROUTES[route])

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into paid (id, amount) values ($1, $2)", payment.id, payment.amount)

    @app.handler(topic)
    async def record(payment: Payment, tx: Tx) -> None:
        await tx.execute("insert into effects values ($1, 0, $2)", payment.id, payment.amount)

    return app


app = app_of(
    os.environ.get("TEST_APP", "shard-app"),
    os.environ.get("TEST_TOPIC", "shard-app"),
    os.environ.get("TEST_ROUTE", "by_crc"),
)


def main() -> None:
    step, left = sys.argv[1], int(sys.argv[2])

    def passed(name: str) -> None:
        nonlocal left
        left -= name == step
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    configure("debug", "json")
    asyncio.run(Worker(app, load(), on_step=passed).run())


if __name__ == "__main__":
    main()
