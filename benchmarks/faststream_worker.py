"""One drain by FastStream, in a process of its own.

`others.py` starts it with the Python that has FastStream. Writes one line of JSON: messages, and the seconds from the
first message to the last COMMIT. Nothing in FastStream recognizes a repeated message, so the handler claims ids itself,
as the loop by hand does, in the transaction that holds the effects.
"""

from __future__ import annotations

import json
import os
import time
import uuid

import asyncpg
import uvloop
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker
from pydantic import BaseModel

INSERT = "insert into effects (id, account, amount) values ($1, $2, $3)"
UPDATE = "update accounts set balance = balance + $2 where id = $1"
CLAIM_ONE = "insert into seen values ($1) on conflict do nothing returning true"
CLAIM = "insert into seen select unnest($1::uuid[]) order by 1 on conflict do nothing returning id"

WANTED = int(os.environ["DRAIN_MESSAGES"])
TOPIC = os.environ["DRAIN_TOPIC"]
broker = KafkaBroker(os.environ["DRAIN_KAFKA"])
app = FastStream(broker)


class Payment(BaseModel):
    id: uuid.UUID
    account: int
    amount: int


class Drain:
    """What was settled, and since when."""

    def __init__(self) -> None:
        self.connection: asyncpg.Connection
        self.begun = 0.0
        self.settled = 0

    def begin(self) -> None:
        self.begun = self.begun or time.perf_counter()

    def settle(self, count: int) -> None:
        self.settled += count
        if self.settled >= WANTED:
            seconds = time.perf_counter() - self.begun
            print(json.dumps({"messages": self.settled, "seconds": seconds}), flush=True)
            app.exit()


drain = Drain()
OPTIONS = {"group_id": f"drain-{uuid.uuid4().hex[:8]}", "auto_offset_reset": "earliest", "ack_policy": AckPolicy.ACK}


async def settle_message(payment: Payment) -> None:
    """One transaction for each message."""
    drain.begin()
    async with drain.connection.transaction():
        if await drain.connection.fetchval(CLAIM_ONE, payment.id):
            await drain.connection.execute(INSERT, payment.id, payment.account, payment.amount)
            await drain.connection.execute(UPDATE, payment.account, payment.amount)
    drain.settle(1)


async def settle_batch(payments: list[Payment]) -> None:
    """One transaction for a batch, by hand: claim, then executemany."""
    drain.begin()
    first = {payment.id: payment for payment in payments}
    async with drain.connection.transaction():
        fresh = [first[row[0]] for row in await drain.connection.fetch(CLAIM, list(first))]
        await drain.connection.executemany(INSERT, [(one.id, one.account, one.amount) for one in fresh])
        await drain.connection.executemany(UPDATE, [(one.account, one.amount) for one in fresh])
    drain.settle(len(payments))


if os.environ["DRAIN_KIND"] == "batch":
    broker.subscriber(TOPIC, batch=True, max_records=2000, **OPTIONS)(settle_batch)
else:
    broker.subscriber(TOPIC, **OPTIONS)(settle_message)


async def main() -> None:
    drain.connection = await asyncpg.connect(os.environ["DRAIN_POSTGRES"])
    await app.run(log_level=40)
    await drain.connection.close()


if __name__ == "__main__":
    uvloop.run(main())
