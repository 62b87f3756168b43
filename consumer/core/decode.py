"""From bytes to the type that a handler declares. Knows types and JSON; knows no topic.

bytes stay bytes, str is UTF-8, a pydantic model validates itself, everything else is msgspec's: Struct, dataclass,
TypedDict, dict, list, numbers and unions of them, with pydantic models inside them if need be. Compiled once for each
handler. What is said of bytes that do not fit never quotes them.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeAlias

import msgspec

from consumer.core.errors import RegistrationError

Decoder: TypeAlias = Callable[[bytes], Any]

# msgspec quotes what it did not expect: an enum's value, a union's tag, the name of a field. Its paths name only fields
# of the declared type.
_QUOTING = re.compile(r"(Invalid (?:enum )?value) '.*'( - at `\$(?:\.\w+|\[\.\.\.\]|\[\d+\])*`)?", re.DOTALL)
_UNKNOWN_FIELD = "Object contains unknown field"


class Unfit(ValueError):
    """Bytes that a pydantic type refused. Its text says where and why, and quotes nothing of them."""


def bare(declared: Any) -> Any:
    """The type without the Annotated around it."""
    return typing.get_args(declared)[0] if typing.get_origin(declared) is Annotated else declared


def takes_none(declared: Any) -> bool:
    """Whether a null value (a tombstone) is a value of the declared type."""
    return declared in (None, type(None), Any) or type(None) in members(declared)


def members(declared: Any) -> tuple[Any, ...]:
    """The members of a union, or nothing."""
    declared = bare(declared)
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return ()


def decoder(declared: Any) -> Decoder:
    """A function from bytes to `declared`, raising any exception for bytes that are not of the type.

    Raises RegistrationError for a type that cannot be decoded from JSON.
    """
    parts = [part for part in members(declared) if part is not type(None)]
    plain = bare(parts[0] if len(parts) == 1 else declared)
    if plain is bytes:
        return bytes
    if plain is str:
        return lambda value: value.decode("utf-8")
    try:
        if any(_is_pydantic(bare(part)) for part in parts or [declared]):
            return _pydantic(declared)
        wanted = parts[0] if len(parts) == 1 else declared
        models = [each for each in _foreign(msgspec.inspect.type_info(wanted)) if _must_be_pydantic(each)]
        if not models:
            return msgspec.json.Decoder(wanted).decode
        inner = {model: _pydantic(model) for model in models}
        # Encoded again, since a model may read JSON otherwise than it reads Python's values.
        return msgspec.json.Decoder(wanted, dec_hook=lambda kind, found: inner[kind](msgspec.json.encode(found))).decode
    except Exception as error:  # each library has its own for a type that it cannot take
        raise RegistrationError(f"cannot decode JSON to {declared!r}: {error}") from None


def _is_pydantic(part: Any) -> bool:
    return any(
        hasattr(part, each)
        for each in ("__pydantic_validator__", "__pydantic_core_schema__", "__get_pydantic_core_schema__")
    )


def _must_be_pydantic(part: Any) -> bool:
    if part is object:
        return False  # anything
    if not _is_pydantic(part):
        raise TypeError(f"{getattr(part, '__name__', part)} is neither of JSON's types nor one that is made from them")
    return True


def _foreign(info: Any) -> Iterator[Any]:
    """The classes inside a type that msgspec does not know."""
    seen: set[int] = set()
    todo = [info]
    while todo:
        each = todo.pop()
        if isinstance(each, tuple | list):
            todo.extend(each)
        elif isinstance(each, msgspec.inspect.Type | msgspec.inspect.Field) and id(each) not in seen:
            seen.add(id(each))
            if isinstance(each, msgspec.inspect.CustomType):
                yield each.cls
            todo.extend(getattr(each, name) for name in each.__struct_fields__)


def _pydantic(declared: Any) -> Decoder:
    from pydantic import TypeAdapter, ValidationError  # only when a handler declares a pydantic type

    adapter: Any = TypeAdapter(declared)
    names = _names(adapter)

    def validate(value: bytes) -> Any:
        try:
            return adapter.validate_json(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise Unfit("; ".join(f"{_path(each['loc'], names)}: {each['type']}" for each in found[:5])) from None

    return validate


def _names(adapter: Any) -> set[str]:
    """Names of fields, which may be told; all other names in an error's place come from the bytes."""
    try:
        todo = [adapter.json_schema()]
    except Exception:  # a type whose JSON cannot be described: then no name is told
        return set()
    names: set[str] = set()
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            names |= set(each.get("properties", {}))
            todo.extend(each.values())
        elif isinstance(each, list):
            todo.extend(each)
    return names


def _path(place: tuple[int | str, ...], names: set[str]) -> str:
    return ".".join(str(each) if isinstance(each, int) or each in names else "[...]" for each in place) or "value"


def explain(error: BaseException) -> str:
    """What was wrong with the bytes, without the bytes."""
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
