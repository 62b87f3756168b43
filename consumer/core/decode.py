"""From bytes to the type that a handler declares. Knows types and JSON; knows no topic.

bytes stay bytes, str is UTF-8, a pydantic model validates itself, everything else is msgspec's: Struct, dataclass,
TypedDict, dict, list, numbers and unions of them. Compiled once for each handler.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from consumer.core.errors import RegistrationError

Decoder: TypeAlias = Callable[[bytes], Any]


def takes_none(declared: Any) -> bool:
    """Whether a null value (a tombstone) is a value of the declared type."""
    return declared in (None, type(None), Any) or type(None) in members(declared)


def members(declared: Any) -> tuple[Any, ...]:
    """The members of a union, or nothing."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return ()


def decoder(declared: Any) -> Decoder:
    """A function from bytes to `declared`, raising any exception for bytes that are not of the type.

    Raises RegistrationError for a type that cannot be decoded from JSON.
    """
    parts = [part for part in members(declared) if part is not type(None)]
    bare = parts[0] if len(parts) == 1 else declared
    if bare is bytes:
        return bytes
    if bare is str:
        return lambda value: value.decode("utf-8")
    if any(hasattr(part, "__pydantic_validator__") or _is_pydantic(part) for part in parts or [bare]):
        return _pydantic(declared)
    try:
        return msgspec.json.Decoder(bare).decode
    except (TypeError, NameError, RuntimeError) as error:
        raise RegistrationError(f"cannot decode JSON to {declared!r}: {error}") from None


def _is_pydantic(part: Any) -> bool:
    return hasattr(part, "__pydantic_core_schema__") or hasattr(part, "__get_pydantic_core_schema__")


def _pydantic(declared: Any) -> Decoder:
    from pydantic import TypeAdapter  # only when a handler declares a pydantic type

    validate: Decoder = TypeAdapter(declared).validate_json
    return validate


def explain(error: BaseException) -> str:
    """What was wrong with the bytes, without the bytes: pydantic's own text would quote them."""
    if isinstance(error, msgspec.MsgspecError):
        return str(error)
    errors = getattr(error, "errors", None)
    if callable(errors) and hasattr(error, "title"):
        found = errors(include_url=False, include_context=False, include_input=False)
        return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}" for each in found[:5])
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    return type(error).__name__
