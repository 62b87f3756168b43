"""Handlers that work, in every shape: no type checker may refuse one."""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypedDict, assert_type
from uuid import UUID

import msgspec
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel.ext.asyncio.session import AsyncSession as SqlModelSession

from consumer import App, HandlerOptions, Message, Retry, Tx
from consumer.decoders import Change, CloudEvent, CloudEvents, Debezium


class Payment(msgspec.Struct):
    id: UUID
    amount: int


class Refund(BaseModel):
    id: str
    reference: str | None


@dataclass
class Order:
    id: int


class Click(TypedDict):
    page: str


class Mailer:
    async def send(self, text: str) -> None: ...


class Resources(TypedDict):
    mailer: Mailer


@asynccontextmanager
async def resources(app: App) -> AsyncGenerator[Resources]:
    yield {"mailer": Mailer()}


app = App("billing", lifespan=resources, publishes=["receipts"])
SLOW: HandlerOptions = {"timeout": 30, "concurrency": 10, "retry": Retry(attempts=3, on=(ValueError,))}
P = ParamSpec("P")


@app.handler("payments")
async def value(payment: Payment) -> None: ...


@app.handler("payments", "payments.old", name="settle", order="partition", version="2")
async def value_and_tx(payment: Payment, tx: Tx) -> None:
    tx.publish("receipts", {"id": str(payment.id)})


@app.handler("payments", **SLOW)
async def tx_first(tx: Tx, payment: Payment, mailer: Mailer, limit: int) -> None: ...


@app.handler("payments", message_id=lambda payment: payment.id, fingerprint=lambda payment: payment.amount)
async def functions_of_the_value(message: Message[Payment], tx: Tx | None) -> None:
    assert_type(message.value, Payment)


def reference_of(refund: Refund) -> str | None:
    return refund.reference


@app.handler("payments", topics=re.compile(r"payments\.(eu|us)"), name="by_pattern")
async def by_pattern(payment: Payment, tx: Tx) -> None: ...


@app.handler(topics=re.compile("clicks", re.I), batch=10)
async def listed_by_pattern(clicks: list[Click], tx: Tx) -> None: ...


@app.handler("refunds", message_id=reference_of, fingerprint=None)
async def model(refund: Refund, s: AsyncSession) -> None: ...


def numbered(prefix: str, order: Order) -> str:
    return f"{prefix}{order.id}"


@app.handler("orders", message_id=partial(numbered, "order-"))
async def dataclass_and_session(order: Order | None, tx: Tx, s: SqlModelSession) -> None: ...


@app.handler("clicks", idempotent=False, allow_nan=True)
async def opted_out(click: Click) -> None: ...


@app.handler("clicks", batch=None)
async def raw(click: bytes, tx: Tx) -> None: ...


@app.handler("numbers")
async def list_as_a_payload(numbers: list[int], tx: Tx) -> None: ...


@app.handler("clicks", batch=500)
async def batch(clicks: list[Click], tx: Tx) -> None: ...


@app.handler("clicks", batch=500)
async def batch_of_messages(clicks: list[Message[Click]]) -> None: ...


@app.handler("clicks", batch=500, message_id="field:page")
async def batch_after_tx(tx: Tx, clicks: list[Click], mailer: Mailer) -> None: ...


@app.handler("events", decode=CloudEvents())
async def event(event: CloudEvent[Payment], tx: Tx) -> None: ...


@app.handler("changes", decode=Debezium())
async def change(change: Change[Order] | None, tx: Tx) -> None: ...


@app.handler("words", decode=lambda record: (record.value or b"").split())
async def words(words: list[bytes]) -> None: ...


def timed(function: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    @wraps(function)
    async def call(*args: P.args, **options: P.kwargs) -> None:
        await function(*args, **options)

    return call


@app.handler("payments", name="timed")
@timed
async def decorated(payment: Payment, tx: Tx) -> None: ...


class Service:
    async def settle(self, payment: Payment, tx: Tx) -> None: ...


app.handler("payments", name="of_a_service")(Service().settle)


def register(topic: str, size: int | None, **options: Any) -> None:
    @app.handler(topic, **options)
    async def untyped_options(payment: dict[str, Any], tx: Tx) -> None: ...


async def unchanged(tx: Tx) -> None:
    """A handler is still the function that it was."""
    await value_and_tx(payment=Payment(UUID(int=1), 5), tx=tx)
    await batch(clicks=[], tx=tx)
