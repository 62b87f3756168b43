"""The application that is tormented: `consumer run chaos.application:app`. Two handlers, so two scopes, on a topic and its copy.

What they write has no unique key, so that doubles show. `book` defers its writes, `audit` awaits them. A mutant of
mutants.py takes the place of the real consumer when CHAOS_MUTANT names one.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from uuid import UUID

import msgspec

from chaos import mutants
from consumer import App, Message, Retry, Tx

TABLES = """
create table effects (
    handler text not null, id uuid not null, key text not null, amount bigint not null,
    partition int not null, "offset" bigint not null, topic text not null,
    xid xid8 not null default pg_current_xact_id(), seq bigint generated always as identity
);
create table balances (handler text, key text, balance bigint not null, primary key (handler, key));
create table orders (handler text, topic text, partition int, key text, offsets bigint[] not null, primary key (handler, topic, partition, key));
"""
EFFECT = (
    'insert into effects (handler, id, key, amount, partition, "offset", topic) values ($1, $2, $3, $4, $5, $6, $7)'
)
BALANCE = """insert into balances values ($1, $2, $3)
    on conflict (handler, key) do update set balance = balances.balance + excluded.balance"""
ORDER = """insert into orders values ($1, $2, $3, $4, array[$5::bigint])
    on conflict (handler, topic, partition, key) do update set offsets = orders.offsets || excluded.offsets"""


class Order(msgspec.Struct):
    key: str
    amount: int
    raises: bool = False
    swallows: bool = False
    note: str = ""


app = App(os.environ.get("CHAOS_APP", "chaos"))
topic = os.environ.get("CHAOS_TOPIC", "chaos")
slow_seconds = float(os.environ.get("CHAOS_SLOW", "0"))
retry = Retry(attempts=2, base=float(os.environ.get("CHAOS_RETRY", "0.05")), cap=60)


def _id(message: Message[Order | None]) -> UUID:
    """As its producer gave it, whatever the consumer makes of it."""
    return UUID((dict(message.headers)["message-id"] or b"").decode())


async def _swallow(tx: Tx) -> None:
    """A failed statement that nobody shall hear of."""
    with suppress(Exception):
        await tx.execute("select 1 / 0")


@app.handler(topic, f"{topic}-copy", retry=retry)
async def book(message: Message[Order | None], tx: Tx) -> None:
    order, key = message.value, (message.key or b"").decode()
    if slow_seconds:
        await asyncio.sleep(slow_seconds)
    if order is not None and order.swallows:
        await _swallow(tx)
        return
    if order is not None and order.raises:
        raise ValueError("as told")
    amount = 0 if order is None else order.amount
    where = (message.partition, message.offset, message.topic)
    tx.defer(EFFECT, "book", _id(message), key, amount, *where)
    tx.defer(BALANCE, "book", key, amount)
    tx.defer(ORDER, "book", message.topic, message.partition, key, message.offset)


@app.handler(topic, f"{topic}-copy", retry=retry)
async def audit(message: Message[Order | None], tx: Tx) -> None:
    order, key = message.value, (message.key or b"").decode()
    if order is not None and order.swallows:
        await _swallow(tx)
        return
    if order is not None and order.raises:
        raise ValueError("as told")
    amount = 0 if order is None else order.amount
    where = (message.partition, message.offset, message.topic)
    await tx.execute(EFFECT, "audit", _id(message), key, amount, *where)
    await tx.execute(BALANCE, "audit", key, amount)
    await tx.execute(ORDER, "audit", message.topic, message.partition, key, message.offset)


mutants.install(os.environ.get("CHAOS_MUTANT", ""))
