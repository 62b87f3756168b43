"""Values of Confluent's serializers are decoded (confluent.json).

What is encoded is decoded again.

The schemas come from a registry over HTTP (support/schema_registry.py).
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest
from harness import settings_for
from schema_registry import SchemaRegistry, headers_of, value_of

from consumer import App, Misconfigured, RegistrationError, Settings, TransactionMisuse
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead
from consumer.decoders import Avro, Change, CloudEvent, CloudEvents, Debezium, JsonSchema, Protobuf
from consumer.decoders.preparation import fetch_schemas
from consumer.outbox.encoding import encoded
from consumer.transaction.identify import decoded, identify

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def registry() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as registry:
        yield registry


def settings(registry: SchemaRegistry, **more: Any) -> Settings:
    return settings_for("postgresql://x/y", "127.0.0.1:1", None, schema_registry_url=registry.url, **more)


def new_app(option: Any, declared: Any, **options: Any) -> App:
    app = App("shop", decode=option)

    async def store(payload: Any) -> None: ...

    store.__annotations__["payload"] = declared
    app.handler("orders", **options)(store)
    return app


async def read(
    registry: SchemaRegistry,
    option: Any,
    declared: Any,
    value: bytes | None,
    headers: Any = (),
    **options: Any,
) -> Any:
    """The value, or the outcome of a message that cannot be read."""
    app = new_app(option, declared, **options)
    await app.open_registry(settings(registry))
    one = Delivery(app.handlers["store"], LogRecord("orders", 0, 0, 0, None, value, tuple(headers)))
    await fetch_schemas([one], settings(registry))
    identify([one])
    if one.outcome is not None:
        return one.outcome
    return decoded(one)


ORDER = {
    "id": uuid.UUID(int=7),
    "total": Decimal("12345678901234567890.1234"),
    "fee": Decimal("-1.05"),
    "day": date(2026, 1, 2),
    "clock": time(3, 4, 5, 6),
    "at": datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
    "at_ms": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
    "local": datetime(2026, 1, 2, 3, 4, 5, 678901),
    "state": "PAID",
    "note": None,
    "tags": ["a", "é"],
    "counts": {"x": 2**40},
    "ratio": 0.1,
    "raw": b"\x00\xff",
    "choice": "text",
}


class Order(msgspec.Struct):
    id: uuid.UUID
    total: Decimal
    at: datetime
    raw: bytes
    note: str | None


class OrderModel(pydantic.BaseModel):
    id: uuid.UUID
    total: Decimal
    at: datetime
    raw: bytes
    note: str | None


@pytest.mark.parametrize("case", ["avro", "avro-guid"])
async def test_avro_is_decoded(registry: SchemaRegistry, case: str) -> None:
    value, headers = value_of(case), headers_of(case)
    assert await read(registry, Avro(), dict[str, Any], value, headers) == ORDER
    for declared in (Order, OrderModel):
        order = await read(registry, Avro(), declared, value, headers)
        assert (order.id, str(order.total), order.at, order.raw, order.note) == (
            ORDER["id"], "12345678901234567890.1234", ORDER["at"], b"\x00\xff", None,
        )  # fmt: skip


async def test_avro_with_a_reference_is_decoded(registry: SchemaRegistry) -> None:
    assert await read(registry, Avro(), dict[str, Any], value_of("avro-reference")) == {
        "price": {"currency": "EUR", "cents": 5},
        "fee": {"currency": "USD", "cents": 1},
    }


async def test_avro_of_a_java_serializer_is_decoded(registry: SchemaRegistry) -> None:
    assert await read(registry, Avro(), dict[str, Any], value_of("avro-java")) == {
        "id": "é-1",
        "amount": 9007199254740993,
        "price": Decimal("-1234567890123.4500"),
        "at": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
        "tags": ["a", "b"],
        "counts": {"x": 2**40},
        "note": None,
        "state": "PAID",
    }


async def test_the_id_is_a_field_of_the_decoded_value(registry: SchemaRegistry) -> None:
    app = new_app(Avro(), Order, message_id="field:id")
    await app.open_registry(settings(registry))
    record = LogRecord("orders", 0, 0, 0, None, value_of("avro"), ())
    one = Delivery(app.handlers["store"], record)
    await fetch_schemas([one], settings(registry))
    identify([one])
    assert one.id == uuid.UUID(int=7).bytes


async def test_json_is_decoded_without_a_registry() -> None:
    app = new_app(JsonSchema(), dict[str, Any])
    await app.open_registry(settings_for("postgresql://x/y", "127.0.0.1:1", None))
    one = Delivery(app.handlers["store"], LogRecord("orders", 0, 0, 0, None, value_of("json"), ()))
    assert decoded(one) == {"id": "a", "total": 1.5}


PROTO = {
    "id": "a",
    "count": 2**53 + 1,
    "price": {"currency": "EUR", "cents": 5},
    "at": datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
    "tags": ["a", "é"],
    "counts": {"x": 3},
    "state": "PAID",
    "raw": b"\x00\xff",
    "cash": False,
    "lines": [{"n": 1, "big": 2**64 - 1}],
    "ratio": 0.1,
}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("protobuf", PROTO),
        ("protobuf-nested", {"n": 5, "big": 6}),
        ("protobuf-first", {"x": "y"}),
        ("protobuf-empty", {"id": "", "count": 0, "tags": [], "counts": {}, "state": "NEW", "raw": b"", "lines": [], "ratio": 0.0}),
    ],
)  # fmt: skip
async def test_protobuf_is_decoded(registry: SchemaRegistry, case: str, expected: Any) -> None:
    assert await read(registry, Protobuf(), dict[str, Any], value_of(case)) == expected


@pytest.mark.parametrize(
    ("codec", "topic", "value"),
    [(Avro, "orders", ORDER), (JsonSchema, "json", {"id": "a", "total": 1.5}), (Protobuf, "other", {"x": "y"})],
)
async def test_encoded_bytes_are_those_of_the_other_library(
    registry: SchemaRegistry, codec: Any, topic: str, value: Any
) -> None:
    app = App("shop", encode=codec(), publishes=[topic])
    await app.open_registry(settings(registry))
    body, headers = encoded(topic, value, None, app.encode)
    case = {"orders": "avro", "json": "json", "other": "protobuf-first"}[topic]
    assert headers == ()
    if topic == "json":
        assert body is not None and body[:5] == value_of(case)[:5]
    else:
        assert body == value_of(case)
    assert await read(registry, codec(), dict[str, Any], body) == value


async def test_a_struct_and_generated_code_are_encoded(registry: SchemaRegistry) -> None:
    class Paid(msgspec.Struct):
        price: dict[str, Any]
        fee: dict[str, Any] | None

    app = App("shop", encode=Avro(), publishes=["paid"])
    await app.open_registry(settings(registry))
    paid = Paid({"currency": "EUR", "cents": 5}, {"currency": "USD", "cents": 1})
    assert encoded("paid", paid, None, app.encode)[0] == value_of("avro-reference")

    codec = Protobuf()
    app = App("shop", encode=codec, publishes=["proto"])
    await app.open_registry(settings(registry))
    _, file = codec.writing("proto")
    from google.protobuf import message_factory

    line = message_factory.GetMessageClass(file.message_types_by_name["Order"].nested_types_by_name["Line"])(n=5, big=6)
    body, _ = encoded("proto", line, None, app.encode)
    assert body is not None and body[5:] == value_of("protobuf-nested")[5:]


@pytest.mark.parametrize(
    ("codec", "topic", "value", "says"),
    [
        (Avro, "orders", {"id": 1}, "it is not of the Avro schema of topic orders"),
        (Protobuf, "other", {"y": 1}, "it is not of the first message in the schema of topic other"),
        (JsonSchema, "json", object(), "it cannot become JSON"),
    ],
)
async def test_a_value_that_is_not_of_the_schema_is_refused(
    registry: SchemaRegistry, codec: Any, topic: str, value: Any, says: str
) -> None:
    app = App("shop", encode=codec(), publishes=[topic])
    await app.open_registry(settings(registry))
    with pytest.raises(TransactionMisuse, match=says):
        encoded(topic, value, None, app.encode)
    assert encoded(topic, None, None, app.encode) == (None, ())  # a tombstone
    assert encoded(topic, b"\x00", None, app.encode) == (b"\x00", ())


@pytest.mark.parametrize(
    ("codec", "topic", "says"),
    [
        (
            Avro,
            "nothing",
            "no subject 'nothing-value', which encode= writes with; register the schema of topic 'nothing'",
        ),
        (Avro, "json", "the schema of topic 'json' is JSON; register one of kind AVRO, or use its encoder"),
    ],
)
async def test_an_encoder_needs_the_schemas_of_its_topics(
    registry: SchemaRegistry, codec: Any, topic: str, says: str
) -> None:
    app = App("shop", encode=codec(), publishes=[topic])
    with pytest.raises(Misconfigured) as error:
        await app.open_registry(settings(registry))
    assert says in str(error.value)


async def test_a_decoder_of_data_does_not_make_an_encoder_need_schemas(registry: SchemaRegistry) -> None:
    events = CloudEvents(data=Avro())
    app = App("shop", decode=events, encode=events, publishes=["nothing"])

    @app.handler("orders")
    async def store(event: CloudEvent[Order]) -> None: ...

    await app.open_registry(settings(registry))


async def test_encoders_wait_for_their_schemas() -> None:
    app = App("shop", encode=Avro(), publishes=["orders"])
    with pytest.raises(
        TransactionMisuse, match=r"no schema of topic orders was fetched; enter `async with app.running"
    ):
        encoded("orders", {}, None, app.encode)


UNKNOWN = b"\0\0\0\x27\x0f" + b"x"


@pytest.mark.parametrize(
    ("codec", "value", "says"),
    [
        (Avro, b'{"id": 1}', "plain JSON, without the schema id of Confluent's wire format"),
        (Avro, b"Obj\x01abc", "an Avro file"),
        (Avro, b"abc", "no schema id"),
        (Avro, b"", "no schema id"),
        (Avro, value_of("json"), "schema 4 is JSON, not AVRO; give the handler the decoder of that kind"),
        (Avro, value_of("avro")[:-3], "bytes that are not of their Avro schema"),
        (Avro, value_of("avro") + b"x", "some are left over"),
        (JsonSchema, b'{"id": 1}', "plain JSON, without the schema id of Confluent's wire format"),
        (JsonSchema, value_of("avro"), "JSON is malformed"),
        (Protobuf, value_of("protobuf")[:9] + b"\xff", "bytes that are not of their Protobuf schema"),
        (Protobuf, value_of("protobuf")[:5] + b"\x02\x0c", "message indexes that its Protobuf schema does not have"),
        (Protobuf, value_of("protobuf")[:5], "no list of message indexes"),
        (Protobuf, value_of("avro"), "schema 1 is AVRO, not PROTOBUF"),
    ],
)  # fmt: skip
async def test_unreadable_records_are_the_messages_fault(
    registry: SchemaRegistry, codec: Any, value: bytes, says: str
) -> None:
    outcome = await read(registry, codec(), dict[str, Any], value, fingerprint="value")
    assert isinstance(outcome, Dead) and says in outcome.error, outcome


async def test_an_unknown_schema_is_asked_for_twice_and_then_the_messages_fault(
    registry: SchemaRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.decoders.registry.CONFIRM_SECONDS", 0.05)
    outcome = await read(registry, Avro(), dict[str, Any], UNKNOWN, fingerprint="value")
    assert isinstance(outcome, Dead)
    assert "schema 9999 is unknown to the registry; register it, or check that" in outcome.error
    assert registry.requests.count("/schemas/ids/9999") >= 2


async def test_envelopes_can_be_avro(registry: SchemaRegistry) -> None:
    schema = {
        "type": "record", "name": "Envelope", "namespace": "shop.orders", "fields": [
            {"name": "before", "type": ["null", {"type": "record", "name": "Value", "fields": [
                {"name": "id", "type": "int"},
                {"name": "total", "type": {"type": "bytes", "scale": 2, "precision": 9, "connect.version": 1,
                    "connect.name": "org.apache.kafka.connect.data.Decimal", "logicalType": "decimal"}},
                {"name": "at", "type": {"type": "long", "connect.version": 1,
                    "connect.name": "io.debezium.time.MicroTimestamp"}},
                {"name": "free", "type": ["null", {"type": "record", "name": "VariableScaleDecimal",
                    "namespace": "io.debezium.data", "connect.name": "io.debezium.data.VariableScaleDecimal",
                    "fields": [{"name": "scale", "type": "int"}, {"name": "value", "type": "bytes"}]}]},
            ]}]},
            {"name": "after", "type": ["null", "Value"]},
            {"name": "source", "type": {"type": "map", "values": "string"}},
            {"name": "op", "type": "string"},
        ],
    }  # fmt: skip
    import io

    import fastavro

    id = registry.add("changes-value", msgspec.json.encode(schema).decode())
    stream = io.BytesIO()
    row = {"id": 1, "total": Decimal("1.50"), "at": 1_767_323_045_678_901, "free": {"scale": 1, "value": b"\x0f"}}
    change = {"before": None, "after": row, "source": {"connector": "postgresql", "lsn": "5"}, "op": "c"}
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), change)

    class Row(msgspec.Struct):
        id: int
        total: Decimal
        at: datetime
        free: Decimal | None

    value = b"\0" + id.to_bytes(4, "big") + stream.getvalue()
    read_change = await read(registry, Debezium(Avro()), Change[Row] | None, value, message_id="field:id")
    assert read_change.after == Row(1, Decimal("1.50"), datetime(2026, 1, 2, 3, 4, 5, 678901), Decimal("1.5"))

    headers = [("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_source", b"/s"), ("ce_type", b"t"),
               ("content-type", b"application/avro")]  # fmt: skip
    event = await read(registry, CloudEvents(data=Avro()), CloudEvent[Order], value_of("avro"), headers)
    assert event.data.id == uuid.UUID(int=7)


@pytest.mark.parametrize(
    ("name", "codec", "extra"), [("fastavro", Avro, "avro"), ("google.protobuf", Protobuf, "protobuf")]
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, codec: Any, extra: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(RegistrationError, match=rf"is not installed; pip install 'idempotent-consumer\[{extra}\]'"):
        codec()


async def test_many_messages_ask_for_a_schema_once(registry: SchemaRegistry) -> None:
    id = registry.add("once-value", '"string"')
    app = new_app(Avro(), str)
    await app.open_registry(settings(registry))
    value = b"\0" + id.to_bytes(4, "big") + b"\x02a"
    record = LogRecord("orders", 0, 0, 0, None, value, ())
    many = [Delivery(app.handlers["store"], record) for _ in range(100)]
    await asyncio.gather(*[fetch_schemas(many, settings(registry)) for _ in range(5)])
    await fetch_schemas(many, settings(registry))
    assert registry.requests.count(f"/schemas/ids/{id}") == 1
    assert {decoded(one) for one in many} == {"a"}
