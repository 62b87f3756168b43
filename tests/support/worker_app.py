"""The App of `consumer run worker_app:app`.

Topic and name come from the environment.

Some accounts are traps: they do to a worker what a handler should not.
"""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from consumer import App, Retry, Tx

DIES, BLOCKS, HANGS, SLOW, RAISES, SWALLOWS = -1, -2, -3, -4, -5, -6


class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int


app = App(os.environ.get("TEST_APP", "worker-app"))
topic = os.environ.get("TEST_TOPIC", "worker-app")


@app.handler(topic, retry=Retry(attempts=2, base=0.01, cap=0.01))
async def settle(payment: Payment, tx: Tx) -> None:
    match payment.account:
        case -1:
            os._exit(3)
        case -2:
            time.sleep(3600)  # noqa: ASYNC251 - that is the trap
        case -3:
            await asyncio.sleep(3600)
        case -4:
            await asyncio.sleep(0.2)
        case -5:
            raise ValueError(f"secret {payment.id}")
        case -6:
            while True:
                try:
                    await asyncio.sleep(3600)
                except BaseException:
                    continue
    tx.defer("insert into effects values ($1, $2, $3)", f"settle {payment.id}", payment.account, payment.amount)
    tx.defer("update accounts set balance = balance + $2 where id = $1", payment.account, payment.amount)


@app.handler(topic)
async def record(payment: Payment, tx: Tx) -> None:
    await tx.execute("insert into effects values ($1, $2, $3)", f"record {payment.id}", payment.account, 0)


alone = App(os.environ.get("TEST_APP", "worker-app"))  # the same App, of tests that have one handler


@alone.handler(topic, name="settle")
async def settle_alone(payment: Payment, tx: Tx) -> None:
    tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)


renamed = App(os.environ.get("TEST_APP", "worker-app"))  # a later version of `alone`, whose function has another name


@renamed.handler(topic)
async def pay(payment: Payment, tx: Tx) -> None:
    tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)


by_offset = App(os.environ.get("TEST_APP", "worker-app"))  # a later version of `alone` with another rule of message ids


@by_offset.handler(topic, name="settle", message_id="offset")
async def settle_by_offset(payment: Payment, tx: Tx) -> None:
    tx.defer("insert into effects values ($1, $2, $3)", f"again {payment.id}", payment.account, payment.amount)
