"""Reads pydantic models from JSON without losing digits.

Numbers that are not finite are refused.

pydantic reads a JSON number with a point as a float before a Decimal or an int sees it. So where a float would lose
digits, the JSON is parsed here, with such numbers as Decimals, and the model validates the result. That is correct only
if the model reads the parsed form exactly as it reads the JSON; else the number is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from consumer.core.values import fields_of, not_finite

_POINT = re.compile(rb"[0-9][.eE]")
_LONG = re.compile(rb"[0-9.]{16}|[0-9][eE]")  # without a Decimal in the type, only digits beyond a float's are lost
_MAYBE_NOT_FINITE = re.compile(rb"nan|inf|\\|[eE]\+?[0-9]{3}|[0-9_]{200}", re.IGNORECASE)
_INTEGER_DIGITS_MAX = 400
_LOST_IN_TEXT = "a number inside JSON text has more digits than Json[…] keeps: send it as text, or send the JSON itself"
LOST_DIGITS = "a number has more digits than the type keeps: send it as text, or declare a Decimal"


class Unfit(ValueError):
    """Bytes that a type refused; the text quotes no values."""


class Number(Decimal):
    """A number with more digits than a float keeps."""


class Numbers:
    """Reads JSON numbers as floats, or without loss as Number.

    For numbers with a point or an exponent. exactly: keep also trailing zeros, which count in a Decimal only.
    """

    def __init__(self, exactly: bool = True) -> None:
        self.exactly = exactly
        self.any = False  # whether there was a Number since the last reset
        self.any_lost = False  # whether a float would have another value

    def read(self, text: str) -> float | Number:
        number = float(text)
        if repr(number) == text and abs(number) < 2**53:
            return number
        exact = Number(text)
        is_same = math.isfinite(number) and Decimal(repr(number)) == exact and _is_itself(number)
        if is_same and (not self.exactly or Decimal(repr(number)).as_tuple() == exact.as_tuple()):
            return number
        self.any = True
        self.any_lost = self.any_lost or not is_same
        return exact

    def reset(self) -> None:
        """Forget what was read."""
        self.any = self.any_lost = False

    def plain(self, value: Any) -> Any:
        """Return the value with floats for the Numbers left in it; reset."""
        if self.any:
            value = plain(value)
        self.reset()
        return value


def _is_itself(number: float) -> bool:
    """Return whether int() of a float has the digits of its text.

    1e23 has not: it is 99999999999999991611392.
    """
    return not number.is_integer() or Decimal(number) == Decimal(repr(number))


def plain(value: Any) -> Any:
    """Return the value with floats for Numbers; changes containers in place."""
    match value:
        case Number():
            return float(value)
        case dict():
            for key, item in value.items():
                value[key] = plain(item)
        case list():
            value[:] = map(plain, value)
        case tuple() | set() | frozenset() if type(value) in (tuple, set, frozenset):
            return type(value)(map(plain, value))
        case msgspec.Struct():
            for name in value.__struct_fields__:
                msgspec.structs.force_setattr(value, name, plain(getattr(value, name)))
        case _ if (fields := fields_of(value)) is not None:
            for name, item in fields:
                if name == "[...]":
                    plain(item)
                else:
                    object.__setattr__(value, name, plain(item))
        case _:
            pass
    return value


def check_finite(value: Any, raw: bytes) -> Any:
    """Return the value; raise Unfit for a number that is not finite.

    raw: its bytes, which show whether one is possible.
    """
    if _MAYBE_NOT_FINITE.search(raw) and (place := not_finite(value)) is not None:
        raise Unfit(f"{place}: a number that is not finite; allow_nan=True of the handler would take it")
    return value


class Model:
    """A compiled pydantic type. Raises what pydantic raises for a bad type."""

    def __init__(self, declared: Any, *, allow_nan: bool) -> None:
        from pydantic import TypeAdapter, ValidationError  # only when a handler declares a pydantic type

        self._adapter: Any = TypeAdapter(declared)
        self._refusal = ValidationError
        self._names = _names(self._adapter)
        self._allow_nan = allow_nan
        self._exactly = _has("decimal", self._adapter)
        self._reads_text = self._exactly and _has("json", self._adapter)  # pydantic.Json, whose numbers are floats
        self._loses_digits = (_POINT if self._exactly else _LONG).search

    def from_bytes(self, raw: bytes) -> Any:
        """Read JSON. Raises Unfit."""
        value = self._read(raw)
        return value if self._allow_nan else check_finite(value, raw)

    def from_tree(self, tree: Any) -> Any:
        """Read parsed JSON, from inside a value of another type. Raises Unfit."""
        if not_finite(tree) is not None:  # JSON has no such numbers
            return self._validate(self._adapter.validate_python, plain(tree))
        # Encoded again, since a model may read JSON in another way than Python's values.
        return self.from_bytes(msgspec.json.encode(tree, enc_hook=_encoded))

    def from_value(self, value: object) -> Any:
        """Validate Python values. Raises Unfit."""
        return self._validate(self._adapter.validate_python, value)

    def _read(self, raw: bytes) -> Any:
        value = self._validate(self._adapter.validate_json, raw)
        if not self._loses_digits(raw):
            return value
        numbers = Numbers(self._exactly)
        try:
            tree = json.loads(raw, parse_float=numbers.read)
            if self._reads_text and _loses_in_text(tree):
                raise Unfit(_LOST_IN_TEXT)
        except Unfit:
            raise
        except (ValueError, RecursionError):  # more than Python's parser takes
            raise Unfit(LOST_DIGITS) from None
        return self._exact(raw, tree, value, numbers.any_lost) if numbers.any else value

    def _exact(self, raw: bytes, tree: Any, value: Any, any_lost: bool) -> Any:
        """Return the value with all digits, if the type allows it.

        Otherwise return it as it is, or raise Unfit if digits are lost.
        """
        try:
            same = self._is_same(self._adapter.validate_python(json.loads(raw)), value)
            exact = self._adapter.validate_python(tree)
        except Exception as error:  # a validator of the application may accept floats only, and may raise anything
            if any_lost:
                what = self._text(error) if isinstance(error, self._refusal) else type(error).__name__
                raise Unfit(f"{what}; {LOST_DIGITS}") from None
            return value
        if same:
            return plain(exact)
        if any_lost:
            raise Unfit(LOST_DIGITS)
        return value

    def _is_same(self, one: Any, other: Any) -> bool:
        """Return whether two values are equal, apart from defaults.

        Defaults may differ from call to call.
        """
        if one == other:
            return True
        one, other = (self._adapter.dump_python(model, exclude_unset=True, warnings=False) for model in (one, other))
        return bool(one == other)

    def _validate(self, validate: Callable[[Any], Any], given: Any) -> Any:
        try:
            return validate(given)
        except self._refusal as error:
            raise Unfit(self._text(error)) from None

    def _text(self, error: Any) -> str:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        return "; ".join(f"{_path(fault['loc'], self._names)}: {fault['type']}" for fault in errors[:5])


def _encoded(value: Any) -> Any:
    """Return a Number as JSON; msgspec writes other Decimals as text."""
    return msgspec.Raw(str(value).encode())


def _loses_in_text(tree: Any) -> bool:
    """Return whether JSON inside a text has a number that floats change."""
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            numbers = Numbers()
            try:
                todo.append(json.loads(value, parse_float=numbers.read))
            except ValueError:
                continue  # other text
            if numbers.any_lost:
                return True
    return False


def _has(kind: str, adapter: Any) -> bool:
    """Return whether a type has a pydantic schema of this kind inside.

    True where that is unknown.
    """
    seen: set[int] = set()
    todo = [getattr(adapter, "core_schema", None)]
    if todo == [None]:
        return True
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            if value.get("type") == kind:
                return True
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
    return False


def _names(adapter: Any) -> set[str]:
    """Return the names of fields, which errors may show.

    All other names in an error's path come from the bytes.
    """
    try:
        todo = [adapter.json_schema()]
    except Exception:  # a type without a JSON schema: then no name is shown
        return set()
    names: set[str] = set()
    while todo:
        schema = todo.pop()
        if isinstance(schema, dict):
            names |= set(schema.get("properties", {}))
            todo.extend(schema.values())
        elif isinstance(schema, list):
            todo.extend(schema)
    return names


def _path(place: tuple[int | str, ...], names: set[str]) -> str:
    return ".".join(str(part) if isinstance(part, int) or part in names else "[...]" for part in place) or "value"
