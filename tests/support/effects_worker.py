"""A worker whose effects call charge_provider.py, and kill it.

`effects_worker.py TOPIC ASKING_TOPIC APP PORT DIRECTORY`. Settings come from the environment. The field `dies` of an order
names a place at which its worker kills itself, once: before the request, after it, or in the transaction (settled).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import asyncpg
import msgspec

from consumer import App, Call, NotDone, Retry, Tx
from consumer.logs import configure
from consumer.settings import load
from consumer.worker.worker import Worker

BACKDATE = "update consumer.effects set first_at = first_at - interval '2 days' where key = $1"


class Order(msgspec.Struct):
    id: str
    how: str = ""
    dies: str = ""


async def request(port: int, method: str, path: str, key: str, body: bytes = b"") -> tuple[int, str]:
    """Return status and text. Raises NotDone where no connection is made."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        raise NotDone("the provider is down") from None
    try:
        head = f"{method} {path} HTTP/1.1\r\nidempotency-key: {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
        return int(status), (await reader.read()).decode()
    finally:
        writer.close()


def app_of(topic: str, asking_topic: str, name: str, port: int, directory: Path, dsn: str) -> App:
    """Two effects: one that asks what was done, and one that cannot."""
    app = App(name)

    def die_once(order: Order, place: str) -> None:
        if order.dies == place:
            try:
                (directory / order.id).open("x").close()
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    async def charge(order: Order, call: Call) -> str:
        die_once(order, "before")
        if order.how == "forgets":  # as if this call was begun so long ago that the provider forgets its key
            connection = await asyncpg.connect(dsn)
            await connection.execute(BACKDATE, call.key)
            await connection.close()
        status, receipt = await request(
            port, "POST", "/charges", call.key, json.dumps(msgspec.to_builtins(order)).encode()
        )
        die_once(order, "after")
        if status != 200 or order.how == "forgets":
            raise RuntimeError(f"answered {status}")
        return receipt

    async def charged(order: Order, receipt: str, tx: Tx) -> None:
        await tx.execute("insert into charges values ($1, $2)", order.id, receipt)
        die_once(order, "settled")

    async def find(order: Order, call: Call) -> str | None:
        status, receipt = await request(port, "GET", f"/charges/{call.key}", call.key)
        return receipt if status == 200 else None

    retry = Retry(attempts=100, base=0.05, cap=0.5)
    for handler, its_topic in (("charge", topic), ("charge_or_ask", asking_topic)):
        effect = app.effect(
            its_topic, remembers=timedelta(hours=24), name=handler, concurrency=4, timeout=1, retry=retry
        )(charge)
        effect.settled(charged)
    effect.unsure(find)
    return app


def main() -> None:
    topic, asking_topic, name, port, directory, dsn = sys.argv[1:7]
    settings = load()
    configure("debug", "json")
    app = app_of(topic, asking_topic, name, int(port), Path(directory), dsn)
    asyncio.run(Worker(app, settings).run())


if __name__ == "__main__":
    main()
