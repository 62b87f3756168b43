"""Mistakes in effects that a type checker shows."""

from datetime import timedelta

import msgspec

from consumer import App, Call, EffectOptions, Tx

app = App("billing")


class Charge(msgspec.Struct):
    id: str
    amount: int


class Receipt(msgspec.Struct):
    id: str


async def function(wanted: Charge, call: Call) -> Receipt:
    return Receipt("1")


app.effect("charges")(function)  # refused
app.effect("charges", remembers=24)(function)  # refused
app.effect("charges", rembers=timedelta(hours=24))(function)  # refused
app.effect("charges", remembers=0, batch=5)(function)  # refused
app.effect("charges", remembers=0, idempotent=False)(function)  # refused
app.effect("charges", remembers=0, concurency=3)(function)  # refused
SHARED: EffectOptions = {"timeuot": 3}  # refused


@app.effect("charges", remembers=0)  # refused
def not_async(wanted: Charge, call: Call) -> Receipt:
    return Receipt("1")


@app.effect("charges", remembers=0)  # refused
async def without_a_message() -> Receipt:
    return Receipt("1")


@app.effect("charges", remembers=0)
async def charge(wanted: Charge, call: Call) -> Receipt:
    return Receipt("1")


@charge.settled  # refused
async def of_another_result(wanted: Charge, receipt: str, tx: Tx) -> None: ...


@charge.settled  # refused
async def without_the_result(wanted: Charge) -> None: ...


@charge.settled  # refused
async def without_the_result_but_with_tx(wanted: Charge, tx: Tx) -> None: ...


@charge.settled  # refused
def settled_not_async(wanted: Charge, receipt: Receipt, tx: Tx) -> None: ...


@charge.settled  # refused
async def settled_returns(wanted: Charge, receipt: Receipt) -> int:
    return 1


@charge.unsure  # refused
async def of_another_answer(wanted: Charge, call: Call) -> str | None: ...


@charge.unsure  # refused
def unsure_not_async(wanted: Charge, call: Call) -> Receipt | None: ...


charge.settle(function)  # refused


async def called() -> None:
    await charge("1", Call("key"))  # refused
    await charge(Charge("1", 1))  # refused
