"""The option decode=: what it accepts, and what its values become."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from consumer import App, Message, RegistrationError, Tx
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead, Reason
from consumer.decoders import Change, CloudEvent, CloudEvents, Debezium, Json, Record
from consumer.transaction.identify import decoded, identify

pytestmark = pytest.mark.unit

CANARY = "CANARY-4929"


class Struct(msgspec.Struct):
    id: str
    price: Decimal


class Model(pydantic.BaseModel):
    id: str
    price: Decimal


@dataclass
class Data:
    id: str
    price: Decimal


class Typed(TypedDict):
    id: str
    price: Decimal


class Around(msgspec.Struct):
    model: Model


def delivery(option: Any, declared: Any, value: bytes | None, **options: Any) -> Delivery:
    """One record for a handler of this type."""
    app = App("shop")

    async def store(payload: Any) -> None: ...

    store.__annotations__["payload"] = declared
    app.handler("orders", decode=option, **options)(store)
    return Delivery(app.handlers["store"], LogRecord("orders", 0, 0, 0, None, value, (("kind", b"order"),)))


def read(option: Any, declared: Any, value: bytes | None = b"", **options: Any) -> Any:
    return decoded(delivery(option, declared, value, **options))


TREE: dict[str, Any] = {"id": "a", "price": Decimal("1.10")}


@pytest.mark.parametrize("declared", [Struct, Model, Data])
def test_a_decoded_value_is_converted_to_the_declared_type(declared: Any) -> None:
    assert read(lambda record: TREE, declared) == declared(id="a", price=Decimal("1.10"))
    assert str(read(lambda record: TREE, declared).price) == "1.10"
    assert read(lambda record: declared(**TREE), declared) == declared(**TREE)  # it has the type already


def test_types_without_a_class_of_their_own() -> None:
    assert read(lambda record: TREE, Typed) == TREE
    assert read(lambda record: TREE, dict[str, Any]) == TREE
    assert read(lambda record: {"model": TREE}, Around) == Around(Model(**TREE))
    assert read(lambda record: b"\xff", bytes) == b"\xff"
    assert read(lambda record: "é", str) == "é"
    assert read(lambda record: 7, Any) == 7


def test_raw_json_is_decoded_as_without_the_option() -> None:
    packed = gzip.compress(b'{"id": "a", "price": 1.10}')

    def unpacked(record: Record) -> msgspec.Raw:
        return msgspec.Raw(gzip.decompress(record.value or b""))

    assert str(read(unpacked, Struct, packed).price) == str(read(unpacked, Model, packed).price) == "1.10"


def test_a_decoder_gets_the_record() -> None:
    def kind(record: Record) -> str:
        return dict(record.headers)["kind"].decode() + record.topic  # type: ignore[union-attr]

    assert read(kind, str) == "orderorders"


def test_the_id_is_of_the_decoded_value() -> None:
    of_field = delivery(lambda record: TREE, Struct, b"one", message_id="field:id")
    of_function = delivery(lambda record: TREE, Struct, b"one", message_id=lambda value: value.id)
    plain = delivery(None, Struct, b'{"id": "a", "price": 1}', message_id="field:id")
    identify([of_field, of_function, plain])
    assert of_field.id == of_function.id == plain.id != b""


def test_fingerprints_are_of_the_bytes_or_of_the_value() -> None:
    bytes_ = [delivery(lambda record: TREE, Struct, value) for value in (b"one", b"two")]
    values = [delivery(lambda record: TREE, Struct, value, fingerprint="value") for value in (b"one", b"two")]
    identify([*bytes_, *values])
    assert bytes_[0].fingerprint != bytes_[1].fingerprint
    assert values[0].fingerprint == values[1].fingerprint


def failing(record: Record) -> Any:
    raise ValueError(CANARY)


@pytest.mark.parametrize(
    ("option", "declared", "says"),
    [
        (failing, Struct, "decode=: ValueError"),
        (lambda record: {"id": CANARY}, Struct, "Object missing required field `price`"),
        (lambda record: {"id": CANARY, "price": CANARY}, Model, "price: decimal_parsing"),
        (lambda record: {"id": "a", "price": Decimal("NaN")}, Struct, "price: a number that is not finite"),
        (lambda record: msgspec.Raw(CANARY.encode()), Struct, "JSON is malformed"),
        (lambda record: CANARY.encode(), str, "Expected `str`, got `bytes`"),
        (CloudEvents(), CloudEvent[Struct], "no CloudEvent"),
    ],
)
def test_unreadable_records_are_the_messages_fault(option: Any, declared: Any, says: str) -> None:
    refused = delivery(option, declared, b"{}", fingerprint="value")  # decoded before its claim
    identify([refused])
    assert isinstance(refused.outcome, Dead) and refused.outcome.reason is Reason.UNREADABLE
    assert says in refused.outcome.error and CANARY not in refused.outcome.error


def test_numbers_that_are_not_finite_can_be_allowed() -> None:
    value = read(lambda record: {"id": "a", "price": Decimal("NaN")}, Struct, allow_nan=True)
    assert value.price.is_nan()


def test_a_null_value_is_no_matter_of_the_decoder() -> None:
    assert read(failing, Struct | None, None) is None
    refused = delivery(failing, Struct, None)
    identify([refused])
    assert isinstance(refused.outcome, Dead) and refused.outcome.reason is Reason.NO_VALUE


def test_the_apps_decoder_is_the_default_of_its_handlers() -> None:
    app = App("shop", decode=lambda record: "from the App")

    @app.handler("orders")
    async def default(payload: str) -> None: ...

    @app.handler("orders", decode=lambda record: "its own")
    async def own(message: Message[str], tx: Tx) -> None: ...

    @app.handler("orders", decode=Json())
    async def plain(payload: int) -> None: ...

    record = LogRecord("orders", 0, 0, 0, None, b"7", ())
    assert [decoded(Delivery(handler, record)) for handler in app.handlers.values()] == ["from the App", "its own", 7]
    assert app.handlers["plain"].read is None  # nothing stands between JSON and its decoder


def test_an_effect_decodes_too() -> None:
    app = App("shop", decode=lambda record: json.loads(record.value or b"null")[0])

    @app.effect("orders", remembers=0, message_id="field:id")
    async def charge(payload: Struct) -> None: ...

    @charge.settled
    async def charged(payload: Struct, tx: Tx) -> None: ...

    @app.effect("orders", remembers=0, decode=CloudEvents())
    async def notify(event: CloudEvent[Struct]) -> None: ...

    @notify.settled
    async def notified(event: CloudEvent[Struct], tx: Tx) -> None: ...

    one = Delivery(app.handlers["charge"], LogRecord("orders", 0, 0, 0, None, b'[{"id": "a", "price": 1}]', ()))
    assert decoded(one) == Struct("a", Decimal(1))


def test_a_misspelt_field_of_an_envelope_is_noticed() -> None:
    delivery(Debezium(), Change[Struct] | None, b"", message_id="field:source.lsn")
    delivery(CloudEvents(), CloudEvent[Struct], b"", message_id="field:data.id")
    with pytest.raises(RegistrationError, match="did you mean 'source'"):
        delivery(Debezium(), Change[Struct] | None, b"", message_id="field:sources.lsn")


async def waiting(record: Record) -> Any: ...


@pytest.mark.parametrize(
    ("option", "declared", "says"),
    [
        (7, Struct, "decode=7: not understood; give a decoder such as CloudEvents()"),
        (CloudEvents, CloudEvent[Struct], "decode=CloudEvents: a class; write decode=CloudEvents()"),
        (waiting, Struct, "decoding must not wait"),
        (None, CloudEvent[Struct], "add decode=CloudEvents(), from consumer.decoders"),
        (None, Change[Struct] | None, "add decode=Debezium(), from consumer.decoders"),
        (lambda record: 1, CloudEvent[Struct], "add decode=CloudEvents(), from consumer.decoders"),
        (CloudEvents(), Struct, "decode=CloudEvents(): decodes to CloudEvent[T]; annotate the payload with that"),
        (Debezium(), Struct, "decode=Debezium(): decodes to Change[T]; annotate the payload with that"),
        (Debezium(), Change[Struct], "annotate Change[Struct] | None, and return for None"),
        (CloudEvents(), CloudEvent[complex], "annotate another type"),
    ],
)
def test_a_usual_mistake_gets_one_line_that_says_what_to_write(option: Any, declared: Any, says: str) -> None:
    with pytest.raises(RegistrationError) as error:
        delivery(option, declared, b"")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decode": 7}, "App('shop'): decode=7: not understood"),
        ({"encode": 7}, "App('shop'): encode=7: not understood"),
        ({"encode": CloudEvents}, "write encode=CloudEvents()"),
        ({"encode": waiting}, "encoding must not wait"),
    ],
)
def test_an_app_checks_its_options(options: dict[str, Callable[..., Any]], says: str) -> None:
    with pytest.raises(RegistrationError) as error:
        App("shop", **options)  # type: ignore[arg-type]
    assert says in str(error.value)
