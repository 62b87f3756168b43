"""Canonical bytes of decoded values, and a check for finite numbers.

Knows the containers and scalars that JSON decoders return; knows no handler. Two values have the same canonical bytes
exactly if they are equal, whatever the order of keys, white space, and the notation of numbers and times. The bytes are
the same in every process and release, because fingerprints of them are stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from typing import Any
from uuid import UUID

import msgspec

_DEPTH_MAX = 200  # levels of containers; the digest of a value must not depend on where it is computed
_DIGITS_MAX = 400  # a float has at most 309 digits before the point


def fields_of(value: Any) -> Iterable[tuple[str, Any]] | None:
    """Return the names and values of a value's fields.

    For a Struct, a pydantic model, a dataclass or an attrs class; None for anything else.
    """
    kind = type(value)
    if isinstance(value, msgspec.Struct):
        return [(name, getattr(value, name)) for name in kind.__struct_fields__]
    if hasattr(kind, "__pydantic_fields__") and not dataclasses.is_dataclass(kind):
        fields = [(name, getattr(value, name)) for name in kind.__pydantic_fields__]
        extra = getattr(value, "__pydantic_extra__", None)
        return [*fields, ("[...]", extra)] if extra else fields
    if dataclasses.is_dataclass(kind):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(kind)]
    if hasattr(kind, "__attrs_attrs__"):
        return [(field.name, getattr(value, field.name)) for field in kind.__attrs_attrs__]
    return None


def not_finite(value: Any) -> str | None:
    """Return the path of a number that is not finite, if any.

    It has the names of declared fields only.
    """
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        place, part = todo.pop()
        if isinstance(part, float):
            if not math.isfinite(part):
                return place or "value"
        elif isinstance(part, Decimal):
            if not part.is_finite():
                return place or "value"
        elif part is None or isinstance(part, str | int | bytes):
            continue
        elif isinstance(part, Mapping):
            todo.extend((f"{place}[...]", item) for pair in part.items() for item in pair)
        elif isinstance(part, Sequence | Set):
            todo.extend((f"{place}[...]", item) for item in part)
        elif (fields := fields_of(part)) is not None:
            todo.extend((f"{place}.{name}" if place else name, item) for name, item in fields)
    return None


def canonical(value: Any, depth: int = 0) -> bytes:
    """Return the canonical bytes of a value.

    Raises TypeError for a type that has none, and RecursionError beyond _DEPTH_MAX levels: the interpreter's own limit
    may be too high for its stack, once a library has raised it.
    """
    if depth > _DEPTH_MAX:
        raise RecursionError
    inner = depth + 1
    match value:
        case None:
            return b"n"
        case msgspec.UnsetType():
            return b"-"
        case bool():  # JSON's true is not 1, although Python's is
            return b"t" if value else b"f"
        case Enum():
            return canonical(value.value, inner)
        case int() | float() | Decimal():
            return _framed(b"#", _number(value))
        case str():
            return _framed(b"s", value.encode("utf-8", "surrogatepass"))
        case bytes() | bytearray() | memoryview():
            return _framed(b"b", bytes(value))
        case UUID():
            return b"u" + value.bytes
        case Mapping():
            return _unordered(b"{", [canonical(key, inner) + canonical(item, inner) for key, item in value.items()])
        case _:
            pass
    if (fields := fields_of(value)) is not None:
        items = [canonical(name) + canonical(item, inner) for name, item in fields]
        tag = getattr(getattr(type(value), "__struct_config__", None), "tag", None)  # which member of a union it is
        return _unordered(b"{", items if tag is None else [*items, canonical(None) + canonical(tag)])
    if isinstance(value, Sequence):
        return _framed(b"[", b"".join([canonical(element, inner) for element in value]))
    if isinstance(value, Set):
        return _unordered(b"<", [canonical(element, inner) for element in value])
    return _framed(b"o", _text_of(value).encode())


def _framed(kind: bytes, body: bytes) -> bytes:
    """Prefix the length, so that different sequences have different bytes."""
    return b"%s%d:%s" % (kind, len(body), body)


def _unordered(kind: bytes, items: list[bytes]) -> bytes:
    return _framed(kind, b"".join(sorted(items)))


def _number(value: int | float | Decimal) -> bytes:
    """One text for equal numbers: 1, 1.0 and Decimal("1.00") are one."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(float(value)).encode()
        if not value.is_integer():
            return repr(float(value)).encode()
        value = int(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return str(value).lower().replace("infinity", "inf").encode()
        sign, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        text = "".join(map(str, digits)).lstrip("0")
        short = text.rstrip("0")
        exponent += len(text) - len(short)
        if not short:
            return b"0x0"
        if not 0 <= exponent <= _DIGITS_MAX:
            shown = float(value) if abs(exponent) < _DIGITS_MAX else None
            if shown is not None and Decimal(repr(shown)) == value:
                return repr(shown).encode()  # like a float with the same digits
            return f"{'-' * sign}{short}e{exponent}".encode()
        value = int(short) * 10**exponent * (-1 if sign else 1)
    return hex(int(value)).encode()


def _text_of(value: Any) -> str:
    """Return the text of a scalar of another type.

    Times are in UTC; secrets and addresses as they were sent.
    """
    kind = type(value)
    if kind.__module__ == "datetime":
        offset = value.utcoffset() if hasattr(value, "utcoffset") else None
        if offset is not None and hasattr(value, "date"):  # equal instants in two time zones are equal
            try:
                return f"{(value - offset).replace(tzinfo=None).isoformat()}Z"
            except OverflowError:  # in UTC, outside the years 1 to 9999: 0001-01-01T00:00:00+01:00 is .NET's empty time
                clock = (value.hour * 60 + value.minute) * 60 + value.second
                seconds = (value.toordinal() - offset.days) * 86_400 + clock - offset.seconds
                return f"{seconds * 10**6 + value.microsecond - offset.microseconds}Z"
        if hasattr(value, "isoformat"):
            return str(value.isoformat())
        return f"{value.days}:{value.seconds}:{value.microseconds}"
    if hasattr(value, "get_secret_value"):
        return blake2b(canonical(value.get_secret_value())).hexdigest()
    if kind.__module__.split(".")[0] in ("ipaddress", "pathlib", "pydantic", "pydantic_core", "pydantic_extra_types"):
        return str(value)
    if isinstance(value, msgspec.Raw):
        return canonical(msgspec.json.decode(value)).hex()
    raise TypeError(f"a {kind.__name__}")
