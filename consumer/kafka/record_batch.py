"""Reads Kafka's record batches without trusting them.

Checks their order and sizes, and keeps header keys that are not UTF-8. Knows the byte format (KIP-98); knows no client
and no compression. `check` runs for every fetch and takes one iteration for a batch; the rest is used only for a batch
that the client could not read, so it is plain rather than fast.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct(">qiibIhiqqqhii")  # base offset … records count
HEADER_BYTES = _HEADER.size
LOG_OVERHEAD_BYTES = 12  # base offset and length precede the counted part
_START = struct.Struct(">qiibIhi")  # base offset, length, leader epoch, format, CRC, attributes, last offset delta
_LENGTH_MIN = {0: 14, 1: 22, 2: HEADER_BYTES - LOG_OVERHEAD_BYTES}  # by format; 0 and 1 hold a message, not a batch
_FORMAT_AT = 16  # index of the byte with the format
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


class RawRecord(NamedTuple):
    """One record; header keys are decoded with surrogateescape, without loss."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class Damage(NamedTuple):
    """A batch whose frame is wrong.

    first: the first missing offset. last: the last one, None if the bytes do not say. next_at: where in the bytes the
    next sound batch begins. head: the first bytes of the broken one, to recognize it.
    """

    text: str
    first: int
    last: int | None
    next_at: int = 0
    head: bytes = b""


def check(log: bytes, wanted: int, end: int) -> tuple[int, Damage | None]:
    """Return the size of the sound frames, and the first damage.

    No checksum covers a batch's base offset, length and format, so a wrong one skips records silently, or ends the
    client. A fetched piece of log ends also where messages of an old format meet batches. wanted: the offset that was
    asked for. end: the high watermark, negative if unknown. A batch that is cut at the end of the piece is sound: the
    next fetch brings it whole.
    """
    position = before = 0
    last, last_before, is_dense = wanted - 1, wanted - 1, True
    size = len(log)
    while size - position >= _START.size:
        base, length, _, magic, _, _, delta = _START.unpack_from(log, position)
        following = position + LOG_OVERHEAD_BYTES + length
        least = _LENGTH_MIN.get(magic)
        if least is None:
            return position, _damage(f"its message format {magic} is unknown", log, position, last + 1, end)
        if length < least:
            return position, _damage(f"its length of {length} bytes is impossible", log, position, last + 1, end)
        if following > size:
            damage = _damage(f"its length of {length} bytes goes beyond it", log, position, last + 1, end)
            return position, None if damage.last is None else damage
        if position and (magic == 2) != (log[_FORMAT_AT] == 2):
            return position, None  # the client reads a piece of one format: the rest comes with the next fetch
        if magic == 2:
            if delta < 0 or 0 <= end < base:  # Tansu reports the last batch's base as the end
                text = f"its offsets {base} to {base + delta} do not lie in the log"
                return position, _damage(text, log, position, last + 1, end)
            if position and base <= last:
                # Without the batch before it, the order is right.
                if (not is_dense or base == wanted) and base > last_before:
                    text = f"its last offset {last} does not lie before {base}"
                    return before, Damage(
                        text, last_before + 1, base - 1, position, log[before : before + HEADER_BYTES]
                    )
                return position, _damage(f"its offset {base} does not lie behind {last}", log, position, last + 1, end)
            last_before, is_dense, last = last, base <= last + 1, base + delta
        before, position = position, following
    return position, None


def _damage(text: str, log: bytes, position: int, first: int, end: int) -> Damage:
    """Describe the damaged batch at `position`; find the next sound one.

    A batch is recognized by its format, by an offset that fits, and by counts and sizes that agree.
    """
    head = log[position : position + HEADER_BYTES]
    at = log.find(b"\x02", position + 1 + _FORMAT_AT)
    while at >= 0 and at - _FORMAT_AT + HEADER_BYTES <= len(log):
        begin = at - _FORMAT_AT
        base, length, _, _, _, _, delta, *_, count = _HEADER.unpack_from(log, begin)
        if (
            first <= base
            and (end < 0 or base <= end)
            and _LENGTH_MIN[2] <= length <= len(log) - begin - LOG_OVERHEAD_BYTES
            and 0 <= count <= delta + 1
        ):
            return Damage(text, first, int(base) - 1, begin, head)
        at = log.find(b"\x02", at + 1)
    return Damage(text, first, None, 0, head)


def batches(log: bytes) -> Iterator[tuple[BatchHeader, bytes]]:
    """Yield the whole batches of a fetched piece of log.

    Each with its records, which may be compressed.
    """
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


def entries(header: BatchHeader, body: bytes) -> Iterator[RawRecord]:
    """Yield the records of a batch.

    `body` is decompressed already. Raises ValueError for bytes that are not records.
    """
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
        yield RawRecord(header.base_offset + offset_delta, timestamp, key, value, tuple(headers))


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
