"""An App whose effects say which version applied them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

import consumer
from consumer import App, Tx

place = Path(consumer.__file__).resolve()
assert place.is_relative_to(Path(os.environ["TEST_VERSION_AT"]).resolve()), place  # else both are one version


class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int


app = App(os.environ["TEST_APP"])


@app.handler(os.environ["TEST_TOPIC"])
async def settle(payment: Payment, tx: Tx) -> None:
    tx.defer("insert into effects values ($1, $2, $3)", payment.id, int(os.environ["TEST_VERSION"]), payment.amount)
    tx.defer("update accounts set balance = balance + $2 where id = $1", payment.account, payment.amount)
