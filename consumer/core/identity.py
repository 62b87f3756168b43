"""Message ids: 16 bytes from the declared id. Fingerprints of payloads.

Knows records and rules; knows no ledger. A UUID, in any of its spellings, keeps its own 16 bytes, so that time-ordered
ids keep their locality in an index; anything else, of any length and any bytes, is a 128-bit BLAKE2b. At 10**8 hashed
ids the chance of any collision is about 1.5e-23 (birthday bound, n**2 / 2**129). Ids that the framework
generates (from offsets, CloudEvents, edited dead letters) have their own namespaces: no declared id ever equals one.
"""

from __future__ import annotations

import inspect
import re
from binascii import unhexlify
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from struct import Struct
from typing import Any, ClassVar, TypeAlias
from uuid import UUID

from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.message import Record
from consumer.core.outcome import Reason

NO_VALUE_FINGERPRINT = 0
_UUID_BITS = re.compile(rb".{6}[\x10-\x8f].[\x80-\xbf].{7}", re.DOTALL)  # version 1 to 8, and the RFC's variant
_OFFSET_TEXT = re.compile(
    rb"[A-Za-z0-9._-]{1,249}:[0-9]{1,10}:[0-9]{1,19}(?:.{16})?", re.DOTALL
)  # the form of offset_id
_EDIT_TEXT = re.compile(rb"edit-of-dead-letter-([0-9]{1,19})")
_fingerprint = blake2b(digest_size=8)  # copied for each payload: a third cheaper than a new one
_signed = Struct(">q").unpack


@dataclass(frozen=True, slots=True)
class HeaderId:
    """The id is a header's value; without it the message is dead."""

    header: str


@dataclass(frozen=True, slots=True)
class DefaultId:
    """The header message-id, else a CloudEvent's id, else the offset.

    An offset does not recognize a message that is sent twice.
    """

    header: ClassVar[str] = "message-id"


@dataclass(frozen=True, slots=True)
class OffsetId:
    """The id is the message's offset, by choice."""

    header: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class FieldId:
    """The id is a field of the decoded value."""

    header: ClassVar[None] = None
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CallableId:
    """The id is what a function of the decoded value returns."""

    header: ClassVar[None] = None
    function: Callable[[Any], object]


IdRule: TypeAlias = HeaderId | DefaultId | OffsetId | FieldId | CallableId


def parse_rule(option: object) -> IdRule:
    """Parse the option ``message_id=``. Raises RegistrationError."""
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
        f'message_id={option!r}: not understood; use "header:NAME", "field:path.to", "offset" or a plain function of the value'
    )


def rule_text(rule: IdRule) -> str:
    """Return a rule as text, for the ledger.

    Two rules with the same text give the same ids.
    """
    match rule:
        case DefaultId():
            return "default"
        case OffsetId():
            return "offset"
        case HeaderId(name):
            return f"header:{name}"
        case FieldId(path):
            return f"field:{'.'.join(path)}"
        case CallableId(function):
            inner: Any = function
            while isinstance(inner, partial):
                inner = inner.func
            named = inner if hasattr(inner, "__qualname__") else type(inner)
            return f"function {named.__module__}:{named.__qualname__}"


def message_id(raw: bytes) -> bytes:
    """Return the 16 bytes of a declared id.

    All spellings of a UUID are one id: either case, with or without dashes, in braces or quotes, after ``urn:uuid:``,
    between spaces, or as its 16 bytes. Other ids are compared byte by byte: "7" and "07" are two.
    """
    length = len(raw)
    if length == 36 and raw[8:24:5] == b"----":
        try:
            id = unhexlify(raw.replace(b"-", b""))
        except ValueError:
            id = b""  # not a UUID
        if len(id) == 16:  # the dashes are in their places, and there are no others
            return id
    if (length >= 32 or length == 16) and (uuid := _uuid_of(raw)) is not None:
        return uuid
    if 58 in raw and _OFFSET_TEXT.fullmatch(raw):  # ":", six times as fast to find as a number
        return own_id(b"declared", raw)  # the plain hash of such a text is the id of an offset
    return blake2b(raw, digest_size=16).digest()


def own_id(namespace: bytes, raw: bytes) -> bytes:
    """Return 16 bytes in a namespace that no declared id is in.

    namespace: at most 16 bytes.
    """
    return blake2b(raw, digest_size=16, person=namespace).digest()


def _uuid_of(raw: bytes) -> bytes | None:
    """Return the bytes of a UUID in another form than 36 characters.

    None for anything else.
    """
    if len(raw) == 16:
        return raw if _UUID_BITS.fullmatch(raw) else None
    text = raw.strip()
    if text[:9].lower() == b"urn:uuid:":
        text = text[9:]
    elif text[:1] + text[-1:] in (b"{}", b'""'):  # in quotes: a header that a producer made JSON
        text = text[1:-1]
    if len(text) == 36 and text[8:24:5] == b"----":
        text = text.replace(b"-", b"")
    if len(text) != 32:
        return None
    try:
        return unhexlify(text)
    except ValueError:
        return None


def offset_id(record: Record, salt: bytes | None = None) -> bytes:
    """Return the id of a message that declares none, from its offset.

    So a copy of it in another place is another message. salt: distinguishes a log from an earlier one of the same name,
    which had the same offsets.
    """
    raw = f"{record.topic}:{record.partition}:{record.offset}".encode() + (salt or b"")
    return blake2b(raw, digest_size=16).digest()


def edit_id(number: int) -> bytes:
    """Return the id of an edited dead letter, from its number.

    So the same command, run twice, is the same intent.
    """
    return own_id(b"edit", b"%d" % number)


def event_id(source: bytes, id: bytes) -> bytes:
    """Return the id of a CloudEvent, from its source and id."""
    return own_id(b"cloudevent", message_id(id) + source)


def ids_of_text(text: str | bytes, salts: Iterable[bytes | None] = (None,)) -> tuple[bytes, ...]:
    """Return the ids that a text from an operator may mean.

    The declared id comes first, then those that the framework generates: of an offset, as ``topic:partition:offset``
    (salts: of the logs of that name), and of an edited dead letter.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    ids = [message_id(raw)]
    if reads_like_offset(raw):
        ids += [blake2b(raw + (salt or b""), digest_size=16).digest() for salt in (None, *salts)]
    elif edit := _EDIT_TEXT.fullmatch(raw):
        ids.append(edit_id(int(edit[1])))
    return tuple(dict.fromkeys(ids))


def reads_like_offset(raw: bytes) -> bool:
    """Return whether a text has the form of an offset's id."""
    return _OFFSET_TEXT.fullmatch(raw) is not None


def fingerprint(value: bytes | None) -> int:
    """Return 64 signed bits of a payload.

    Two messages with one id and different fingerprints are not the same message.
    """
    if value is None:
        return NO_VALUE_FINGERPRINT
    digest = _fingerprint.copy()
    digest.update(value)
    return _signed(digest.digest())[0]  # type: ignore[no-any-return]


def from_headers(record: Record, name: str) -> bytes | None:
    """Return the 16 bytes of the id in a header, if any.

    Raises Unreadable for an empty header, and for two that differ.
    """
    id: bytes | None = None
    seen = False
    for key, value in record.headers:
        if key == name:
            if seen and value != id and not (value and id and message_id(value) == message_id(id)):
                raise Unreadable(Reason.AMBIGUOUS_MESSAGE_ID, f"several {name!r} headers with different values")
            seen, id = True, value
    if not seen:
        return None
    if not id:
        raise Unreadable(Reason.NO_MESSAGE_ID, f"the header {name!r} is empty")
    return message_id(id)


def from_value(rule: FieldId | CallableId, value: object) -> bytes:
    """Return the 16 bytes of the id in a decoded value.

    Raises Unreadable for a value without a usable id.
    """
    match rule:
        case FieldId(path):
            part = value
            for name in path:
                try:
                    part = part[name] if isinstance(part, dict) else getattr(part, name)
                except Exception:  # a property may raise anything
                    raise Unreadable(Reason.NO_MESSAGE_ID, f"no field {'.'.join(path)!r}") from None
            return from_object(part, f"the field {'.'.join(path)!r}")
        case CallableId(function):
            try:
                part = function(value)
            except Exception as error:
                raise Unreadable(Reason.NO_MESSAGE_ID, f"message_id function: {type(error).__name__}") from error
            return from_object(part, "the result of the message_id function")


def from_object(value: object, what: str) -> bytes:
    """Return the 16 bytes of an id given as a Python value.

    That is a UUID, text, bytes or an integer, not empty; raises Unreadable for others. what: names it in errors.
    """
    if isinstance(value, UUID):
        return value.bytes
    if isinstance(value, str) and value:
        return message_id(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes) and value:
        return message_id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return message_id(str(value).encode())
        except ValueError:
            raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is a number of too many digits") from None
    if value is None or value in ("", b""):
        raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is empty")
    raise Unreadable(Reason.NO_MESSAGE_ID, f"{what} is a {type(value).__name__}: use text, bytes, int or UUID")
