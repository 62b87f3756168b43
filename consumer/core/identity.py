"""What makes a message that message: 16 bytes from its declared id, and a fingerprint of its payload.

Knows records and rules; knows no ledger. A UUID (the 36-character form, in either case) is kept as it is, so that
time-ordered ids keep their locality in an index; anything else, of any length and any bytes, is a 128-bit BLAKE2b.
At 10**8 hashed ids the chance of any collision is about 1.5e-23 (birthday bound, n**2 / 2**129).
"""

from __future__ import annotations

import inspect
from binascii import unhexlify
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import Any, TypeAlias
from uuid import UUID

from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.message import Record
from consumer.core.outcome import Reason

NO_VALUE_FINGERPRINT = 0
_fingerprint = blake2b(digest_size=8)  # copied for each: a third cheaper than made anew
_signed = Struct(">q").unpack


@dataclass(frozen=True, slots=True)
class HeaderId:
    """The id is the value of a header; without it the message is a dead letter."""

    name: str


@dataclass(frozen=True, slots=True)
class DefaultId:
    """Header message-id, else ce_id, else the offset, which cannot recognise a message that was produced twice."""


@dataclass(frozen=True, slots=True)
class OffsetId:
    """The id is where the message lies in the log, by choice."""


@dataclass(frozen=True, slots=True)
class FieldId:
    """The id is a field of the decoded value, reached by attributes and keys."""

    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CallableId:
    """The id is what a function of the decoded value returns."""

    function: Callable[[Any], object]


IdRule: TypeAlias = HeaderId | DefaultId | OffsetId | FieldId | CallableId


def parse_rule(option: object) -> IdRule:
    """The rule behind ``message_id=``. Raises RegistrationError for anything that is not one of the forms."""
    if option is None:
        return DefaultId()
    if option == "offset":
        return OffsetId()
    if isinstance(option, str):
        kind, _, rest = option.partition(":")
        if kind == "header" and rest:
            return HeaderId(rest)
        if kind == "field" and rest and all(rest.split(".")):
            return FieldId(tuple(rest.split(".")))
    elif callable(option) and not inspect.iscoroutinefunction(option):
        return CallableId(option)
    raise RegistrationError(
        f'message_id={option!r}: use "header:NAME", "field:path.to", "offset" or a plain function of the value'
    )


def message_id(raw: bytes) -> bytes:
    """The 16 bytes under which an id is kept.

    Does not say whether two texts mean the same thing to their producer: "7" and "07" are two ids.
    """
    if len(raw) == 36 and raw[8:24:5] == b"----":
        digits = raw.replace(b"-", b"")
        if len(digits) == 32:  # the dashes are in their places, and there are no others
            try:
                return unhexlify(digits)
            except ValueError:
                pass  # no UUID after all: an id like any other
    return blake2b(raw, digest_size=16).digest()


def offset_id(record: Record, salt: bytes | None = None) -> bytes:
    """The id of a message that declares none: where it lies in the log. A copy of it elsewhere is another message.

    salt: tells a log from an earlier one of the same name, whose offsets were the same numbers.
    """
    return message_id(f"{record.topic}:{record.partition}:{record.offset}".encode() + (salt or b""))


def fingerprint(value: bytes | None) -> int:
    """64 signed bits of the payload: two messages of one id with different fingerprints are not the same message."""
    if value is None:
        return NO_VALUE_FINGERPRINT
    made = _fingerprint.copy()
    made.update(value)
    number: int = _signed(made.digest())[0]
    return number


def from_headers(record: Record, name: str) -> bytes | None:
    """The 16 bytes from the header `name`, None without one. Raises Unreadable for an empty or a repeated header."""
    found: bytes | None = None
    seen = False
    for key, value in record.headers:
        if key == name:
            if seen:
                raise Unreadable(Reason.AMBIGUOUS_MESSAGE_ID, f"several {name!r} headers")
            seen, found = True, value
    if not seen:
        return None
    if not found:
        raise Unreadable(Reason.NO_MESSAGE_ID, f"the header {name!r} is empty")
    return message_id(found)


def from_value(rule: FieldId | CallableId, value: object) -> bytes:
    """The 16 bytes from a decoded value. Raises Unreadable where the value has no usable id."""
    match rule:
        case FieldId(path):
            found = value
            for step in path:
                try:
                    found = found[step] if isinstance(found, dict) else getattr(found, step)
                except Exception:  # a property may raise anything
                    raise Unreadable(Reason.NO_MESSAGE_ID, f"no field {'.'.join(path)!r}") from None
            return from_object(found, f"the field {'.'.join(path)!r}")
        case CallableId(function):
            try:
                found = function(value)
            except Exception as error:
                raise Unreadable(Reason.NO_MESSAGE_ID, f"message_id function: {type(error).__name__}") from error
            return from_object(found, "the result of the message_id function")


def from_object(found: object, what: str) -> bytes:
    """The 16 bytes from an id as a Python value: a UUID, text, bytes or an integer, not empty."""
    if isinstance(found, UUID):
        return found.bytes
    if isinstance(found, str) and found:
        return message_id(found.encode("utf-8", "surrogatepass"))
    if isinstance(found, bytes) and found:
        return message_id(found)
    if isinstance(found, int) and not isinstance(found, bool):
        try:
            return message_id(str(found).encode())
        except ValueError:
            raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is a number of too many digits") from None
    if found is None or found in ("", b""):
        raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is empty")
    raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is a {type(found).__name__}: use text, bytes, int or UUID")
