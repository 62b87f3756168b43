"""Digests that show whether a dead letter still holds its record.

Knows records and bytes; knows no table. The fingerprint of a message cannot replace them: its rule may compare nothing,
or need code that has changed since. Limitations: older dead letters have no digests; a change of both digest and record
is not noticed; reason, error and state of a dead letter, and the value of an edit, are not covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from consumer.core.message import Record

VALUE = "value"
REST = "key, headers or place"
ERASED = b""  # instead of digests, which would confirm a guess of the message
_SIZE = 16  # bytes of each digest


def is_erased(row: Mapping[str, Any]) -> bool:
    """Return whether an operator has erased the message of a dead letter."""
    return row["seal"] is not None and row["seal"] == ERASED


def seal(record: Record) -> bytes:
    """Return the digests of a record, for its dead letter."""
    names = [key.encode("utf-8", "surrogateescape") for key, _ in record.headers]
    values = [value for _, value in record.headers]
    place = (record.topic, record.partition, record.offset, record.timestamp)
    return _of_value(record.value) + _of_rest(place, record.key, names, values)


def altered(row: Mapping[str, Any]) -> list[str] | None:
    """Return which parts of a dead letter's row have changed: VALUE, REST.

    None for a row without digests. An erased row has nothing that could have changed.
    """
    kept = row["seal"]
    if kept is None:
        return None
    if kept == ERASED:
        return []
    place = (row["topic"], row["partition"], row["offset"], row["timestamp"])
    intact = {
        VALUE: kept[:_SIZE] == _of_value(row["value"]),
        REST: kept[_SIZE:] == _of_rest(place, row["key"], row["header_keys"], row["header_values"]),
    }
    return [part for part, is_same in intact.items() if not is_same]


def _of_value(value: bytes | None) -> bytes:
    return _digest([value])


def _of_rest(
    place: tuple[str, int, int, int], key: bytes | None, names: Sequence[bytes], values: Sequence[bytes | None]
) -> bytes:
    return _digest(
        [
            repr(place).encode(),
            key,
            *(part for pair in zip(names, values, strict=False) for part in pair),
            b"%d" % len(values),
        ]
    )


def _digest(parts: Iterable[bytes | None]) -> bytes:
    digest = blake2b(digest_size=_SIZE)
    for part in parts:
        digest.update(b"-" if part is None else b"%d:" % len(part))
        digest.update(part or b"")
    return digest.digest()
