"""The application of a live campaign.

Workers run it, and checks and rebuilds replay it. Two topics. `book`, `audit` and `tally` take orders; `cancel` and
`audit` take cancellations, which need their order's row and are retried until it is there. Workers run without
LIVE_MENDED, so orders that say so become dead letters; operators, checks and rebuilds run the repaired code.
LIVE_VERSION=2 has one more handler, `late`.
"""

from __future__ import annotations

import os
from typing import Any
from uuid import UUID

import msgspec

from consumer import App, Message, Retry, Tx

TABLES = """
create table effects (handler text not null, id uuid not null, key text not null, amount bigint not null);  -- no key: doubles show
create table balances (handler text, key text, balance bigint not null, primary key (handler, key));
create table orders (id uuid primary key, amount bigint not null, cancelled boolean not null default false);
create table latest (place text primary key, id uuid not null);  -- the last writer wins, in order of the key
"""
_EFFECT = "insert into effects (handler, id, key, amount) values ($1, $2, $3, $4)"
_BALANCE = """insert into balances values ($1, $2, $3)
    on conflict (handler, key) do update set balance = balances.balance + excluded.balance"""
_LATEST = "insert into latest values ($1, $2) on conflict (place) do update set id = excluded.id"


class Order(msgspec.Struct):
    key: str
    amount: int
    fails: bool = False  # until the code is mended


class Cancellation(msgspec.Struct):
    order: UUID
    key: str


def build(name: str, orders: str, cancellations: str, *, mended: bool, version: int) -> App:
    """Build the App.

    Each replay needs one of its own, because a dry run changes how handlers are called.
    """
    app = App(name)
    retry = Retry(attempts=4, base=0.05, cap=0.5)

    # Mending changes no effect of what was applied before.
    @app.handler(orders, retry=Retry(attempts=2, base=0.05, cap=0.05), version="1")
    async def book(message: Message[Order], tx: Tx) -> None:
        order, id = message.value, _id(message)
        if order.fails and not mended:
            raise ValueError("as the message asks, until the code is fixed")
        tx.defer(_EFFECT, "book", id, order.key, order.amount)
        tx.defer(_BALANCE, "book", order.key, order.amount)
        tx.defer("insert into orders (id, amount) values ($1, $2)", id, order.amount)

    @app.handler(orders, cancellations)
    async def audit(message: Message[dict[str, object]], tx: Tx) -> None:
        key = str(message.value["key"])
        await tx.execute(_EFFECT, "audit", _id(message), key, 0)
        await tx.execute(_LATEST, f"{message.topic}:{message.partition}:{key}", _id(message))

    @app.handler(orders, batch=50)
    async def tally(messages: list[Message[Order]], tx: Tx) -> None:
        await tx.executemany(
            _EFFECT, [("tally", _id(message), message.value.key, message.value.amount) for message in messages]
        )

    @app.handler(cancellations, retry=retry)
    async def cancel(message: Message[Cancellation], tx: Tx) -> None:
        value = await tx.fetchval(
            "update orders set cancelled = true where id = $1 returning true", message.value.order
        )
        if not value:
            raise LookupError("no such order yet")
        tx.defer(_EFFECT, "cancel", _id(message), message.value.key, 0)

    if version == 2:

        @app.handler(orders)
        async def late(message: Message[Order], tx: Tx) -> None:
            tx.defer(_EFFECT, "late", _id(message), message.value.key, message.value.amount)
            tx.defer(_BALANCE, "late", message.value.key, message.value.amount)

    return app


def _id(message: Message[Any]) -> UUID:
    return UUID((dict(message.headers)["message-id"] or b"").decode())


if "LIVE_APP" in os.environ:
    app = build(
        os.environ["LIVE_APP"],
        os.environ["LIVE_ORDERS"],
        os.environ["LIVE_CANCELLATIONS"],
        mended="LIVE_MENDED" in os.environ,
        version=int(os.environ.get("LIVE_VERSION", "1")),
    )
