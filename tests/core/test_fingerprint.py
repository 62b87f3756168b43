"""Fingerprints are equal exactly where values are, in every process.

A fingerprint option of unknown form is refused at registration. A function that fails makes its message unreadable.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import subprocess
import sys
import uuid
from collections import OrderedDict
from contextlib import nullcontext
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core import fingerprint, identity
from consumer.core.decode import decoder
from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.outcome import Reason
from consumer.core.values import canonical, not_finite

pytestmark = pytest.mark.unit

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


class Colour(enum.Enum):
    RED = "red"


class Line(msgspec.Struct):
    price: Decimal
    count: int = 1


class Order(msgspec.Struct):
    id: str
    lines: list[Line] = []


class Model(pydantic.BaseModel):
    model_config = {"extra": "allow"}
    id: str
    price: Decimal = Decimal(1)


@dataclasses.dataclass
class Data:
    id: str


class Broken(dict[str, int]):
    def items(self) -> Any:
        raise ZeroDivisionError("CANARY")


class Attrs:
    """A class as attrs generates it; attrs itself is not needed."""

    __attrs_attrs__ = (SimpleNamespace(name="price"),)

    def __init__(self, price: Decimal) -> None:
        self.price = price


class Pair(NamedTuple):
    x: int
    y: int


def same(one: object, other: object) -> bool:
    """Equality as JSON knows it: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(JSON, JSON)
def test_two_values_have_one_canonical_form_exactly_if_they_are_equal(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == same(one, other)
    assert canonical(json.loads(json.dumps(one))) == canonical(one)


def model_of(**fields: Any) -> Model:
    """A Model with fields that it does not declare, too."""
    return Model.model_validate(fields)


UTC = datetime.UTC
CET = datetime.timezone(datetime.timedelta(hours=1))
EET = datetime.timezone(datetime.timedelta(hours=2))
EST = datetime.timezone(datetime.timedelta(hours=-5))
CST = datetime.timezone(datetime.timedelta(hours=-6))
EQUAL: list[tuple[Any, Any]] = [
    ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
    (1, 1.0),
    (1, Decimal("1.00")),
    (0, -0.0),
    (0, Decimal("-0.0")),
    (1500, Decimal("15e2")),
    (1e300, int(1e300)),
    (Decimal("0.10"), Decimal("0.1")),
    (0.1, Decimal("0.1")),
    (Decimal("1e-500"), Decimal("10e-501")),
    (Decimal("1e999999"), Decimal("10e999998")),
    ((1, 2), [1, 2]),
    (Pair(1, 2), [1, 2]),
    ({1, 2, 3}, frozenset([3, 2, 1])),
    (Colour.RED, "red"),
    (bytearray(b"x"), b"x"),
    (datetime.datetime(2024, 1, 1, 12, tzinfo=UTC), datetime.datetime(2024, 1, 1, 13, tzinfo=CET)),
    (Order("1", [Line(Decimal("1.10"))]), Order("1", [Line(Decimal("1.1"), 1)])),
    (msgspec.UNSET, msgspec.UNSET),
    (datetime.datetime(1, 1, 1, tzinfo=CET), datetime.datetime(1, 1, 1, 1, tzinfo=EET)),
    (datetime.datetime(9999, 12, 31, 23, tzinfo=EST), datetime.datetime(9999, 12, 31, 22, tzinfo=CST)),
    (model_of(id="1", more=1), model_of(id="1", price="1.0", more=1.0)),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (True, 1),
    (False, 0),
    (None, False),
    ("1", 1),
    ("a", b"a"),
    (["a", "b"], ["ab"]),
    ([["a"], "b"], [["a", "b"]]),
    ({"a": 1}, [["a", 1]]),
    ({"ab": "c"}, {"a": "bc"}),
    (2**53, 2**53 + 1),
    (0.1, 0.10000000000000002),
    (Decimal("12345678901234567.89"), Decimal("12345678901234567.88")),
    (datetime.datetime(2024, 1, 1, 12), datetime.datetime(2024, 1, 1, 12, tzinfo=UTC)),
    (msgspec.UNSET, None),
    (datetime.datetime(1, 1, 1, tzinfo=CET), datetime.datetime(1, 1, 1, tzinfo=EET)),
    (datetime.timedelta(1), datetime.timedelta(1, 0, 1)),
    (datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)),
    (uuid.UUID(int=1), uuid.UUID(int=2)),
    (model_of(id="1", more=1), model_of(id="1", more=2)),
    (Data("1"), Data("2")),
    (msgspec.defstruct("A", [("x", int)], tag="a")(1), msgspec.defstruct("B", [("x", int)], tag="b")(1)),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_values_have_one_canonical_form(one: Any, other: Any) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_have_different_forms(one: Any, other: Any) -> None:
    assert canonical(one) != canonical(other)


def test_the_form_does_not_depend_on_the_process() -> None:
    imports = "import uuid; from consumer.core.values import canonical; "
    value = '{"b": {3, 1, "x"}, "a": [1.5, None, uuid.UUID(int=7)]}'
    forms = [
        subprocess.run(
            [sys.executable, "-c", f"{imports}print(canonical({value}).hex())"],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert forms[0] == forms[1] != ""


def test_the_fingerprints_in_the_ledger_of_an_older_release_still_fit() -> None:
    rule = fingerprint.parse_rule("value")
    value = {"id": "p-1", "amount": Decimal("12.50"), "lines": [1, 2.5, None, True], "at": {"x": "é"}}
    assert fingerprint.of_value(rule, value) == 1233100237656560961


@pytest.mark.parametrize(("declared", "texts"), [
    (dict, [b'{"a":1,"b":[1.0]}', b'{ "b": [1], "a": 1.0 }', b'{"b":[1e0],"a":1}']),
    (Order, [b'{"id":"1","lines":[{"price":1.10}]}', b'{"lines":[{"count":1,"price":"1.1"}],"id":"1","sentAt":7}']),
    (Model, [b'{"id":"1","price":2.50}', b'{"price":"2.5","id":"1"}']),
])  # fmt: skip
def test_the_value_is_compared_however_it_was_written(declared: Any, texts: list[bytes]) -> None:
    rule, decode = fingerprint.parse_rule("value"), decoder(declared)
    assert len({fingerprint.of_value(rule, decode(text)) for text in texts}) == 1


def test_each_form_of_the_option_is_read() -> None:
    assert fingerprint.parse_rule("bytes") is fingerprint.BYTES
    assert fingerprint.parse_rule(None) is fingerprint.NOTHING
    assert fingerprint.of_value(fingerprint.NOTHING, {"a": 1}) == identity.NO_VALUE_FINGERPRINT
    amount = fingerprint.parse_rule(lambda value: (value["id"], value["amount"]))
    one, other = {"id": 1, "amount": 2, "attempt": 1}, {"id": 1, "amount": 2.0, "attempt": 2}
    assert fingerprint.of_value(amount, one) == fingerprint.of_value(amount, other)
    assert fingerprint.of_value(amount, one) != fingerprint.of_value(amount, {"id": 1, "amount": 3})
    for rule in (fingerprint.parse_rule("value"), amount):
        assert fingerprint.of_value(rule, None) == identity.NO_VALUE_FINGERPRINT


async def not_plain(value: object) -> object: ...


@pytest.mark.parametrize(
    "option",
    ["", "Value", "field:a", 7, True, b"bytes", dict, not_plain],
    ids=lambda option: getattr(option, "__name__", repr(option)),
)
def test_unknown_option_is_refused_with_the_forms_there_are(option: object) -> None:
    with pytest.raises(RegistrationError, match='"bytes", "value", a plain function of the value, or None'):
        fingerprint.parse_rule(option)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda value: value["CANARY"], "fingerprint function: KeyError"),
        (lambda value: object(), "a object cannot be compared"),
        (lambda value: Broken(), "fingerprint function: ZeroDivisionError"),
        (lambda value: [lambda: None], "a function cannot be compared"),
    ],
)
def test_a_function_that_gives_nothing_usable_makes_its_message_unreadable(function: Any, says: str) -> None:
    with pytest.raises(Unreadable, match=says) as caught:
        fingerprint.of_value(fingerprint.parse_rule(function), {})
    assert caught.value.reason == Reason.UNREADABLE and "CANARY" not in str(caught.value)


@pytest.mark.parametrize("limit", [1000, 200_000])
@pytest.mark.parametrize(("levels", "too_deep"), [(150, False), (250, True), (100_000, True)])
def test_a_value_that_is_nested_too_deeply_is_unreadable(levels: int, too_deep: bool, limit: int) -> None:
    """It is unreadable under any recursion limit: mypy sets a high one."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        with pytest.raises(Unreadable, match="too deeply") if too_deep else nullcontext():
            fingerprint.of_value(fingerprint.parse_rule("value"), value)
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": float("nan")}, "[...]"),
        (Order("1", [Line(Decimal("NaN"))]), "lines[...].price"),
        (model_of(id="1", more=float("inf")), "[...][...]"),
        (Attrs(Decimal("NaN")), "price"),
        (Decimal("-Infinity"), "value"),
        (Data(float("nan")), "id"),  # type: ignore[arg-type]
        ({float("nan"): 1}, "[...]"),
        (Order("1", [Line(Decimal(1))]), None),
        ("NaN", None),
    ],
)
def test_a_number_that_is_not_finite_is_found_and_named_by_its_field(value: Any, place: str | None) -> None:
    assert not_finite(value) == place
