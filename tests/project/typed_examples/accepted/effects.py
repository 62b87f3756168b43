"""Effects that work, in every shape."""

from datetime import timedelta
from typing import assert_type

import msgspec

from consumer import App, Call, EffectOptions, Message, NotDone, Tx


class Charge(msgspec.Struct):
    id: str
    amount: int


class Receipt(msgspec.Struct):
    id: str


class Payments:
    async def charge(self, amount: int, key: str) -> Receipt:
        raise NotDone("no connection")

    async def find(self, key: str) -> Receipt | None: ...


app = App("billing")
SLOW: EffectOptions = {"timeout": 30, "concurrency": 20}


@app.effect("charges", remembers=timedelta(hours=24), concurrency=20, timeout=30, message_id="field:id")
async def charge(wanted: Charge, call: Call, payments: Payments) -> Receipt:
    return await payments.charge(wanted.amount, call.key)


@charge.settled
async def charged(wanted: Charge, receipt: Receipt, tx: Tx, payments: Payments) -> None: ...


@charge.unsure
async def find(wanted: Charge, call: Call, payments: Payments) -> Receipt | None:
    return await payments.find(call.key)


@app.effect("charges", remembers=0, name="once")
async def once(wanted: Message[Charge]) -> str:
    return wanted.value.id


@once.settled
async def settled_by_message(message: Message[Charge], receipt: str, tx: Tx) -> None: ...


@app.effect("mails", remembers=timedelta(hours=24), **SLOW)
async def mail(call: Call, text: str) -> None: ...


@mail.settled
async def mailed(text: str, tx: Tx) -> None: ...


@app.effect("mails", name="alone", remembers=0)
async def alone(text: str) -> None: ...


async def called(payments: Payments) -> None:
    """An effect is called like its function, and knows what it returns."""
    assert_type(await charge(Charge("1", 5), Call("key"), payments), Receipt)
    await alone("text")
