"""Mistakes in handlers that a type checker shows."""

import re

import msgspec

from consumer import App, HandlerOptions, Message, Retry, Tx

app = App("billing")


class Payment(msgspec.Struct):
    id: str
    amount: float


async def handler(payment: Payment, tx: Tx) -> None: ...


async def async_id(payment: Payment) -> str:
    return payment.id


# Options.
app.handler("payments", concurency=3)(handler)  # refused
app.handler("payments", batch_size=3)(handler)  # refused
app.handler("payments", topics=["refunds"])(handler)  # refused
app.handler(topics="payments.*")(handler)  # refused
app.handler(topics=re.compile(b"payments.*"))(handler)  # refused
app.handler(re.compile("payments.*"))(handler)  # refused
app.handler("payments", remembers=0)(handler)  # refused
app.handler("payments", order="keys")(handler)  # refused
app.handler("payments", fingerprint="bites")(handler)  # refused
app.handler("payments", retry=3)(handler)  # refused
app.handler("payments", retry=Retry(attempt=3))(handler)  # refused
app.handler("payments", retry=Retry(on=("ValueError",)))(handler)  # refused
app.handler("payments", timeout="30")(handler)  # refused
app.handler("payments", batch="500")(handler)  # refused
app.handler("payments", allow_nan="yes")(handler)  # refused
app.handler("payments", decode="json")(handler)  # refused
app.handler("payments", message_id=7)(handler)  # refused
app.handler("payments", message_id=async_id)(handler)  # refused
app.handler("payments", message_id=lambda payment: 2.5)(handler)  # refused
app.handler("payments", message_id=lambda: "1")(handler)  # refused
app.handler(["payments", "refunds"])(handler)  # refused
SHARED: HandlerOptions = {"timeuot": 3}  # refused


# Shapes.
@app.handler  # refused
async def without_a_topic(payment: Payment, tx: Tx) -> None: ...


@app.handler("payments")  # refused
def not_async(payment: Payment, tx: Tx) -> None: ...


@app.handler("payments")  # refused
async def without_a_message() -> None: ...


@app.handler("payments")  # refused
async def message_by_keyword(*, payment: Payment) -> None: ...


@app.handler("payments")  # refused
async def returns_something(payment: Payment, tx: Tx) -> Payment:
    return payment


@app.handler("payments", batch=500)  # refused
async def batch_of_one(payment: Payment, tx: Tx) -> None: ...


@app.handler("payments", batch=500)  # refused
async def batch_of_one_message(tx: Tx, payment: Message[Payment]) -> None: ...


@app.handler("payments", batch=500)  # refused
async def batch_of_a_tuple(payments: tuple[Payment, ...], tx: Tx) -> None: ...


@app.handler("payments", batch=500)  # refused
async def batch_of_nothing(tx: Tx) -> None: ...


@app.handler("payments", batch=500)  # refused
def batch_not_async(payments: list[Payment], tx: Tx) -> None: ...


# What a handler does.
@app.handler("payments")
async def uses_the_value_wrongly(message: Message[Payment], tx: Tx) -> None:
    print(message.amount)  # refused
    tx.commit()  # refused
    tx.publish("receipts", 1, keys="7")  # refused
    tx.defer("select 1", timeout=3)  # refused
