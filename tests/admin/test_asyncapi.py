"""The AsyncAPI document is valid, and says what handlers take.

asyncapi-3.0.0.json.gz is schemas/3.0.0-without-$id.json of github.com/asyncapi/spec-json-schemas (Apache License 2.0), as
of its commit 7dd3990.
"""

from __future__ import annotations

import enum
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import jsonschema
import msgspec
import pydantic
import pytest

from consumer import App, Call, Message, Tx
from consumer.admin.asyncapi import document
from consumer.decoders import Avro, Change, CloudEvent, CloudEvents, Debezium, Record

pytestmark = pytest.mark.unit

T = TypeVar("T")
SCHEMA = json.loads(gzip.decompress((Path(__file__).parent / "asyncapi-3.0.0.json.gz").read_bytes()))


class Kind(enum.Enum):
    CARD = "card"
    CASH = "cash"


class Card(msgspec.Struct, tag=True):
    number: str


class Cash(msgspec.Struct, tag=True):
    place: tuple[float, float]


class Line(pydantic.BaseModel):
    """A line of an order."""

    product: str
    price: Decimal


class Order(pydantic.BaseModel):
    number: Annotated[str, pydantic.Field(max_length=20)]
    lines: list[Line]
    size: tuple[int, int] = (1, 1)


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Pet(pydantic.BaseModel):
    animal: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


class Payment(msgspec.Struct):
    """A payment."""

    id: UUID
    amount: Decimal
    note: Annotated[str, msgspec.Meta(max_length=9)]
    at: datetime
    by: Card | Cash
    kind: Kind = Kind.CARD
    order: Order | None = None
    parent: Payment | None = None


@dataclass
class Refund:
    payment: Payment
    line: Line


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Rule(msgspec.Struct):
    discriminator: Card | Cash


class Opaque:
    pass


def other_line() -> Any:
    class Line(pydantic.BaseModel):
        text: str

    return Line


def app_of(*declared: Any, **options: Any) -> App:
    """An App with a handler of a topic for each type."""
    app = App("shop", publishes=["receipts", "topic-0"])
    for number, kind in enumerate(declared):

        async def store(payload: Any) -> None: ...

        store.__annotations__["payload"] = kind
        app.handler(f"topic-{number}", name=f"h{number}", **options)(store)
    return app


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for inner in part.values():
            yield from references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from references(inner)


def valid(app: App) -> dict[str, Any]:
    """The document of an App, if it is valid."""
    described = document(app, "1.2.3")
    faults = [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(described)]
    assert faults == []
    for reference in references(described):
        part = described
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]
    for part in described["components"].values():  # "MUST use keys that match", which the schema does not check
        assert all(re.fullmatch(r"[a-zA-Z0-9._-]+", key) for key in part), list(part)
    assert all(re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]*", key) for key in described["operations"])
    assert json.loads(json.dumps(described)) == described
    return described


def payload_of(described: dict[str, Any], message: str) -> dict[str, Any]:
    """The schema of a message's payload, which can be used alone."""
    payload = described["components"]["messages"][message]["payload"]
    draft = "http://json-schema.org/draft-07/schema#"
    return {"$schema": draft, "allOf": [payload], "components": described["components"]}


def test_types_of_both_libraries_become_schemas() -> None:
    described = valid(
        app_of(Payment, Order, Refund, Pet, Payment | None, list[Line], other_line(), Message[Order | None])
    )
    schemas = described["components"]["schemas"]
    assert schemas["Payment"]["description"] == "A payment." and schemas["Line"]["description"] == "A line of an order."
    assert schemas["Line_2"]["required"] == ["text"]  # of another module
    payload = {
        "id": "8b3c5e0a-0000-4000-8000-000000000000", "amount": "1.50", "note": "n", "at": "2026-11-30T10:00:00Z",
        "by": {"type": "Cash", "place": [1, 2]}, "order": {"number": "a", "lines": [{"product": "p", "price": "1"}]},
    }  # fmt: skip
    schema = payload_of(described, "topic-0.Payment")
    assert msgspec.convert(payload["by"], Cash).place == (1, 2)
    jsonschema.validate(payload, schema, cls=jsonschema.Draft7Validator)
    jsonschema.validate(
        {"payment": payload, "line": {"product": "p", "price": "1"}}, payload_of(described, "topic-2.Refund")
    )
    for wrong in ({"by": {"type": "Cash", "place": ["x", "y"]}}, {"order": {"number": "a"}}, {"id": 5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**payload, **wrong}, schema, cls=jsonschema.Draft7Validator)
    jsonschema.validate(None, payload_of(described, "topic-4.Payment"), cls=jsonschema.Draft7Validator)


def test_types_have_names_that_keys_may_have() -> None:
    described = valid(app_of(Page[Line], Page[Page[int]], Card | Cash, Card | Cash | None))
    assert sorted(described["components"]["messages"]) == [
        "receipts.message", "topic-0.Page_Line", "topic-1.Page_Page_int", "topic-2.Card-or-Cash", "topic-3.Card-or-Cash"
    ]  # fmt: skip
    jsonschema.validate({"items": [{"items": [1]}]}, payload_of(described, "topic-1.Page_Page_int"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"items": [{"items": ["x"]}]}, payload_of(described, "topic-1.Page_Page_int"))


def test_a_field_may_be_named_like_a_keyword() -> None:
    described = valid(app_of(Rule))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"discriminator": {"type": "Card"}}, payload_of(described, "topic-0.Rule"))


def test_types_without_a_schema_are_any_value() -> None:
    described = valid(app_of(bytes, str, dict, Any, dict[str, Any], list[int] | None, float, timedelta))
    messages = described["components"]["messages"]
    assert [messages[f"topic-{number}.{name}"]["contentType"] for number, name in enumerate(["bytes", "str", "dict"])] == [
        "application/octet-stream", "text/plain", "application/json"
    ]  # fmt: skip


def test_an_operation_says_what_its_handler_does() -> None:
    app = App("shop", publishes=["receipts"])

    @app.handler("payments", "refunds", message_id="header:payment-id", name="settle/eu")
    async def settle(payment: Payment, tx: Tx) -> None:
        """Settle a payment.

        Moves its amount.
        """

    @app.handler("payments")
    async def count(payment: Payment) -> None: ...

    @app.effect("charges", remembers=timedelta(days=1))
    async def charge(payment: Payment, call: Call) -> str:
        """Charge a card."""
        return ""

    @charge.settled
    async def charged(payment: Payment, reply: str, tx: Tx) -> None: ...

    described = valid(app)
    operations, messages = described["operations"], described["components"]["messages"]
    assert set(operations) == {"settle_eu.payments", "settle_eu.refunds", "count", "charge", "publish.receipts"}
    operation = operations["settle_eu.payments"]
    assert (operation["action"], operation["summary"]) == ("receive", "Settle a payment.")
    assert operation["description"].endswith("Moves its amount.")
    assert operation["bindings"]["kafka"]["groupId"]["enum"] == ["shop"]
    assert operations["charge"]["summary"] == "Charge a card." and "summary" not in operations["count"]
    headers = messages["payments.Payment"]["headers"]
    assert (set(headers["properties"]), headers["required"]) == ({"payment-id", "message-id"}, ["payment-id"])
    assert operations["publish.receipts"]["action"] == "send"
    assert messages["receipts.message"]["headers"]["required"] == ["message-id"]
    assert set(messages) == {"payments.Payment", "refunds.Payment", "charges.Payment", "receipts.message"}
    assert described["info"] == {"title": "shop", "version": "1.2.3"}


def test_operations_have_keys_whatever_their_handlers_are_named() -> None:
    app = App("shop")
    for name in ("支付", "退款", "a/b", "a:b"):

        @app.handler("payments", name=name)
        async def settle(payment: Payment) -> None: ...

    assert list(valid(app)["operations"]) == ["handler", "handler_2", "a_b", "a_b_2"]


def test_a_topic_that_is_read_and_published_has_one_channel() -> None:
    described = valid(app_of(Order))
    assert described["operations"]["publish.topic-0"]["messages"] == described["operations"]["h0"]["messages"]


def test_other_formats_have_their_content_types() -> None:
    def unpacked(record: Record) -> object:
        return record.value

    app = App("shop", decode=Avro(), publishes=["out"], encode=CloudEvents())

    @app.handler("avro")
    async def of_avro(order: Order) -> None: ...

    @app.handler("structured", decode=CloudEvents())
    async def of_event(order: CloudEvent[Order]) -> None: ...

    @app.handler("binary", decode=CloudEvents(mode="binary"))
    async def of_binary(order: CloudEvent[Payment]) -> None: ...

    @app.handler("changes", decode=Debezium(), message_id="field:id")
    async def of_change(row: Change[Order] | None) -> None: ...

    @app.handler("own", decode=unpacked)
    async def of_own(order: Order) -> None: ...

    described = valid(app)
    messages = described["components"]["messages"]
    types = {name.partition(".")[0]: message.get("contentType") for name, message in messages.items()}
    assert types == {
        "avro": "application/vnd.apache.avro",
        "structured": "application/cloudevents+json",
        "binary": "application/json",
        "changes": "application/json",
        "own": None,
        "out": "application/cloudevents+json",
    }
    assert messages["avro.Order"]["bindings"]["kafka"]["schemaIdPayloadEncoding"] == "confluent"
    assert "ce_id" in messages["binary.CloudEvent-Payment"]["headers"]["required"]
    event = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": {"number": "a", "lines": []}}
    schema = payload_of(described, "structured.CloudEvent-Order")
    jsonschema.validate(event, schema, cls=jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**event, "data": {}}, schema, cls=jsonschema.Draft7Validator)


def test_a_pattern_is_a_channel_without_an_address() -> None:
    app = App("shop")

    @app.handler("refunds", topics=re.compile(r"payments\.(eu|us)"))
    async def settle(payment: Payment) -> None: ...

    described = valid(app)
    assert set(described["channels"]) == {"refunds", "settle.topics"}
    channel = described["channels"]["settle.topics"]
    assert channel["address"] is None and r"payments\.(eu|us)" in channel["description"]
    assert described["operations"]["settle.topics"]["channel"] == {"$ref": "#/channels/settle.topics"}
    assert payload_of(described, "settle.topics.Payment") == payload_of(described, "refunds.Payment")


def test_a_topic_named_like_the_channel_of_a_pattern_keeps_its_own() -> None:
    app = App("shop")

    @app.handler("settle.topics", topics=re.compile(r"payments\.(eu|us)"))
    async def settle(payment: Payment) -> None: ...

    described = valid(app)
    assert {name: channel["address"] for name, channel in described["channels"].items()} == {
        "settle.topics": "settle.topics",
        "settle.topics_2": None,
    }
    assert [operation["channel"]["$ref"] for operation in described["operations"].values()] == [
        "#/channels/settle.topics",
        "#/channels/settle.topics_2",
    ]
