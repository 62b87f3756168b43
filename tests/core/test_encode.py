"""A pydantic model is the same JSON wherever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
import pytest

from consumer.core.encode import to_json

pytestmark = pytest.mark.unit


class Model(pydantic.BaseModel):
    id: int

    @pydantic.field_serializer("id", when_used="json")
    def as_text(self, id: int) -> str:
        return f"n{id}"


class Rows(pydantic.RootModel[list[Model]]):
    pass


@dataclass
class Holder:
    model: Model


class Struct(msgspec.Struct):
    model: Model | None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Model(id=1), b'{"id":"n1"}'),
        (Rows([Model(id=1)]), b'[{"id":"n1"}]'),
        ((Model(id=1), None), b'[{"id":"n1"},null]'),
        ({"a": {"b": Model(id=1)}}, b'{"a":{"b":{"id":"n1"}}}'),
        (Holder(Model(id=1)), b'{"model":{"id":"n1"}}'),
        (Struct(Model(id=1)), b'{"model":{"id":"n1"}}'),
    ],
)
def test_a_model_is_the_same_json_wherever_it_is(value: Any, expected: bytes) -> None:
    assert to_json(value) == expected


@pytest.mark.parametrize("value", [object(), {"a": object()}])
def test_values_that_are_no_model_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="it holds a "):
        to_json(value)
