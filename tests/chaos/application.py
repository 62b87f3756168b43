"""The application under test: `consumer run chaos.application:app`.

Three handlers, so three scopes, on a topic and its copy. What they write has no unique key, so that doubles show.
`book` defers its writes, `audit` awaits them (unless CHAOS_DEFER is set), and `forms` defers statements that are right
only in the order of the messages: the forms that the oracle tests, too. With CHAOS_VERSION=2 it is the next version of
the application: one more handler, `late`, and other options. With CHAOS_OUT `book` publishes to the topic of downstream.py. CHAOS_MUTANT names a mutant of mutants.py that replaces
the real consumer.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from uuid import NAMESPACE_OID, UUID, uuid5

import msgspec

from chaos import mutants
from consumer import App, Message, Retry, RunAgain, Tx

TABLES = """
create table effects (
    handler text not null, id uuid not null, key text not null, amount bigint not null,
    partition int not null, "offset" bigint not null, topic text not null,
    xid xid8 not null default pg_current_xact_id(), seq bigint generated always as identity
);
create table balances (handler text, key text, balance bigint not null, primary key (handler, key));
create table tickets (number bigint generated always as identity primary key, id uuid not null);
create table ticket_lines (number bigint not null, id uuid not null);   -- by currval: of the ticket just inserted
create table stock (key text not null, quantity bigint not null);       -- an UPDATE, then an INSERT where it met no row
create table latest (key text not null, id uuid not null);              -- a DELETE, then an INSERT
create table accounts (id uuid primary key, balance bigint not null default 0);   -- addressed by uuids in several spellings
create table orders (handler text, topic text, partition int, key text, offsets bigint[] not null, primary key (handler, topic, partition, key));
create table receipts (                                                 -- of the next application: downstream.py
    id uuid not null, key text not null, source uuid not null, n int not null, amount bigint not null,
    partition int not null, "offset" bigint not null, seq bigint generated always as identity
);
create table receipt_balances (key text primary key, balance bigint not null);
"""
EFFECT = (
    'insert into effects (handler, id, key, amount, partition, "offset", topic) values ($1, $2, $3, $4, $5, $6, $7)'
)
BALANCE = """insert into balances values ($1, $2, $3)
    on conflict (handler, key) do update set balance = balances.balance + excluded.balance"""
ORDER = """insert into orders values ($1, $2, $3, $4, array[$5::bigint])
    on conflict (handler, topic, partition, key) do update set offsets = orders.offsets || excluded.offsets"""


FORMS = (
    "insert into tickets (id) values ($1)",
    "insert into ticket_lines (number, id) values (currval('tickets_number_seq'), $1)",
    "update stock set quantity = quantity + $2 where key = $1",
    "insert into stock (key, quantity) select $1::text, $2::bigint where not exists (select from stock where key = $1::text)",
    "delete from latest where key = $1",
    "insert into latest (key, id) values ($1, $2)",
    "insert into accounts (id) values ($1) on conflict do nothing",
    "update accounts set balance = balance + $2 where id = $1",
)


class Order(msgspec.Struct):
    key: str
    amount: int
    raises: bool = False
    swallows: bool = False
    fails: bool = False  # until the handlers are mended
    once: bool = False  # fails in the first attempt of each handler
    late: bool = False  # fails after it has written
    note: str = ""
    id: UUID | None = None  # of a payload that an operator gave a dead letter


out = os.environ.get("CHAOS_OUT", "")  # the topic of the next application, if there is one
app = App(os.environ.get("CHAOS_APP", "chaos"), publishes=[out] if out else [])
topic = os.environ.get("CHAOS_TOPIC", "chaos")
slow_seconds = float(os.environ.get("CHAOS_SLOW", "0"))
_base = float(os.environ.get("CHAOS_RETRY", "0.05"))
retry = Retry(attempts=2, base=_base, cap=max(60.0, _base))


def _id(message: Message[Order | None]) -> UUID:
    """The id that the producer or an operator gave it."""
    if message.value is not None and message.value.id is not None:
        return message.value.id
    if any(name == "ce_id" for name, _ in message.headers):
        return UUID(hex=message.id)
    return UUID((dict(message.headers)["message-id"] or b"").decode())


_tried: set[tuple[str, UUID]] = set()


def _fail(handler: str, message: Message[Order | None]) -> None:
    """Raise what the message says."""
    order = message.value
    if order is None:
        return
    if order.raises:
        raise ValueError("as the message asks")
    if order.fails and os.environ.get("CHAOS_POSTPONE"):
        raise RunAgain("not now")
    if order.fails and not os.environ.get("CHAOS_MENDED"):
        raise ValueError("as the message asks, until the code is fixed")
    if order.late and handler != "audit":
        raise ValueError("as the message asks")
    if order.once and (handler, _id(message)) not in _tried:
        _tried.add((handler, _id(message)))
        raise ValueError("as the message asks, once")


async def _swallow(tx: Tx) -> None:
    """A failed statement whose error the handler swallows."""
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
    _fail("book", message)
    amount = 0 if order is None else order.amount
    where = (message.partition, message.offset, message.topic)
    tx.defer(EFFECT, "book", _id(message), key, amount, *where)
    tx.defer(BALANCE, "book", key, amount)
    tx.defer(ORDER, "book", message.topic, message.partition, key, message.offset)
    for n in range(2 if amount % 3 == 0 else 1) if out else ():
        tx.publish(out, {"source": str(_id(message)), "n": n, "key": key, "amount": amount}, key=key)


@app.handler(topic, f"{topic}-copy", retry=retry)
async def audit(message: Message[Order | None], tx: Tx) -> None:
    order, key = message.value, (message.key or b"").decode()
    if order is not None and order.swallows:
        await _swallow(tx)
        return
    _fail("audit", message)
    amount = 0 if order is None else order.amount
    where = (message.partition, message.offset, message.topic)
    if os.environ.get("CHAOS_DEFER"):  # then nothing sends the writes of a batch before its end
        tx.defer(EFFECT, "audit", _id(message), key, amount, *where)
        tx.defer(BALANCE, "audit", key, amount)
        tx.defer(ORDER, "audit", message.topic, message.partition, key, message.offset)
        return
    await tx.execute(EFFECT, "audit", _id(message), key, amount, *where)
    if order is not None and order.late:
        raise ValueError("as the message asks, too late")
    await tx.execute(BALANCE, "audit", key, amount)
    await tx.execute(ORDER, "audit", message.topic, message.partition, key, message.offset)


async def forms(message: Message[Order | None], tx: Tx) -> None:
    order, key = message.value, (message.key or b"").decode()
    if order is not None and order.swallows:
        await _swallow(tx)
        return
    _fail("forms", message)
    id, amount = _id(message), 0 if order is None else order.amount
    tx.defer(EFFECT, "forms", id, key, amount, message.partition, message.offset, message.topic)
    tx.defer(BALANCE, "forms", key, amount)
    tx.defer(ORDER, "forms", message.topic, message.partition, key, message.offset)
    if id.int % 3:  # of a third of the messages: each statement that depends on the order is sent by itself
        return
    # Of one partition, since two workers at once would serialize such statements only by a lock.
    place = f"{message.topic}:{message.partition}:{key}"
    ticket, line, add, lookup, gone, new, opened, booked = FORMS
    tx.defer(ticket, id)
    tx.defer(line, id)
    tx.defer(add, place, amount)
    tx.defer(lookup, place, amount)
    tx.defer(gone, place)
    tx.defer(new, place, id)
    account = spelled(key, id)
    tx.defer(opened, account)
    tx.defer(booked, account, amount)


def account_of(key: str) -> UUID:
    """The account of a message key."""
    return uuid5(NAMESPACE_OID, key)


def spelled(key: str, id: UUID) -> str:
    """The account of a key, in one spelling that producers use."""
    text = str(account_of(key))
    return (text, text.upper(), text.replace("-", ""))[id.int % 3]


app.handler(topic, f"{topic}-copy", retry=retry)(forms)
if os.environ.get("CHAOS_VERSION") == "2":

    @app.handler(topic, f"{topic}-copy", retry=retry, concurrency=3)
    async def late(message: Message[Order | None], tx: Tx) -> None:
        order, key = message.value, (message.key or b"").decode()
        _fail("late", message)
        await asyncio.sleep(0)
        amount = 0 if order is None else order.amount
        tx.defer(EFFECT, "late", _id(message), key, amount, message.partition, message.offset, message.topic)
        tx.defer(BALANCE, "late", key, amount)


mutants.install(os.environ.get("CHAOS_MUTANT", ""))
