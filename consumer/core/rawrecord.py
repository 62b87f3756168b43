"""Reads the records of a Kafka batch (format v2) without trusting their header keys to be UTF-8.

Knows the byte format (KIP-98); knows no client, no compression. Used only for a batch that the client could not read,
so it is plain rather than fast.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct(">qiibIhiqqqhii")  # base offset … records count
HEADER_BYTES = _HEADER.size
LOG_OVERHEAD_BYTES = 12  # base offset and length stand before the counted part
_LOG_APPEND_TIME = 0x08
_CODEC = 0x07


class BatchHeader(NamedTuple):
    """The fixed part of a batch."""

    base_offset: int
    length: int
    codec: int
    log_append_time: bool
    last_offset: int
    first_timestamp: int
    max_timestamp: int
    records: int


class Entry(NamedTuple):
    """One record: header keys decoded with surrogateescape, so nothing of them is lost."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def batches(log: bytes) -> Iterator[tuple[BatchHeader, bytes]]:
    """The whole batches of a fetched piece of log, each with its (maybe compressed) records."""
    position = 0
    while position + HEADER_BYTES <= len(log):
        base, length, _, magic, _, attributes, last, first_time, max_time, _, _, _, count = _HEADER.unpack_from(
            log, position
        )
        end = position + LOG_OVERHEAD_BYTES + length
        if magic != 2 or not position + HEADER_BYTES <= end <= len(log):
            return
        header = BatchHeader(
            base,
            length,
            attributes & _CODEC,
            bool(attributes & _LOG_APPEND_TIME),
            base + last,
            first_time,
            max_time,
            count,
        )
        yield header, log[position + HEADER_BYTES : end]
        position = end


def entries(header: BatchHeader, body: bytes) -> Iterator[Entry]:
    """The records of a batch. `body` is already decompressed. Raises ValueError for bytes that are no records."""
    position = 0
    for _ in range(header.records):
        length, position = _varint(body, position)
        end = position + length
        if length < 0 or end > len(body):
            raise ValueError("a record is longer than its batch")
        position += 1  # attributes, unused
        delta, position = _varint(body, position)
        timestamp = header.max_timestamp if header.log_append_time else header.first_timestamp + delta
        offset_delta, position = _varint(body, position)
        key, position = _bytes(body, position)
        value, position = _bytes(body, position)
        count, position = _varint(body, position)
        headers = []
        for _ in range(count):
            name, position = _bytes(body, position)
            content, position = _bytes(body, position)
            headers.append(((name or b"").decode("utf-8", "surrogateescape"), content))
        if position != end:
            raise ValueError("a record's length does not fit its content")
        yield Entry(header.base_offset + offset_delta, timestamp, key, value, tuple(headers))


def _bytes(body: bytes, position: int) -> tuple[bytes | None, int]:
    length, position = _varint(body, position)
    if length < 0:
        return None, position
    if position + length > len(body):
        raise ValueError("a field is longer than its batch")
    return body[position : position + length], position + length


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """A zigzag-encoded variable-length integer."""
    shift = raw = 0
    while True:
        if position >= len(body) or shift > 63:
            raise ValueError("a number is cut short")
        byte = body[position]
        position += 1
        raw |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return (raw >> 1) ^ -(raw & 1), position
        shift += 7
