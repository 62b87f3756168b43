"""Numbers keep the digits that were sent, or are refused.

That holds for any type and nesting. Numbers that are not finite are unreadable unless the handler allows them. A float stays
a float.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import uuid
from decimal import Decimal
from typing import Annotated, Any, Generic, NewType, Optional, TypedDict, TypeVar

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core import decode
from consumer.core.models import Unfit

pytestmark = pytest.mark.unit

SENT = "12345678901234567.89"
T = TypeVar("T")


class Price(pydantic.BaseModel):
    amount: Decimal = Decimal(0)
    count: int = 0
    rate: float = 0.0
    extra: Any = None
    at: datetime.datetime | None = None
    id: uuid.UUID = pydantic.Field(default_factory=uuid.uuid4)


class Box(pydantic.BaseModel, Generic[T]):
    inner: T


class Order(pydantic.BaseModel):
    lines: list[Price] = []
    by_name: dict[str, Price] = {}


class Limited(pydantic.BaseModel):
    amount: Annotated[Decimal, pydantic.Field(max_digits=6, decimal_places=2)]


class Strict(pydantic.BaseModel):
    model_config = {"strict": True}
    amount: Decimal
    id: uuid.UUID | None = None


class Frozen(pydantic.BaseModel):
    model_config = {"frozen": True}
    amount: Decimal
    extra: dict[str, Any] = {}


class Whole(pydantic.BaseModel):
    count: int = 0
    rate: float = 0.0
    extra: Any = None


class Encoded(pydantic.BaseModel):
    model_config = {"val_json_bytes": "base64"}
    amount: Decimal
    raw: bytes


class Struct(msgspec.Struct):
    price: Price
    amount: Decimal = Decimal(0)
    rate: float = 0.0
    extra: Any = None


class FrozenStruct(msgspec.Struct, frozen=True):
    price: Price
    extra: Any = None


@dataclasses.dataclass
class Data:
    prices: list[Price]
    amount: Decimal = Decimal(0)


@pydantic.dataclasses.dataclass
class PydanticData:
    amount: Decimal


class Typed(TypedDict):
    price: Price
    amount: Decimal


Alias = NewType("Alias", Price)
INNER = '{"amount":%s}'
NESTED: list[tuple[Any, str, Any]] = [
    (Price, INNER, lambda value: value.amount),
    (Price | None, INNER, lambda value: value.amount),
    (Optional[Price], INNER, lambda value: value.amount),  # noqa: UP045 - both spellings
    (Price | int, INNER, lambda value: value.amount),
    (Annotated[Price, "a price"], INNER, lambda value: value.amount),
    (Alias, INNER, lambda value: value.amount),
    (list[Price], f"[{INNER}]", lambda value: value[0].amount),
    (tuple[Price, ...], f"[{INNER}]", lambda value: value[0].amount),
    (dict[str, Price], f'{{"a":{INNER}}}', lambda value: value["a"].amount),
    (dict[str, list[Price | None]], f'{{"a":[null,{INNER}]}}', lambda value: value["a"][1].amount),
    (Order, f'{{"lines":[{INNER}]}}', lambda value: value.lines[0].amount),
    (Order, f'{{"by_name":{{"a":{INNER}}}}}', lambda value: value.by_name["a"].amount),
    (Box[Price], f'{{"inner":{INNER}}}', lambda value: value.inner.amount),
    (Box[Decimal], '{"inner":%s}', lambda value: value.inner),
    (Struct, f'{{"price":{INNER}}}', lambda value: value.price.amount),
    (Struct, '{"price":{},"amount":%s}', lambda value: value.amount),
    (FrozenStruct, f'{{"price":{INNER},"extra":1.10}}', lambda value: value.price.amount),
    (Frozen, '{"amount":%s,"extra":{"x":1.10}}', lambda value: value.amount),
    (Data, f'{{"prices":[{INNER}]}}', lambda value: value.prices[0].amount),
    (Data, '{"prices":[],"amount":%s}', lambda value: value.amount),
    (PydanticData, INNER, lambda value: value.amount),
    (Typed, f'{{"price":{INNER},"amount":1}}', lambda value: value["price"].amount),
    (Typed, '{"price":{},"amount":%s}', lambda value: value["amount"]),
    (Decimal, "%s", lambda value: value),
    (list[Decimal], "[%s]", lambda value: value[0]),
    (dict[str, Decimal], '{"a":%s}', lambda value: value["a"]),
]


@pytest.mark.parametrize(("declared", "text", "amount_of"), NESTED)
@pytest.mark.parametrize("sent", [SENT, "0.10", "100.00", "-1.5e-3", "1e2", "123456789012345678901234567890", "1e-400"])
def test_digits_are_stored_as_sent_wherever_the_decimal_is(declared: Any, text: str, amount_of: Any, sent: str) -> None:
    amount = amount_of(decode.decoder(declared)((text % sent).encode()))
    assert type(amount) is Decimal and amount == Decimal(sent)
    if "e" not in sent:
        assert amount.as_tuple() == Decimal(sent).as_tuple()


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30, places=6))
def test_a_model_keeps_any_digits(amount: Decimal) -> None:
    sent = format(amount, "f")
    price = decode.decoder(Price)(f'{{"amount":{sent},"rate":{sent},"extra":[{sent}]}}'.encode())
    assert price.amount.as_tuple() == Decimal(sent).as_tuple()
    assert type(price.rate) is float and price.rate == float(sent)
    assert type(price.extra[0]) is float and price.extra[0] == float(sent)


@pytest.mark.parametrize("declared", [Price, Whole], ids=lambda model: model.__name__)
@pytest.mark.parametrize("sent", ["9007199254740993.0", "9007199254740993e0", "1234567890123456700.0"])
def test_a_whole_number_written_with_a_point_is_exact(declared: Any, sent: str) -> None:
    assert decode.decoder(declared)(b'{"count":%s}' % sent.encode()).count == int(Decimal(sent))


@pytest.mark.parametrize("declared", [Price, Whole], ids=lambda model: model.__name__)
def test_a_fraction_that_a_float_would_drop_is_refused(declared: Any) -> None:
    with pytest.raises(Exception, match="number") as caught:
        decode.decoder(declared)(b'{"count":9007199254740992.5}')
    assert "count" in decode.explain(caught.value) and "9007" not in decode.explain(caught.value)


@pytest.mark.parametrize("declared", [Price, Whole, dict, Any, Struct], ids=str)
def test_floats_stay_floats_and_undeclared_numbers_are_floats(declared: Any) -> None:
    text = f'{{"rate":{SENT},"extra":{{"x":[{SENT}]}},"price":{{}}}}'
    decoded = decode.decoder(declared)(text.encode())
    rate, extra = (decoded["rate"], decoded["extra"]) if isinstance(decoded, dict) else (decoded.rate, decoded.extra)
    assert type(rate) is float and type(extra["x"][0]) is float


def test_a_time_in_seconds_and_nanoseconds_is_read_beside_a_decimal() -> None:
    price = decode.decoder(Price)(b'{"at":1700000000.123456789,"amount":1.10}')
    assert price.at == datetime.datetime(2023, 11, 14, 22, 13, 20, 123457, datetime.UTC)
    assert str(price.amount) == "1.10"


def test_limits_of_a_decimal_are_checked() -> None:
    decoder = decode.decoder(Limited)
    assert decoder(b'{"amount":1234.50}').amount == Decimal("1234.50")
    for refused in (b"1234.567", b"12345.67", b"1234.5000000000000000001"):
        with pytest.raises(Exception):  # noqa: B017 - any
            decoder(b'{"amount":%s}' % refused)


def test_a_model_that_reads_json_otherwise_refuses_what_it_would_lose() -> None:
    decoder, text = decode.decoder(Strict), '{"amount":%s,"id":"0190a5c1-7ab4-7c3e-8f00-1234567890ab"}'
    assert decoder((text % "1.10").encode()).amount == Decimal("1.1")
    assert decoder((text % f'"{SENT}"').encode()).amount == Decimal(SENT)
    with pytest.raises(Exception, match="send it as text"):
        decoder((text % SENT).encode())


@pytest.mark.parametrize("sent", ["1.10", SENT])
def test_a_model_that_reads_json_otherwise_keeps_its_reading(sent: str) -> None:
    decoded = decode.decoder(Encoded)(b'{"amount":%s,"raw":"eA=="}' % sent.encode())
    assert (decoded.raw, decoded.amount) == (b"x", Decimal(sent))


NOT_FINITE: list[tuple[Any, str]] = [
    (Decimal, '"NaN"'),
    (Decimal, '"-Infinity"'),
    (Decimal, '" snan "'),
    (Decimal, '"\\u004eaN"'),
    (float, "NaN"),
    (float, "1e999"),
    (dict, '{"a":NaN}'),
    (dict, '{"a":[-Infinity]}'),
    (Any, '{"a":1e999}'),
    (dict[str, Decimal], '{"a":"NaN"}'),
    (Struct, '{"price":{},"amount":"Infinity"}'),
    (Struct, '{"price":{"rate":"NaN"}}'),
    (Struct, '{"price":{"rate":1e999}}'),
    (Struct, '{"price":{},"extra":1e999}'),
    (Typed, '{"price":{},"amount":"NaN"}'),
    (Data, '{"prices":[],"amount":"inf"}'),
    (Price, '{"rate":NaN}'),
    (Price, '{"rate":"NaN"}'),
    (Price, '{"rate":1e999}'),
    (Price, '{"rate":%s}' % ("9" * 400)),
    (Price, '{"extra":{"a":[NaN]}}'),
    (Price, '{"extra":-1e400}'),
    (Order, '{"lines":[{"rate":Infinity}]}'),
    (list[Price], '[{"rate":"inf"}]'),
]


@pytest.mark.parametrize(("declared", "text"), NOT_FINITE)
def test_a_number_that_is_not_finite_is_unreadable(declared: Any, text: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - each library has its own
        decode.decoder(declared)(text.encode())


@pytest.mark.parametrize(("declared", "text"), NOT_FINITE)
def test_handler_with_allow_nan_gets_numbers_that_are_not_finite(declared: Any, text: str) -> None:
    decode.decoder(declared, allow_nan=True)(text.encode())


def test_handler_with_allow_nan_keeps_the_digits_of_other_numbers() -> None:
    decoded = decode.decoder(dict[str, Decimal], allow_nan=True)(b'{"a":NaN,"b":%s}' % SENT.encode())
    assert decoded["b"] == Decimal(SENT) and decoded["a"].is_nan()
    model = decode.decoder(Price, allow_nan=True)(b'{"rate":NaN,"amount":1.10}')
    assert math.isnan(model.rate) and model.amount == Decimal("1.1")


def test_text_that_only_looks_like_a_number_stays_text() -> None:
    class Named(msgspec.Struct):
        name: str
        amount: Decimal

    assert decode.decoder(Named)(b'{"name":"NaN","amount":"1.10"}') == Named("NaN", Decimal("1.10"))


class Wrapped(pydantic.BaseModel):
    body: pydantic.Json[Price]
    note: str = ""


@pytest.mark.parametrize("inner", ['{"amount": 12345678901234567.89}', '{"amount": 0.12345678901234567890}'])
def test_digits_that_json_inside_text_would_lose_are_refused(inner: str) -> None:
    with pytest.raises(Unfit, match="inside JSON text"):
        decode.decoder(Wrapped)(json.dumps({"body": inner}).encode())


@pytest.mark.parametrize(
    "inner", ['{"amount": "12345678901234567.89"}', '{"amount": 10.1}', '{"amount": 12345678901234567}']
)
def test_json_inside_text_keeps_digits_that_it_can_keep(inner: str) -> None:
    decoded = decode.decoder(Wrapped)(json.dumps({"body": inner, "note": "[1.1"}).encode())
    assert decoded.body.amount == Decimal(str(json.loads(inner, parse_float=Decimal)["amount"]))


class Fee(pydantic.BaseModel):
    amount: Decimal
    fee: float = 0.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _add(cls, data: Any) -> Any:
        return {**data, "fee": data["amount"] * 0.5}


def test_a_validator_that_takes_floats_only_reads_what_a_float_keeps() -> None:
    assert decode.decoder(Fee)(b'{"amount": 10.10}').fee == 5.05
    with pytest.raises(Unfit, match="TypeError; a number has more digits"):
        decode.decoder(Fee)(b'{"amount": 12345678901234567.89}')
