"""Decodes bytes to the type that a handler declares.

Knows types and JSON; knows no topic. bytes stay bytes, str is UTF-8, a pydantic model validates itself (models.py),
everything else is msgspec's: Struct, dataclass, TypedDict, dict, list, numbers and unions of them, with pydantic models
inside them if need be. Compiled once for each handler. Errors about bytes that do not fit never quote them.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Annotated, Any, TypeAlias

import msgspec

from consumer.core import models
from consumer.core.constraints import is_pydantic
from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.models import Model, Unfit, check_finite
from consumer.core.outcome import Reason

Decoder: TypeAlias = Callable[[bytes], Any]

# msgspec quotes what it did not expect: an enum's value, a union's tag, the name of a field. Its paths name only fields
# of the declared type.
_QUOTING = re.compile(r"(Invalid (?:enum )?value) '.*'( - at `\$(?:\.\w+|\[\.\.\.\]|\[\d+\])*`)?", re.DOTALL)
_UNKNOWN_FIELD = "Object contains unknown field"
_BOM = b"\xef\xbb\xbf"
_LITERAL = re.compile(
    rb"\b(?:NaN|Infinity)\b|[eE]\+?[0-9]{3}|[0-9]{200}"
)  # numbers that JSON parsers refuse or overflow


def bare(declared: Any) -> Any:
    """Return a type without the Annotated around it."""
    return typing.get_args(declared)[0] if typing.get_origin(declared) is Annotated else declared


def takes_none(declared: Any) -> bool:
    """Return whether the declared type includes None (a tombstone)."""
    return declared in (None, type(None), Any) or type(None) in members(declared)


def members(declared: Any) -> tuple[Any, ...]:
    """Return the members of a union; empty for other types."""
    declared = bare(declared)
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return ()


def decoder(declared: Any, *, allow_nan: bool = False) -> Decoder:
    """Return a function that decodes bytes to `declared`.

    It raises any exception for bytes that are not of the type. allow_nan: accept numbers that are not finite. Raises
    RegistrationError for a type that cannot be decoded from JSON.
    """
    parts = [part for part in members(declared) if part is not type(None)]
    wanted = parts[0] if len(parts) == 1 else declared
    plain = bare(wanted)
    try:
        if plain in (bytes, str):
            return _unparsed(plain, wanted if wanted is not plain else declared)
        if any(is_pydantic(bare(part)) for part in parts or [declared]):
            return Model(declared, allow_nan=allow_nan).from_bytes
        return _msgspec(wanted, allow_nan)
    except Exception as error:  # each library has its own for a type that it cannot take
        raise RegistrationError(
            f"{declared!r}: JSON cannot be decoded to it ({error}); annotate another type"
        ) from None


def _unparsed(plain: type, declared: Any) -> Decoder:
    """Return a decoder for bytes or text, with the annotation's constraints.

    Text loses its byte order mark.
    """
    limited = declared if typing.get_origin(declared) is Annotated else None
    if plain is bytes:
        return bytes if limited is None else lambda value: msgspec.convert(value, limited)
    if limited is None:
        return lambda value: value.removeprefix(_BOM).decode("utf-8")
    return lambda value: msgspec.convert(value.removeprefix(_BOM).decode("utf-8"), limited)


def _msgspec(wanted: Any, allow_nan: bool) -> Decoder:
    """Return msgspec's decoder, in which pydantic models decode themselves."""
    inside = list(_inside(msgspec.inspect.type_info(wanted)))
    inner = {
        node.cls: Model(node.cls, allow_nan=allow_nan)
        for node in inside
        if isinstance(node, msgspec.inspect.CustomType) and _must_be_pydantic(node.cls)
    }
    decode = _with_models(wanted, inner, allow_nan) if inner else msgspec.json.Decoder(wanted).decode
    has_decimals = any(isinstance(node, msgspec.inspect.DecimalType) for node in inside)
    if allow_nan:
        return _lenient(decode, wanted, inner, has_decimals)
    if has_decimals:
        # msgspec's floats are finite; its Decimals are read from text, which may say NaN.
        return lambda value: check_finite(decode(value), value)
    return decode


def _with_models(wanted: Any, inner: dict[Any, Model], allow_nan: bool) -> Decoder:
    numbers = models.Numbers()
    decode = msgspec.json.Decoder(
        wanted, dec_hook=lambda kind, tree: inner[kind].from_tree(tree), float_hook=numbers.read
    ).decode
    if allow_nan:
        return lambda value: numbers.plain(decode(value))
    return lambda value: check_finite(numbers.plain(decode(value)), value)


def _lenient(decode: Decoder, wanted: Any, inner: dict[Any, Model], has_decimals: bool) -> Decoder:
    """Return a decoder that also accepts numbers that are not finite.

    Those are the literals NaN and Infinity, and numbers beyond a float's range, which msgspec refuses.
    """

    def number(text: str) -> float | Decimal:
        return Decimal(text) if has_decimals and math.isfinite(float(text)) else float(text)

    def read(value: bytes) -> Any:
        try:
            return decode(value)
        except msgspec.MsgspecError:
            if not _LITERAL.search(value):
                raise
            tree = json.loads(value, parse_float=number)
            return msgspec.convert(tree, wanted, dec_hook=lambda kind, value: inner[kind].from_tree(value))

    return read


def _must_be_pydantic(part: Any) -> bool:
    if part is object:
        return False  # anything
    if not is_pydantic(part):
        raise TypeError(
            f"{getattr(part, '__name__', part)} is no type of JSON, and none that msgspec converts from them"
        )
    return True


def _inside(info: Any) -> Iterator[Any]:
    """Yield all types inside a type, as msgspec describes them."""
    seen: set[int] = set()
    todo = [info]
    while todo:
        node = todo.pop()
        if isinstance(node, tuple | list):
            todo.extend(node)
        elif isinstance(node, msgspec.inspect.Type | msgspec.inspect.Field) and id(node) not in seen:
            seen.add(id(node))
            yield node
            todo.extend(getattr(node, name) for name in node.__struct_fields__)


def read_again(decoder: Decoder, value: bytes, error: Exception) -> Any:
    """Decode again without the byte order mark.

    error: what the decoder raised first. Raises Unreadable with the reason.
    """
    if value.startswith(_BOM):
        try:
            return decoder(value.removeprefix(_BOM))
        except Exception as failure:
            error = failure
    raise Unreadable(Reason.UNREADABLE, _format_of(value) or _literal_in(value, error) or explain(error)) from error


def _literal_in(value: bytes, error: Exception) -> str | None:
    is_syntax = isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError)
    if is_syntax and re.search(rb"\b(?:NaN|Infinity)\b", value):
        return "JSON is malformed, or has a number that is not finite; allow_nan=True of the handler would take it"
    return None


def _format_of(value: bytes) -> str | None:
    """Return which format bytes have instead of JSON, and what to do.

    None where their beginning does not show it.
    """
    first = value[:4]
    if first[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(value) > 3 and (first[:2].count(0) == 1 == first[2:].count(0))):
        return "JSON in UTF-16 or UTF-32: send it as UTF-8, or annotate the payload as bytes"
    if first == b"\0\0\xfe\xff" or (first[:3] == b"\0\0\0" and value[4:7] == b"\0\0\0"):
        return "JSON in UTF-16 or UTF-32: send it as UTF-8, or annotate the payload as bytes"
    if first[:1] == b"\0" and len(value) > 5:
        return (
            f"Confluent's wire format (schema id {int.from_bytes(value[1:5])}): give the handler decode=Avro(), JsonSchema() or "
            "Protobuf() of consumer.decoders"
        )
    if first[:2] == b"\x1f\x8b":
        return "compressed with gzip by its producer: use the producer's compression setting, or annotate it as bytes"
    return None


def explain(error: BaseException) -> str:
    """Return what is wrong with the bytes, without quoting them."""
    match error:
        case Unfit():
            return str(error)
        case msgspec.MsgspecError() if isinstance(error.__cause__, Unfit):
            return str(error.__cause__)
        case msgspec.MsgspecError() if error.__cause__ is not None:
            return f"{type(error.__cause__).__name__} in a check of the type"  # whose text is its author's
        case msgspec.MsgspecError():
            text = str(error)
            if text.startswith(_UNKNOWN_FIELD):
                return _UNKNOWN_FIELD
            if quoting := _QUOTING.fullmatch(text):
                return quoting[1] + (quoting[2] or "")
            return text
        case UnicodeDecodeError():
            return f"not UTF-8: {error.reason} at byte {error.start}"
        case _:
            return type(error).__name__
