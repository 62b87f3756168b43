"""Confluent's wire format: which schema a value was written with.

Pure. Either a zero byte and four bytes of a schema id come before the value, or the header `__value_schema_id` has the id or
the schema's GUID. See "Wire format" in the documentation of Confluent's serializers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias
from uuid import UUID

from consumer.core.message import Record
from consumer.core.models import Unfit

SchemaKey: TypeAlias = int | UUID

HEADER = "__value_schema_id"
_ID, _GUID = 0, 1  # the first byte, which says what follows
_JSON = b'{["'


def schema_key(record: Record) -> SchemaKey | None:
    """Return the id or the GUID of a record's schema.

    None where it has none.
    """
    for name, value in record.headers:
        if name == HEADER and value is not None:
            return _key_of(value, exactly=True)
    value = record.value
    return _key_of(value) if value is not None else None


def payload(record: Record) -> bytes:
    """Return what the schema describes.

    Raises Unfit for a record without a schema.
    """
    value = record.value or b""
    if any(name == HEADER and text is not None for name, text in record.headers):
        return value
    if len(value) > 5 and value[0] == _ID:
        return value[5:]
    if len(value) > 17 and value[0] == _GUID:
        return value[17:]
    return value[5:] if len(value) == 5 and value[0] == _ID else _refuse(value)


def _refuse(value: bytes) -> bytes:
    if value[:1] and value[0] in _JSON:
        raise Unfit(
            "plain JSON, without the schema id of Confluent's wire format; write with a serializer that knows the registry, "
            "or give this handler decode=Json()"
        )
    if value[:4] == b"Obj\x01":
        raise Unfit(
            "an Avro file, without the schema id of Confluent's wire format; write single values with a serializer that knows the registry"
        )
    raise Unfit("no schema id: not Confluent's wire format; write with a serializer that knows the registry")


def _key_of(value: bytes, *, exactly: bool = False) -> SchemaKey | None:
    """Return the key at the beginning of bytes.

    exactly: they are nothing else.
    """
    size = len(value)
    if size >= 5 and value[0] == _ID and (size == 5 or not exactly):
        return int.from_bytes(value[1:5], "big")
    if size >= 17 and value[0] == _GUID and (size == 17 or not exactly):
        return UUID(bytes=value[1:17])
    return None


def framed(schema_id: int, body: bytes) -> bytes:
    """Return a value with the id of its schema."""
    return b"\0" + schema_id.to_bytes(4, "big") + body


def message_indexes(body: bytes) -> tuple[list[int], bytes]:
    """Return which message a value is, and the value.

    The indexes lead through nested messages. Raises Unfit.
    """
    count, at = _varint(body, 0)
    if count == 0:
        return [0], body[at:]
    if not 0 < count <= 100:
        raise Unfit("no list of message indexes before the Protobuf message")
    indexes: list[int] = []
    for _ in range(count):
        index, at = _varint(body, at)
        indexes.append(index)
    return indexes, body[at:]


def indexes_as_bytes(indexes: Sequence[int]) -> bytes:
    """Return message indexes as they are written before a value."""
    if list(indexes) == [0]:
        return b"\0"
    return b"".join(map(_as_varint, [len(indexes), *indexes]))


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Return a zigzag varint and the offset behind it. Raises Unfit."""
    result = shift = 0
    while at < len(body) and shift < 64:
        byte = body[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return (result >> 1) ^ -(result & 1), at
        shift += 7
    raise Unfit("no list of message indexes before the Protobuf message")


def _as_varint(number: int) -> bytes:
    left = number << 1
    parts = bytearray()
    while left > 0x7F:
        parts.append(left & 0x7F | 0x80)
        left >>= 7
    parts.append(left)
    return bytes(parts)
