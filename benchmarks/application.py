"""The handlers that are measured.

For a worker in the benchmark's process and for `consumer run application:app`.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

import msgspec

from consumer import App, Message, Tx

INSERT = "insert into effects values ($1, $2, $3)"
UPDATE = "update accounts set balance = balance + $2 where id = $1"
INSERT_ALL = "insert into effects select * from unnest($1::uuid[], $2::int[], $3::bigint[])"
UPDATE_ALL = """update accounts a set balance = a.balance + u.amount
                from unnest($1::int[], $2::bigint[]) as u(id, amount) where a.id = u.id"""


class Payment(msgspec.Struct):
    id: uuid.UUID
    account: int
    amount: int
    note: str


decode = msgspec.json.Decoder(Payment).decode


async def write_unnest(connection: Any, fresh: list[Payment]) -> None:
    """The effects of many payments in two statements, the balances summed before."""
    columns = [
        [payment.id for payment in fresh],
        [payment.account for payment in fresh],
        [payment.amount for payment in fresh],
    ]
    await connection.execute(INSERT_ALL, *columns)
    sums: dict[int, int] = {}
    for payment in fresh:
        sums[payment.account] = sums.get(payment.account, 0) + payment.amount
    await connection.execute(UPDATE_ALL, sorted(sums), [sums[account] for account in sorted(sums)])


def register(app: App, topic: str, kind: str) -> None:
    """Register the handler of a kind: defer, await, batch, slow or timed."""
    match kind:
        case "defer":

            @app.handler(topic)
            async def defer(payment: Payment, tx: Tx) -> None:
                tx.defer(INSERT, payment.id, payment.account, payment.amount)
                tx.defer(UPDATE, payment.account, payment.amount)

        case "await":

            @app.handler(topic)
            async def awaited(payment: Payment, tx: Tx) -> None:
                await tx.execute(INSERT, payment.id, payment.account, payment.amount)
                await tx.execute(UPDATE, payment.account, payment.amount)

        case "batch":

            @app.handler(topic, batch=5000)
            async def batch(payments: list[Payment], tx: Tx) -> None:
                await write_unnest(tx, payments)

        case "slow":

            @app.handler(topic, concurrency=64)
            async def slow(payment: Payment, tx: Tx) -> None:
                await asyncio.sleep(0.010)  # stands for a call to another service
                tx.defer(INSERT, payment.id, payment.account, payment.amount)
                tx.defer(UPDATE, payment.account, payment.amount)

        case "timed":  # the note says when the message was due; the row says when it was committed

            @app.handler(topic)
            async def timed(message: Message[Payment], tx: Tx) -> None:
                payment = message.value
                tx.defer(
                    "insert into timed values ($1, $2, $3)", payment.id, float(payment.note.strip()), message.partition
                )

        case _:
            raise ValueError(kind)


app = App(os.environ.get("BENCH_APP", "bench"))
if "BENCH_TOPIC" in os.environ:
    register(app, os.environ["BENCH_TOPIC"], os.environ["BENCH_KIND"])
