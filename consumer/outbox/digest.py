"""Compares records of one id by digests of key, value and headers.

Pure. Limitations: digests have 8 bytes each, as those of the ledger (core/fingerprint.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from consumer.core.identity import from_object, own_id
from consumer.outbox.record import MESSAGE_ID, OutgoingRecord, wire_headers

_ABSENT = 0


class Digests(NamedTuple):
    """Signed 64-bit numbers. headers: without the message id."""

    key: int
    value: int
    headers: int


def digests(key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> Digests:
    """Return the digests of a record as Kafka has it."""
    kept = [(name.encode(), text) for name, text in headers if name != MESSAGE_ID]
    joined = b"".join(
        b"%d:%s%s" % (len(name), name, b"-" if text is None else b"%d:%s" % (len(text), text)) for name, text in kept
    )
    return Digests(_of(key), _of(value), _of(joined) if kept else _ABSENT)


def digests_of(record: OutgoingRecord) -> Digests:
    """Return the digests that an outgoing record will have in Kafka."""
    return digests(record.key, record.value, wire_headers(record))


def published_id(headers: Iterable[tuple[str, bytes | None]], topic: str, partition: int, offset: int) -> bytes:
    """Return the 16 bytes of a published record's message id.

    A record without one, which no handler has published, gets an id of its own.
    """
    for name, text in headers:
        if name == MESSAGE_ID and text:
            return from_object(text, "the header message-id")
    return own_id(b"no id", f"{topic}:{partition}:{offset}".encode())


def _of(data: bytes | None) -> int:
    if data is None:
        return _ABSENT
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big", signed=True)
