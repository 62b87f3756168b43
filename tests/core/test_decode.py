"""Payloads become values of the declared type, or raise.

Null is a value only where the type says so. A type that JSON cannot give is refused at registration. What `explain` says of
a failure quotes no value of the payload, because it is stored and logged where payloads may not be.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import uuid
from typing import Annotated, Any, Literal, Optional, TypedDict, Union

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core import decode
from consumer.core.errors import RegistrationError, Unreadable

pytestmark = pytest.mark.unit

CANARY = "CANARY-4929"


class Colour(enum.Enum):
    RED = "red"


class Struct(msgspec.Struct):
    id: str
    amount: int = 0
    colour: Colour = Colour.RED
    key: uuid.UUID | None = None
    counts: dict[str, int] = {}


Strict = msgspec.defstruct("Strict", [("id", str, "")], forbid_unknown_fields=True)
Paid = msgspec.defstruct("Paid", [("id", str)], tag="paid")
Refunded = msgspec.defstruct("Refunded", [("id", str)], tag="refunded")


class Checked(msgspec.Struct):
    id: str

    def __post_init__(self) -> None:
        raise ValueError(f"bad id {self.id}")


class Model(pydantic.BaseModel):
    id: str
    amount: int = 0
    colour: Literal["red"] = "red"
    counts: dict[str, int] = {}


class CheckedModel(pydantic.BaseModel):
    id: str

    @pydantic.field_validator("id")
    @classmethod
    def _check(cls, value: str) -> str:
        raise ValueError(f"bad id {value}")


StrictModel = pydantic.create_model("StrictModel", __config__={"extra": "forbid"}, id=(str, ""))


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Owner(pydantic.BaseModel):
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


Holder = msgspec.defstruct("Holder", [("model", Model)])


@dataclasses.dataclass
class Data:
    id: str
    amount: int = 0


class Typed(TypedDict):
    id: str
    amount: int


class Plain: ...


FIELDS = {"id": "a", "amount": 3}
JSON = b'{"id":"a","amount":3}'
VALUES: list[tuple[Any, bytes, object]] = [
    (Struct, JSON, Struct("a", 3)),
    (Model, JSON, Model(id="a", amount=3)),
    (Data, JSON, Data("a", 3)),
    (Typed, JSON, FIELDS),
    (dict, JSON, FIELDS),
    (dict[str, Any], JSON, FIELDS),
    (Any, JSON, FIELDS),
    (list[Struct], b"[" + JSON + b"]", [Struct("a", 3)]),
    (Paid | Refunded, b'{"type":"refunded","id":"a"}', Refunded("a")),
    (Cat | Dog, b'{"kind":"dog"}', Dog(kind="dog")),
    (int | str, b'"x"', "x"),
    (Struct | None, JSON, Struct("a", 3)),
    (Optional[Model], JSON, Model(id="a", amount=3)),  # noqa: UP045 - both spellings
    (str, '"é" is no JSON'.encode(), '"é" is no JSON'),
    (str | None, b"null", "null"),
    (bytes, b"\xff\x00{", b"\xff\x00{"),
    (bytes | None, b"\xff", b"\xff"),
]


@pytest.mark.parametrize(("declared", "payload", "value"), VALUES, ids=repr)
def test_a_payload_becomes_a_value_of_the_declared_type(declared: Any, payload: bytes, value: object) -> None:
    decoded = decode.decoder(declared)(payload)
    assert decoded == value
    assert type(decoded) is type(value)


@given(st.binary(max_size=30))
def test_bytes_are_handed_over_untouched_and_text_is_utf8_or_fails(payload: bytes) -> None:
    assert decode.decoder(bytes)(payload) == payload
    try:
        assert decode.decoder(str)(payload).encode() == payload.removeprefix(b"\xef\xbb\xbf")
    except UnicodeDecodeError as error:
        assert decode.explain(error).startswith("not UTF-8: ")


@pytest.mark.parametrize("declared", [Struct, Model, Data, Typed, dict, Paid | Refunded, Struct | None], ids=str)
@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b"7", b"\xff", b'{"id":1,"amount":"x"}{}', JSON + b"x"])
def test_payload_of_another_type_raises_and_is_explained(declared: Any, payload: bytes) -> None:
    with pytest.raises(Exception) as caught:
        decode.decoder(declared)(payload)
    assert decode.explain(caught.value)


@pytest.mark.parametrize("declared", [Struct | None, Optional[Model], Union[None, str, int], None, type(None), Any])  # noqa: UP007, UP045
def test_types_that_allow_null_take_a_null_value(declared: Any) -> None:
    assert decode.takes_none(declared)


@pytest.mark.parametrize("declared", [Struct, dict, list[int | None], dict[str, None], str | int, bytes, object])
def test_types_that_do_not_allow_null_refuse_it(declared: Any) -> None:
    assert not decode.takes_none(declared)


@pytest.mark.parametrize("declared", [Paid | Struct, str | bytes, 3, "Struct", list["Nowhere"]], ids=str)  # type: ignore[name-defined]  # noqa: F821
def test_a_type_that_json_cannot_give_is_refused(declared: Any) -> None:
    with pytest.raises(RegistrationError, match="JSON cannot be decoded to it"):
        decode.decoder(declared)


@pytest.mark.parametrize("declared", [Plain, complex, Model | Plain], ids=str)
def test_a_type_that_no_message_could_ever_satisfy_is_refused(declared: Any) -> None:
    with pytest.raises(RegistrationError):
        decode.decoder(declared)


@pytest.mark.parametrize("declared", [list[Model], dict[str, Model], Holder], ids=str)
def test_models_inside_other_types_are_refused_or_decoded(declared: Any) -> None:
    try:
        decoder = decode.decoder(declared)
    except RegistrationError:
        return
    assert decoder(b"[" + JSON + b"]" if declared == list[Model] else b'{"model":' + JSON + b"}")


QUOTED: list[tuple[Any, str]] = [
    (Struct, '{"id":"a","amount":"%s"}'),
    (Struct, '{"id":"a","key":"%s"}'),
    (Struct, '{"id":"a","counts":{"%s":"x"}}'),
    (Struct, '{"id":"a","amount":%s}'),
    (Data, '{"id":"a","amount":"%s"}'),
    (Typed, '{"id":"%s"}'),
    (int, "%s"),
    (Model, '{"id":"a","amount":"%s"}'),
    (Model, '{"id":"a","colour":"%s"}'),
    (Model, '{"id":["%s"]}'),
    (Model, '{"id":"%s'),
    (str, "%s\udcff"),
]
# What the libraries' own texts would quote: enum values, tags, keys, the texts of checks.
LEAKS: list[tuple[Any, str]] = [
    (Struct, '{"id":"a","colour":"%s"}'),
    (Literal["a"], '"%s"'),
    (Paid | Refunded, '{"type":"%s","id":"a"}'),
    (Strict, '{"%s":1}'),
    (Checked, '{"id":"%s"}'),
    (Model, '{"id":"a","counts":{"%s":"x"}}'),
    (StrictModel, '{"%s":1}'),
    (CheckedModel, '{"id":"%s"}'),
    (Owner, '{"pet":{"kind":"%s"}}'),
]


@pytest.mark.parametrize(("declared", "payload"), QUOTED + LEAKS, ids=str)
def test_an_explanation_quotes_no_value_of_the_payload(declared: Any, payload: str) -> None:
    with pytest.raises(Exception) as caught:
        decode.decoder(declared)((payload % CANARY).encode("utf-8", "surrogateescape"))
    assert CANARY not in decode.explain(caught.value)


@pytest.mark.parametrize("declared", [Struct, Model], ids=str)
def test_an_explanation_names_the_field(declared: Any) -> None:
    with pytest.raises(Exception) as caught:
        decode.decoder(declared)(b'{"id":"a","amount":"x"}')
    assert "amount" in decode.explain(caught.value) and "int" in decode.explain(caught.value)


def test_explanation_of_any_other_error_names_only_its_kind() -> None:
    assert decode.explain(RuntimeError(CANARY)) == "RuntimeError"


BODY = '{"id":"a","amount":3}'
FORMATS: list[tuple[bytes, str]] = [
    (BODY.encode("utf-16"), "UTF-16"),
    (BODY.encode("utf-16-le"), "UTF-16"),
    (BODY.encode("utf-16-be"), "UTF-16"),
    (BODY.encode("utf-32"), "UTF-16 or UTF-32"),
    (BODY.encode("utf-32-be"), "UTF-16 or UTF-32"),
    (b"\0\0\0\0\7" + JSON, "Confluent's wire format (schema id 7)"),
    (b"\0\0\1\x86\xa0\x02\x04", "Confluent's wire format (schema id 100000)"),
    (b"\x1f\x8b\x08\0", "gzip"),
    (b'{"id":NaN}', "not finite"),
    (b"{", "truncated"),
    (b"", "truncated"),
]


@pytest.mark.parametrize(("payload", "says"), FORMATS)
@pytest.mark.parametrize("declared", [Struct, dict])
def test_bytes_that_are_no_json_in_utf_8_are_named(declared: Any, payload: bytes, says: str) -> None:
    decoder = decode.decoder(declared)
    with pytest.raises(Unreadable, match=re.escape(says)):
        try:
            decoder(payload)
        except Exception as error:
            decode.read_again(decoder, payload, error)


@pytest.mark.parametrize("declared", [Struct, Model, Data, Typed, dict, Struct | None, list[int] | dict], ids=str)
def test_a_byte_order_mark_is_skipped(declared: Any) -> None:
    decoder = decode.decoder(declared)
    with pytest.raises(Exception) as caught:
        decoder(b"\xef\xbb\xbf" + JSON)
    assert decode.read_again(decoder, b"\xef\xbb\xbf" + JSON, caught.value) == decoder(JSON)
    assert decode.decoder(str)("\ufeffé".encode()) == "é"
    assert decode.decoder(bytes)(b"\xef\xbb\xbf") == b"\xef\xbb\xbf"


def test_constraints_inside_a_type_are_kept() -> None:
    decoder = decode.decoder(dict[str, Annotated[int, msgspec.Meta(ge=0)]])
    assert decoder(b'{"a":1}') == {"a": 1}
    with pytest.raises(msgspec.ValidationError):
        decoder(b'{"a":-1}')
