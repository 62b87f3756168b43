"""A worker process that ends itself at a step: `crash_worker.py TOPIC APP STEP NTH`. Settings come from the environment."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from consumer import App, Tx
from consumer.logs import configure
from consumer.settings import load
from consumer.worker import Worker


class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int


def app_of(topic: str, name: str) -> App:
    """One handler that defers and one that awaits, so that each message has two kinds of effects."""
    app = App(name)

    @app.handler(topic, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, $3)", f"settle {payment.id}", payment.account, payment.amount)
        tx.defer("update accounts set balance = balance + $2 where id = $1", payment.account, payment.amount)

    @app.handler(topic, name="record")
    async def record(payment: Payment, tx: Tx) -> None:
        await tx.execute("insert into effects values ($1, $2, $3)", f"record {payment.id}", payment.account, 0)

    return app


class CrashAt:
    """Counts a step, and ends the process the nth time, as a power cut would."""

    def __init__(self, step: str, nth: int) -> None:
        self._step = step
        self._left = nth

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left == 0:
                os._exit(137)


def main() -> None:
    topic, name, step, nth = sys.argv[1:5]
    settings = load()
    configure("debug", "json")
    asyncio.run(Worker(app_of(topic, name), settings, step=CrashAt(step, int(nth))).run())


if __name__ == "__main__":
    main()
