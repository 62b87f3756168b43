"""The second stage applies what the first one has published.

`consumer run chaos.downstream:app` runs it.

It has no setting for duplicates. Its tables have no unique key, so that doubles show.
"""

from __future__ import annotations

import os
from uuid import UUID

import msgspec

from consumer import App, Message, Tx

RECEIPT = 'insert into receipts (id, key, source, n, amount, partition, "offset") values ($1, $2, $3, $4, $5, $6, $7)'
BALANCE = """insert into receipt_balances values ($1, $2)
    on conflict (key) do update set balance = receipt_balances.balance + excluded.balance"""


class Receipt(msgspec.Struct):
    source: UUID
    n: int
    key: str
    amount: int


app = App(f"{os.environ.get('CHAOS_APP', 'chaos')}-next")


@app.handler(os.environ.get("CHAOS_OUT") or "chaos-out")
async def receive(message: Message[Receipt], tx: Tx) -> None:
    receipt = message.value
    id = UUID((dict(message.headers)["message-id"] or b"").decode())
    place = (message.partition, message.offset)
    tx.defer(RECEIPT, id, receipt.key, receipt.source, receipt.n, receipt.amount, *place)
    tx.defer(BALANCE, receipt.key, receipt.amount)
