"""Constraints in annotations are enforced, or refused at registration.

The refusal names the way that works.
"""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from typing import Annotated, Any, Generic, NamedTuple, NewType, Required, TypedDict, TypeVar

import annotated_types
import msgspec
import pydantic
import pytest
from pydantic import AfterValidator, Field, PositiveInt, StringConstraints

from consumer import App, Message, RegistrationError
from consumer.core import constraints, decode

pytestmark = pytest.mark.unit

Positive = Annotated[int, Field(gt=0)]
Gt = Annotated[int, annotated_types.Gt(0)]
T = TypeVar("T")


@dataclasses.dataclass
class Data:
    amount: Positive


@dataclasses.dataclass
class DecimalData:
    amount: Annotated[Decimal, Field(gt=0)]


@dataclasses.dataclass
class Defaulted:
    amount: int = Field(gt=0)


@dataclasses.dataclass
class Validated:
    amount: int

    @pydantic.field_validator("amount")
    @classmethod
    def _check(cls, value: int) -> int:
        raise ValueError


@dataclasses.dataclass
class Outer:
    inner: list[Data]


class Typed(TypedDict):
    amount: Required[Gt]


class Configured(TypedDict):
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]
    amount: int


class Struct(msgspec.Struct):
    amounts: list[Annotated[int, annotated_types.Interval(gt=0, lt=5)]]


class Optional(msgspec.Struct):
    amount: PositiveInt | None = None


class Child(Optional):
    other: int = 0


class Tuple(NamedTuple):
    name: Annotated[str, StringConstraints(pattern="x")]


class Box(msgspec.Struct, Generic[T]):
    inner: T


class Model(pydantic.BaseModel):
    amount: Positive


@pydantic.dataclasses.dataclass
class PydanticData:
    amount: Positive


@pydantic.dataclasses.dataclass
class PydanticBox(Generic[T]):
    amount: Positive
    inner: T


class DataHolder(msgspec.Struct):
    inner: PydanticData | None


@dataclasses.dataclass
class DataDataHolder:
    inner: PydanticBox[int]


class Wrong(pydantic.BaseModel):
    amount: Annotated[int, msgspec.Meta(gt=0)]


class Holder(msgspec.Struct):
    models: list[Wrong]


class Converted(msgspec.Struct):
    model: Annotated[Model, AfterValidator(lambda model: model)]


Alias = NewType("Alias", Gt)

REFUSED: list[tuple[Any, str]] = [
    (Data, r"pydantic\.Field on Data\.amount .*write msgspec\.Meta\(gt=0\), or make Data a pydantic model"),
    (DecimalData, "make DecimalData a pydantic model"),
    (Defaulted, r"pydantic\.Field as the default of Defaulted\.amount"),
    (Validated, r"the pydantic validator Validated\._check"),
    (Outer, r"Data\.amount"),
    (Typed, r"Gt on Typed\.amount .*msgspec\.Meta\(gt=0\)"),
    (Configured, "the pydantic configuration of Configured"),
    (Struct, r"Struct\.amounts .*msgspec\.Meta\(gt=0, lt=5\)"),
    (Optional, r"Optional\.amount"),
    (Child, r"amount"),
    (Tuple, r"Tuple\.name .*msgspec\.Meta\(pattern='x'\)"),
    (Box[Gt], "Gt on"),
    (Alias, "Gt on"),
    (Positive, "wrap the value in a pydantic model"),
    (Positive | None, "the payload"),
    (list[Gt], "the payload"),
    (dict[str, Gt], "the payload"),
    (tuple[Gt, ...], "the payload"),
    (tuple[Model, Gt], "Gt on"),
    (dict[str, Model | Gt], "Gt on"),
    (Data | int, r"Data\.amount"),
    (Annotated[str, annotated_types.MinLen(2)], r"msgspec\.Meta\(min_length=2\)"),
    (Annotated[bytes, annotated_types.MaxLen(2)], r"msgspec\.Meta\(max_length=2\)"),
    (pydantic.conint(gt=3), r"msgspec\.Meta\(gt=3\)"),
    (pydantic.StrictInt, "Strict on"),
    (Annotated[int, AfterValidator(abs)], "AfterValidator on"),
    (Annotated[int, lambda number: number > 0], "function on"),
    (Annotated[int, Field(alias="x")], r"pydantic\.Field on"),
    (Converted, "AfterValidator on"),
    (Wrong, r"Wrong\.amount: msgspec\.Meta has no effect .*pydantic\.Field"),
    (Holder, r"Wrong\.amount: msgspec\.Meta has no effect"),
    (DataHolder, r"PydanticData: a pydantic dataclass.*derive PydanticData from pydantic\.BaseModel"),
    (DataDataHolder, "PydanticBox: a pydantic dataclass"),
    (list[PydanticData], "PydanticData: a pydantic dataclass"),
    (dict[str, PydanticData | None], "PydanticData: a pydantic dataclass"),
]


@pytest.mark.parametrize(("declared", "says"), REFUSED)
def test_a_constraint_that_would_be_ignored_is_refused_with_what_works(declared: Any, says: str) -> None:
    async def handle(value: Any) -> None: ...

    for hint, options in ((declared, {}), (Message[declared], {}), (list[declared], {"batch": 5})):
        handle.__annotations__["value"] = hint
        with pytest.raises(RegistrationError, match=says) as caught:
            App("shop").handler("t", **options)(handle)  # type: ignore[call-overload]
        assert "\n" not in str(caught.value) and "'handle'" in str(caught.value)


class Enforced(msgspec.Struct):
    amount: Annotated[int, msgspec.Meta(gt=0)]


@dataclasses.dataclass
class EnforcedData:
    amount: Annotated[int, msgspec.Meta(gt=0)]


class PydanticHolder(msgspec.Struct):
    models: list[Model]


ENFORCED: list[tuple[Any, bytes, bytes]] = [
    (Enforced, b'{"amount":1}', b'{"amount":-5}'),
    (EnforcedData, b'{"amount":1}', b'{"amount":-5}'),
    (PydanticData, b'{"amount":1}', b'{"amount":-5}'),
    (PydanticBox[int], b'{"amount":1,"inner":1}', b'{"amount":-5,"inner":1}'),
    (Model, b'{"amount":1}', b'{"amount":-5}'),
    (Model | None, b'{"amount":1}', b'{"amount":-5}'),
    (PydanticHolder, b'{"models":[{"amount":1}]}', b'{"models":[{"amount":-5}]}'),
    (Annotated[int, msgspec.Meta(gt=0)], b"1", b"-5"),
    (Annotated[int, msgspec.Meta(gt=0)] | None, b"1", b"-5"),
    (list[Annotated[int, msgspec.Meta(gt=0)]], b"[1]", b"[-5]"),
    (Box[Annotated[int, msgspec.Meta(gt=0)]], b'{"inner":1}', b'{"inner":-5}'),
    (Annotated[str, msgspec.Meta(max_length=2)], b"ab", b"abc"),
    (Annotated[str, msgspec.Meta(pattern="^a")] | None, b"ab", b"ba"),
    (Annotated[bytes, msgspec.Meta(max_length=2)], b"\xff\xfe", b"\xff\xfe\xfd"),
]


@pytest.mark.parametrize(("declared", "good", "bad"), ENFORCED)
def test_a_constraint_that_is_taken_is_enforced(declared: Any, good: bytes, bad: bytes) -> None:
    constraints.check(declared)
    decoder = decode.decoder(declared)
    decoder(good)
    with pytest.raises(Exception):  # noqa: B017 - each library has its own
        decoder(bad)


@dataclasses.dataclass
class Described:
    amount: Annotated[int, "cents", Field(description="what is paid")]
    parts: list[Described]


def test_text_and_descriptions_constrain_nothing() -> None:
    for declared in (Described, Annotated[dict[str, Any], "raw"], list[Described] | None):
        constraints.check(declared)
