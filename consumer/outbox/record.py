"""The outgoing record: id, bytes and headers, and what is refused.

Pure. Limitations: does not know whether a topic exists.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import msgspec

from consumer.core.encode import to_json
from consumer.core.errors import TransactionMisuse, Unreadable
from consumer.core.identity import from_object, own_id
from consumer.core.message import Partition
from consumer.core.values import not_finite

Headers: TypeAlias = tuple[tuple[str, bytes | None], ...]
HeadersArgument: TypeAlias = Mapping[str, str | bytes | None] | Iterable[tuple[str, str | bytes | None]] | None

MESSAGE_ID = "message-id"
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
EVENT_TYPE = "ce_type"  # copied to a column, for relays that send columns only
RECORD_BYTES_MAX = 1_048_588  # Kafka's own default of max.message.bytes
TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_RESERVED = frozenset({MESSAGE_ID})
_OVERHEAD_BYTES = 61 + 21  # of a record batch, and of a record at most
_HEADER_BYTES = 10  # two lengths, at most
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]{0,400})?")
_TRACESTATE = re.compile(r"[ -~]{1,512}")
_decode_headers = msgspec.json.Decoder(list[tuple[str, str | dict[str, str] | None]]).decode


class OutgoingRecord(NamedTuple):
    """A record as it will be published.

    id: 16 bytes. headers: without those that the framework adds. traceparent, tracestate: of the message that caused it,
    unless headers has its own.
    """

    topic: str
    id: bytes
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    traceparent: str | None = None
    tracestate: str | None = None


class Outgoing(NamedTuple):
    """An outgoing record and the message that caused it.

    source: the partition of that message, or streams.INTAKE. handler: number. offset: None where several messages caused
    it.
    """

    record: OutgoingRecord
    source: Partition
    handler: int | None
    offset: int | None


class StoredStream(NamedTuple):
    """Rows of one stream that a transaction stored.

    created_ms: the timestamp of its rows, in milliseconds since 1970.
    """

    stream: int
    source: Partition
    topic: str
    first: int
    records: list[OutgoingRecord]
    created_ms: int


def derived_id(app: str, handler: str, input_id: bytes, ordinal: int) -> bytes:
    """Return the 16 bytes of the id of a published message.

    The same input publishes the same ids, whenever and wherever it is applied. ordinal: how many this handler published
    for this input before.
    """
    return stable_id(b"outbox", app.encode(), handler.encode(), input_id, b"%d" % ordinal)


def stable_id(namespace: bytes, *fields: bytes) -> bytes:
    """Return 16 bytes that fields determine, in a namespace of their own.

    Each field is preceded by its length, so that no two lists of fields have the same bytes.
    """
    return own_id(namespace, b"".join([b"%d:%s" % (len(field), field) for field in fields]))


def given_id(id: object) -> bytes:
    """Return the 16 bytes of an id that the handler chose.

    A UUID keeps its bytes; other ids are hashed as everywhere. Raises TransactionMisuse.
    """
    try:
        return from_object(id, "publish: id=")
    except Unreadable as error:
        raise TransactionMisuse(str(error)) from None


def encoded_key(key: object) -> bytes | None:
    """Return a record's key as bytes. Raises TransactionMisuse."""
    if key is None or type(key) is bytes:
        return key
    if isinstance(key, str):
        return _utf8(key, "key")
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key)
    raise TransactionMisuse(f"publish: key= is {_article(key)}; give str, bytes or None")


def encoded_value(value: object) -> bytes | None:
    """Return a record's value as bytes; None is a tombstone.

    bytes and text stay as they are, anything else becomes JSON. Raises TransactionMisuse for what JSON cannot hold.
    """
    if value is None or type(value) is bytes:
        return value
    if isinstance(value, str):
        return _utf8(value, "value")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if (place := not_finite(value)) is not None:
        raise TransactionMisuse(f"publish: {place} is not finite, which JSON cannot hold; publish a finite number")
    try:
        return to_json(value)
    except Exception as error:
        raise TransactionMisuse(
            f"publish: {_article(value)} cannot become JSON ({type(error).__name__}); give what msgspec encodes, or bytes"
        ) from error


def checked_headers(headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None) -> Headers:
    """Return headers as names and bytes. Raises TransactionMisuse."""
    if headers is None:
        return ()
    try:
        pairs = list(headers.items()) if isinstance(headers, Mapping) else [(name, value) for name, value in headers]
    except (TypeError, ValueError):
        raise TransactionMisuse("publish: headers= is no mapping and no list; give one of (name, value)") from None
    return tuple((_header_name(name), _header_value(name, value)) for name, value in pairs)


def _header_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise TransactionMisuse("publish: a header has no name; give a str that is not empty")
    if b"\0" in _utf8(name, "the name of a header"):
        raise TransactionMisuse("publish: the name of a header holds NUL; remove it")
    if name.lower() in _RESERVED:
        raise TransactionMisuse(f"publish: the header {name!r} is reserved; use id= to choose the message id")
    return name


def _header_value(name: str, value: object) -> bytes | None:
    if value is None or type(value) is bytes:
        return value
    if isinstance(value, str):
        return _utf8(value, f"the header {name!r}")
    raise TransactionMisuse(f"publish: the header {name!r} is {_article(value)}; give str, bytes or None")


def check_topic(topic: object, declared: Mapping[str, int]) -> int:
    """Return how many bytes a record of a topic may have.

    Raises TransactionMisuse for a topic that the App does not declare.
    """
    limit = declared.get(topic) if isinstance(topic, str) else None
    if limit is None:
        name = topic if isinstance(topic, str) and TOPIC.fullmatch(topic) else "this topic"
        raise TransactionMisuse(f"publish: {name} is not declared; add it to App(publishes=[...])")
    return limit


def check_size(record: OutgoingRecord, bytes_max: int) -> None:
    """Raise TransactionMisuse for a record that Kafka would refuse."""
    if (size := size_of(record)) > bytes_max:
        raise TransactionMisuse(
            f"publish: a record of {size:,} bytes is too large for {record.topic}, which takes {bytes_max:,}; "
            "publish less, or raise max.message.bytes of the topic"
        )


def size_of(record: OutgoingRecord) -> int:
    """Return the most bytes that a batch of this record has."""
    return sent_size(record.key, record.value, wire_headers(record))


def sent_size(key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> int:
    """Return the most bytes that a batch of one record has.

    headers: all of them.
    """
    size = _OVERHEAD_BYTES + len(key or b"") + len(value or b"")
    for name, text in headers:
        size += len(name.encode()) + len(text or b"") + _HEADER_BYTES
    return size


def trace_of(headers: Sequence[tuple[str, bytes | None]]) -> tuple[str | None, str | None]:
    """Return traceparent and tracestate of headers, without malformed ones."""
    parent = state = None
    for name, value in headers:
        if name == TRACEPARENT and parent is None:
            parent = _text(value, _TRACEPARENT)
        elif name == TRACESTATE and state is None:
            state = _text(value, _TRACESTATE)
    return parent, state if parent is not None else None


def _text(value: bytes | None, pattern: re.Pattern[str]) -> str | None:
    text = (value or b"").decode("latin-1")
    return text if pattern.fullmatch(text) else None


def wire_headers(record: OutgoingRecord) -> list[tuple[str, bytes | None]]:
    """Return all headers of a record, as Kafka gets them."""
    headers = [(MESSAGE_ID, str(UUID(bytes=record.id)).encode()), *record.headers]
    if record.traceparent is not None:
        headers.append((TRACEPARENT, record.traceparent.encode()))
        if record.tracestate is not None:
            headers.append((TRACESTATE, record.tracestate.encode()))
    return headers


def event_type(headers: Headers) -> str | None:
    """Return the CloudEvents type that headers name, if it is text."""
    for name, value in headers:
        if name == EVENT_TYPE and value is not None:
            return _plain(value)
    return None


def headers_as_json(headers: Headers) -> str:
    """Return headers as JSON for PostgreSQL: [[name, text]].

    A value that is no UTF-8 or holds NUL, which jsonb cannot, is {"base64": text}. `checked_headers` refuses such names.
    """
    if not headers:
        return "[]"
    return to_json([(name, _json_value(value)) for name, value in headers]).decode()


def headers_from_json(text: str) -> Headers:
    """Return the headers that `headers_as_json` wrote."""
    if text == "[]":
        return ()
    return tuple((name, _value_of_json(value)) for name, value in _decode_headers(text))


def _json_value(value: bytes | None) -> object:
    if value is None:
        return None
    text = _plain(value)
    return {"base64": base64.b64encode(value).decode()} if text is None else text


def _value_of_json(value: str | dict[str, str] | None) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])


def _plain(value: bytes) -> str | None:
    """Return the text that PostgreSQL can hold; None for other bytes."""
    if b"\0" in value:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise TransactionMisuse(f"publish: {what} holds a lone surrogate, which is no UTF-8; remove it") from None


def _article(value: object) -> str:
    return f"a value of type {type(value).__name__}"
