"""Wrong effects are refused where they are written; results survive the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pydantic
import pytest

from consumer import App, Call, Message, RegistrationError, Tx
from consumer.core.errors import CallNotMade
from consumer.settings import Settings
from consumer.transaction.limits import limits

pytestmark = pytest.mark.unit

DAY = timedelta(hours=24)


class Order(msgspec.Struct):
    amount: int


class Receipt(msgspec.Struct):
    id: str


class Model(pydantic.BaseModel):
    id: str


async def charge(order: Order, call: Call) -> Receipt:
    return Receipt(call.key)


def registered(function: Any = charge, remembers: Any = DAY, **options: Any) -> tuple[App, Any]:
    app = App("billing")
    return app, app.effect("charges", remembers=remembers, **options)(function)


async def without_annotation(order: Order, call: Call):  # type: ignore[no-untyped-def]
    return Receipt("")


async def optional(order: Order, call: Call) -> Receipt | None: ...


async def with_tx(order: Order, tx: Tx) -> Receipt:
    return Receipt("")


def plain(order: Order, call: Call) -> Receipt:
    return Receipt("")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: registered(without_annotation), "annotate what it returns"),
        (lambda: registered(optional), "cannot be optional"),
        (lambda: registered(plain), "must be an `async def`"),
        (lambda: registered(remembers=timedelta(seconds=5)), "at least a minute"),
        (lambda: registered(remembers=3600), "a timedelta"),
        (lambda: registered(remembers=False), "a timedelta"),
        (lambda: registered(remembers=-DAY), "a timedelta"),
        (lambda: registered(batch=5), "batch= is for @app.handler"),
        (lambda: registered(idempotent=False), "idempotent= is for @app.handler"),
        (lambda: registered(concurency=5), "did you mean 'concurrency'"),
    ],
)
def test_an_effect_that_cannot_work_is_refused(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(RegistrationError, match=says):
        wrong()


def test_an_app_with_shards_has_no_effects() -> None:
    app = App("billing", shards={"a": "env:A", "b": "env:B"}, route=lambda key: "a")
    with pytest.raises(RegistrationError, match=r"idempotency_key"):
        app.effect("charges", remembers=DAY)(charge)


def test_settled_takes_the_message_and_the_result_of_the_call() -> None:
    app, effect = registered()

    async def other_result(order: Order, receipt: Order, tx: Tx) -> None: ...
    async def other_message(order: Receipt, receipt: Receipt, tx: Tx) -> None: ...
    async def no_result(order: Order, tx: Tx) -> None: ...

    for function, says in ((other_result, "the type Receipt"), (other_message, "Order"), (no_result, "Receipt")):
        with pytest.raises(RegistrationError, match=says):
            effect.settled(function)
    assert app.handlers["charge"].topics == ("charges",)


def test_unsure_returns_the_result_or_none() -> None:
    _, effect = registered()

    async def sure(order: Order, call: Call) -> Receipt:
        return Receipt("")

    async def nothing(order: Order, call: Call) -> None: ...

    with pytest.raises(RegistrationError, match=r"Receipt \| None"):
        effect.unsure(sure)
    _, mail = registered(nothing, 0)
    with pytest.raises(RegistrationError, match="let the call return a result"):
        mail.unsure(nothing)


def handled(app: App, raw: bytes | None, argument: Any = None) -> None:
    """Run the handler as its transaction does."""
    handler = app.handlers["charge"]
    handler.bind({})
    assert handler.call is not None
    asyncio.run(handler.call(argument, argument, SimpleNamespace(subject=SimpleNamespace(reply=raw))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        (Receipt, Receipt("r")),
        (Model, Model(id="r")),
        (list[Model], [Model(id="r")]),
        (bytes, b"\0r"),
        (str, "é"),
        (dict, {"a": 1}),
    ],
)
def test_a_result_is_the_same_after_the_database(kind: Any, result: Any) -> None:
    async def charge(order: Order, call: Call) -> Any: ...

    seen: list[Any] = []

    async def charged(message: Message[Order], result: Any, tx: Tx) -> None:
        seen.append(result)

    charge.__annotations__["return"] = charged.__annotations__["result"] = kind
    app, effect = registered(charge)
    effect.settled(charged)
    stored = app.handlers["charge"].effect
    assert stored is not None
    handled(app, stored.encode(result))
    assert seen == [result]


def test_a_handler_never_runs_without_the_result() -> None:
    """Also the one of an effect without `.settled`, which does nothing."""
    app, effect = registered()
    with pytest.raises(CallNotMade):
        handled(app, None)
    handled(app, b'{"id": "r"}')

    async def charged(order: Order, receipt: Receipt, tx: Tx) -> None: ...

    effect.settled(charged)
    with pytest.raises(CallNotMade):
        handled(app, None)


def test_calls_and_transactions_have_limits_of_their_own() -> None:
    app, _ = registered(timeout=600)
    settings = Settings(kafka_bootstrap_servers="k:1", postgres_dsn="postgresql://x/y")
    seconds = limits(app.handlers.values(), settings)
    assert seconds["charge call"] == 600 > seconds["charge"]
